#include "row_gradient.cuh"

#include "launch.cuh"

using namespace eakd::cuda;

namespace {

template <typename S, typename T, int W>
cudaError_t launch_gradient(const RowJob& job, const Plan& plan, bool entropy, void* stream) {
  auto* kernel = entropy ? row_gradient_kernel<true, S, T, W> : row_gradient_kernel<false, S, T, W>;
  return launch(kernel, plan, 0, stream, job);
}

}  // namespace

extern "C" int eakd_launch_gradient(const RowJob* job, const Plan* plan, Dtypes dtypes, bool entropy, void* stream) {
  return with_dtypes(dtypes, [&](auto pair) {
    using S = typename decltype(pair)::Student;
    using T = typename decltype(pair)::Teacher;
    if (plan->width == 1) return launch_gradient<S, T, 1>(*job, *plan, entropy, stream);
    return launch_gradient<S, T, decltype(pair)::kVector>(*job, *plan, entropy, stream);
  });
}

extern "C" int eakd_launch_scale(const RowJob* job, const Plan* plan, Dtypes dtypes, const float* factor, bool in_place,
                                 void* stream) {
  return with_equal_dtypes(dtypes, [&](auto pair) {
    using S = typename decltype(pair)::Student;
    auto* kernel = plan->width == 1 ? scale_kernel<S, 1> : scale_kernel<S, decltype(pair)::kVector>;
    return launch(kernel, *plan, 0, stream, *job, factor, in_place);
  });
}

extern "C" int eakd_launch_total(const Total* total, void* stream) {
  Plan plan;
  plan.blocks = 1, plan.threads = 1024;
  return launch(total_kernel, plan, plan.threads * sizeof(double), stream, total->values, total->count, total->scale,
                total->denominator, total->total);
}
