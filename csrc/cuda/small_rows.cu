#include "small_rows.cuh"

#include "launch.cuh"

using namespace eakd::cuda;

namespace {

template <bool ONE_PASS, typename S, typename T, int W>
cudaError_t launch_small(const RowJob& job, const Plan& plan, void* stream) {
  auto* kernel = plan.lanes == kFewLanes ? small_rows_kernel<ONE_PASS, kFewLanes, kFewColumns, S, T, W>
                                         : small_rows_kernel<ONE_PASS, kManyLanes, kManyColumns, S, T, W>;
  return launch(kernel, plan, 0, stream, job);
}

}  // namespace

extern "C" int eakd_launch_small(const RowJob* job, const Plan* plan, Dtypes dtypes, bool one_pass, void* stream) {
  return with_dtypes(dtypes, [&](auto pair) {
    using S = typename decltype(pair)::Student;
    using T = typename decltype(pair)::Teacher;
    constexpr int kVector = decltype(pair)::kVector;
    const auto launch = plan->width == 1
                            ? (one_pass ? launch_small<true, S, T, 1> : launch_small<false, S, T, 1>)
                            : (one_pass ? launch_small<true, S, T, kVector> : launch_small<false, S, T, kVector>);
    return launch(*job, *plan, stream);
  });
}
