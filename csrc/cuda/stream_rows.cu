#include "stream_rows.cuh"

#include "launch.cuh"

using namespace eakd::cuda;

namespace {

template <int P, typename S, typename T, int W>
int launch_stream(const RowJob& job, const Plan& plan, bool one_pass, void* stream) {
  auto* kernel = one_pass ? stream_rows_kernel<true, P, S, T, W> : stream_rows_kernel<false, P, S, T, W>;
  return launch_persistent(kernel, plan, sizeof(MergeSpace), stream, job, plan.cluster);
}

}  // namespace

extern "C" int eakd_launch_stream(const RowJob* job, const Plan* plan, Dtypes dtypes, bool one_pass, void* stream) {
  return with_dtypes(dtypes, [&](auto pair) {
    using S = typename decltype(pair)::Student;
    using T = typename decltype(pair)::Teacher;
    // One by one, columns are bound by their loads: two exponentials more change nothing.
    if (plan->width == 1) return launch_stream<0, S, T, 1>(*job, *plan, one_pass, stream);
    return with_multiple(*job, [&](auto multiple) {
      return launch_stream<decltype(multiple)::value, S, T, decltype(pair)::kVector>(*job, *plan, one_pass, stream);
    });
  });
}
