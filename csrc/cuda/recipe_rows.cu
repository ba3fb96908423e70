#include "recipe_rows.cuh"

#include "launch.cuh"

using namespace eakd::cuda;

extern "C" int eakd_launch_recipe(const RecipeJob* job, const Plan* plan, Dtypes dtypes, void* stream) {
  return with_dtypes(dtypes, [&](auto pair) {
    using S = typename decltype(pair)::Student;
    using T = typename decltype(pair)::Teacher;
    auto* kernel = plan->width == 1 ? recipe_rows_kernel<S, T, 1> : recipe_rows_kernel<S, T, decltype(pair)::kVector>;
    return launch_persistent(kernel, *plan, plan->shared_bytes, stream, *job, plan->cluster, plan->slice);
  });
}
