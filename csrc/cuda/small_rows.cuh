// Short rows, several of them a warp: LANES threads a row, each with up to COLUMNS of its columns in registers, no
// shared memory. Launches and latency count here, not throughput, so exponentials are the guarded ones, about exact
// maxima.
#pragma once

#include "merge.cuh"
#include "row_result.cuh"

namespace eakd {
namespace cuda {
namespace {

// W > 1: every row of both tensors begins with a whole vector, and ends with one.
template <bool ONE_PASS, int LANES, int COLUMNS, typename S, typename T, int W>
__global__ void __launch_bounds__(kSmallThreads, 4) small_rows_kernel(const __grid_constant__ RowJob job) {
  constexpr int kVectors = COLUMNS / W;
  const int lane = threadIdx.x % LANES;
  const int r = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
  const bool inside = r < job.rows, kept = inside && job.keep.at(r, true);
  // Lanes without a row go along with the first one's, and take none of its columns.
  const RowColumns<S, T, W> row(job, inside ? r : 0);
  const Temperatures<float> k = row_temperatures(job, inside ? r : 0);
  const int end = kept ? row.vectors : 0;
  const float label_logit = kept && job.hard != kNoHardSum ? row.label_logit() : 0.f;

  Packed<T, W> y[kVectors];
  Packed<S, W> z[kVectors];
  Largest<T> top_y;
  Largest<S> top_z;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = lane + i * LANES;
    if (v >= end) break;
    z[i] = row.template student_vector<Reading::kOnce>(v), y[i] = row.template teacher_vector<Reading::kOnce>(v);
    top_y.add(y[i]), top_z.add(z[i]);
  }
  GuardedSums sums(job, largest_of<LANES>(top_y.value()), largest_of<LANES>(top_z.value()));
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (lane + i * LANES >= end) break;
#pragma unroll
    for (int j = 0; j < W; ++j)
      sums.add(y[i][j], z[i][j], k);
  }
  RowState<float> s = sums.s;
  add_up<LANES>(s, job.slopes);
  place_hard_sum(s, job.hard);
  __syncwarp();  // all lanes have read the label's logit, and the gradient may be written over it

  if (!inside) return;
  if (!kept) {
    if (ONE_PASS) GradientColumns<false, S, T, W>(row).store_nothing(lane, LANES);
    if (lane == 0) store_no_fields(job, r, ONE_PASS ? int(kNumLossStatistics) : fields_of_statistics(job));
  } else if (ONE_PASS) {
    const GradientBasis<float> basis = finish_row(job, r, s, k, label_logit, lane == 0);
    const GradientOfRow<false, false, S, T, W> gradient(row, basis, k);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = lane + i * LANES;
      if (v >= end) break;
      gradient.vector(v, y[i], z[i]);
    }
    gradient.out.store_padding(lane, LANES);
  } else if (lane == 0) {
    store_statistics(job, r, s, k, label_logit);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace eakd
