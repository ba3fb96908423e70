// One pass with the row pair in registers: one CTA a row, or a cluster of them, and each thread keeps its columns from
// the statistics to the gradient. Two reads and one write of [rows, vocab] in all.
//
// Two CTAs fit a processor, each thread with 128 registers of which 80 hold columns, so that one loads while the other
// computes. The grid is as large as the GPU and walks along the rows.
#pragma once

#include "merge.cuh"
#include "row_result.cuh"

namespace eakd {
namespace cuda {
namespace {

template <typename S, typename T, int W>
struct ResidentColumns {
  Packed<T, W> y[kResidentVectors];
  Packed<S, W> z[kResidentVectors];

  __device__ __forceinline__ void load(const RowColumns<S, T, W>& row, const Share& share) {
#pragma unroll
    for (int i = 0; i < kResidentVectors; ++i) {
      const int v = share.first + i * share.step;
      if (v < share.end) {
        z[i] = row.template student_vector<Reading::kOnce>(v);
        y[i] = row.template teacher_vector<Reading::kOnce>(v);
      }
    }
  }

  // visit(i, vector): each of the thread's vectors.
  template <typename Visit>
  __device__ __forceinline__ void each(const Share& share, Visit&& visit) const {
#pragma unroll
    for (int i = 0; i < kResidentVectors; ++i) {
      const int v = share.first + i * share.step;
      if (v < share.end) visit(i, v);
    }
  }
};

// Between loading and storing the row's addresses are worked out anew where they are needed (ptx::opaque): the columns
// leave no registers for them.
template <int P, typename S, typename T, int W>
__device__ __forceinline__ RowState<float> resident_state(const RowJob& job, int r, ResidentColumns<S, T, W>& columns,
                                                          const Share& share, int loose) {
  const Temperatures<float> k = row_temperatures(job, r);
  FastSums<P> sums(k, job.hard);
  Largest<T> top_y;
  Largest<S> top_z;
  columns.each(share, [&](int i, int) { top_y.add(columns.y[i]), top_z.add(columns.z[i]); });
  float loose_y = 0, loose_z = 0;
  if (loose >= 0) {
    const RowColumns<S, T, W> again(job, ptx::opaque(r));
    loose_y = again.teacher_at(loose), loose_z = again.student_at(loose);
    top_y.add(loose_y), top_z.add(loose_z);
  }
  const float my = largest_of<kWarp>(top_y.value()), mz = largest_of<kWarp>(top_z.value());
  sums.start(my, mz);
  columns.each(share, [&](int i, int) { sums.add(columns.y[i], columns.z[i], job.hard == kOwnHardSum); });
  if (loose >= 0) sums.add_column(loose_y, loose_z);
  if (!sums.was_too_fast()) return sums.about(my, mz, job.hard);
  const RowColumns<S, T, W> again(job, ptx::opaque(r));
  RowState<float> s = guarded_sums(job, again, share, loose, k);
  s.recentre(my, mz, k);
  columns.load(again, share);  // so that they need not stay in registers until here
  return s;
}

template <int P, typename S, typename T, int W>
__global__ void __launch_bounds__(kResidentThreads, 2)
    resident_rows_kernel(const __grid_constant__ RowJob job, int cluster) {
  MergeSpace& space = *reinterpret_cast<MergeSpace*>(ptx::dynamic_shared());
  const int threads = cluster * blockDim.x;
  int turn = 0;
  for (int r = blockIdx.x / cluster; r < job.rows; r += gridDim.x / cluster) {
    const RowColumns<S, T, W> row(job, r);
    const int thread = thread_of_row(cluster);
    if (!job.keep.at(r, true)) {
      GradientColumns<true, S, T, W>(row).store_nothing(thread, threads);
      if (thread == 0) store_no_fields(job, r, kNumLossStatistics);
      continue;
    }
    const Share share = {thread, row.vectors, threads};
    ResidentColumns<S, T, W> columns;
    columns.load(row, share);
    const RowState<float> s = resident_state<P>(job, r, columns, share, row.loose_column(thread));
    // Now: after the merge the gradient may be written over it.
    float label_logit = 0;
    if (threadIdx.x < kWarp && job.hard != kNoHardSum)
      label_logit = RowColumns<S, T, W>(job, ptx::opaque(r)).label_logit();
    const RowState<float> merged = merge_row(space, s, false, cluster, turn, row_temperatures(job, r));
    if (threadIdx.x < kWarp) {
      const GradientBasis<float> basis = finish_row(job, r, merged, row_temperatures(job, r), label_logit, thread == 0);
      if (threadIdx.x == 0) space.basis = basis;
    }
    __syncthreads();
    const RowColumns<S, T, W> again(job, ptx::opaque(r));
    const Share again_share = {thread_of_row(cluster), again.vectors, threads};
    const GradientOfRow<true, false, S, T, W> gradient(again, space.basis, row_temperatures(job, r));
    columns.each(again_share, [&](int i, int v) { gradient.vector(v, columns.y[i], columns.z[i]); });
    gradient.column(again.loose_column(again_share.first));
    gradient.out.store_padding(again_share.first, threads);
    turn ^= 1;
  }
  leave_cluster(cluster);
}

}  // namespace
}  // namespace cuda
}  // namespace eakd
