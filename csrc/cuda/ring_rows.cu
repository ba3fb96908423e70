#include "ring_rows.cuh"

#include "launch.cuh"

using namespace eakd::cuda;

extern "C" int eakd_launch_ring(const RowJob* job, const Plan* plan, Dtypes dtypes, void* stream) {
  return with_equal_dtypes(dtypes, [&](auto pair) {
    using Types = decltype(pair);
    return with_multiple(*job, [&](auto multiple) {
      auto* kernel =
          ring_rows_kernel<decltype(multiple)::value, typename Types::Student, typename Types::Teacher, Types::kVector>;
      return launch_persistent(kernel, *plan, plan->shared_bytes, stream, *job, plan->cluster, plan->slice,
                               plan->stages);
    });
  });
}
