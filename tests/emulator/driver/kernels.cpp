// -DEAKD_DRIVER_TYPES=float,3: for Kernels<float, 3>.
#include "kernels.h"

#include "cuda/resident_rows.cuh"
#include "cuda/ring_rows.cuh"
#include "cuda/row_gradient.cuh"
#include "cuda/small_rows.cuh"
#include "cuda/stream_rows.cuh"
// Behind what it launches.
#include "cuda/launch.cuh"

namespace driver {

using namespace eakd::cuda;

namespace {

template <bool ONE_PASS, typename T, int W>
cudaError_t small(const RowJob& job, const Plan& plan) {
  auto* kernel = plan.lanes == kFewLanes ? small_rows_kernel<ONE_PASS, kFewLanes, kFewColumns, T, T, W>
                                         : small_rows_kernel<ONE_PASS, kManyLanes, kManyColumns, T, T, W>;
  return launch(kernel, plan, 0, nullptr, job);
}

template <bool ONE_PASS, int P, typename T, int W>
cudaError_t sums_of(const RowJob& job, const Plan& plan) {
  switch (plan.kernel) {
    case Kernel::kSmall: return plan.width == 1 ? small<ONE_PASS, T, 1>(job, plan) : small<ONE_PASS, T, W>(job, plan);
    case Kernel::kResident:
      return launch(resident_rows_kernel<P, T, T, W>, plan, sizeof(MergeSpace), nullptr, job, plan.cluster);
    case Kernel::kRing:
      return launch(ring_rows_kernel<P, T, T, W>, plan, plan.shared_bytes, nullptr, job, plan.cluster, plan.slice,
                    plan.stages);
    default:
      return launch(stream_rows_kernel<ONE_PASS, P, T, T, W>, plan, sizeof(MergeSpace), nullptr, job, plan.cluster);
  }
}

}  // namespace

template <typename T, int P>
cudaError_t Kernels<T, P>::sums(const RowJob& job, const Plan& plan, bool one_pass) {
  return one_pass ? sums_of<true, P, T, kVector>(job, plan) : sums_of<false, P, T, kVector>(job, plan);
}

template <typename T, int P>
cudaError_t Kernels<T, P>::row_gradient(const RowJob& job, const Plan& plan) {
  return launch(row_gradient_kernel<true, T, T, kVector>, plan, 0, nullptr, job);
}

template <typename T, int P>
cudaError_t Kernels<T, P>::scale(const RowJob& job, const Plan& plan, const float* factor, bool in_place) {
  return launch(scale_kernel<T, kVector>, plan, 0, nullptr, job, factor, in_place);
}

template <typename T, int P>
cudaError_t Kernels<T, P>::total(const Total& total, int threads) {
  Plan plan;
  plan.blocks = 1, plan.threads = threads;
  return launch(total_kernel, plan, threads * sizeof(double), nullptr, total.values, total.count, total.scale,
                total.denominator, total.total);
}

template struct Kernels<EAKD_DRIVER_TYPES>;

}  // namespace driver
