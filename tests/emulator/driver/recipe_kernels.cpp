#include "kernels.h"

#include "cuda/recipe_rows.cuh"
// Behind what it launches.
#include "cuda/launch.cuh"

namespace driver {

using namespace eakd::cuda;

template <typename T>
cudaError_t launch_recipe(const RecipeJob& job, const Plan& plan) {
  constexpr int kVector = 16 / sizeof(T);
  auto* kernel = plan.width == 1 ? recipe_rows_kernel<T, T, 1> : recipe_rows_kernel<T, T, kVector>;
  int at_once = 0;  // allows the kernel its shared memory
  const cudaError_t error = clusters_at_once(kernel, plan, plan.shared_bytes, &at_once);
  return error != cudaSuccess ? error : launch(kernel, plan, plan.shared_bytes, nullptr, job, plan.cluster, plan.slice);
}

template cudaError_t launch_recipe<float>(const RecipeJob&, const Plan&);
template cudaError_t launch_recipe<__nv_bfloat16>(const RecipeJob&, const Plan&);

}  // namespace driver
