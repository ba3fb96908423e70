// Rows of any length, read from memory in vectors, or one by one where the two do not begin alike or columns are not
// neighbours. Row statistics are one sweep. One pass is two: the second backwards, so that it begins with what the L2
// still holds; three reads and writes of [rows, vocab] where a row pair stays there, five where it does not.
#pragma once

#include "merge.cuh"
#include "row_result.cuh"

namespace eakd {
namespace cuda {
namespace {

// Vectors of each side that a thread has under way; fewer would not keep memory busy. Two CTAs fit a processor.
constexpr int kBatch = 4;
// Columns that a thread adds up before it merges.
constexpr int kMostTerms = 4096;

template <typename T, int W>
__device__ __forceinline__ float largest_in(const Packed<T, W>& values) {
  Largest<T> top;
  top.add(values);
  return top.value();
}

// Sums over a share of columns that are read again for the gradient, from memory or (ring_rows.cuh) shared memory.
template <int BATCH, Reading READING, int P, typename Columns>
__device__ __forceinline__ void sweep(FastSums<P>& sums, const Columns& columns, const Share& share,
                                      bool own_hard_sum) {
  for (int first = share.first; first < share.end; first += BATCH * share.step) {
    decltype(columns.template teacher_vector<READING>(0)) y[BATCH];
    decltype(columns.template student_vector<READING>(0)) z[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int v = first + i * share.step;
      if (v < share.end)
        z[i] = columns.template student_vector<READING>(v), y[i] = columns.template teacher_vector<READING>(v);
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (first + i * share.step >= share.end) break;
      sums.follow(largest_in(y[i]), largest_in(z[i]));
      sums.add(y[i], z[i], own_hard_sum);
    }
  }
}

// The state of a share of columns and of a loose one, about the maxima of the warp, all of whose lanes take part.
template <int BATCH, Reading READING, int P, typename Columns, typename S, typename T, int W>
__device__ RowState<float> swept_state(const RowJob& job, const Columns& columns, const RowColumns<S, T, W>& row,
                                       const Share& share, int loose, const Temperatures<float>& k) {
  FastSums<P> sums(k, job.hard);
  Largest<T> top_y;
  Largest<S> top_z;
  if (share.first < share.end) {
    top_y.add(columns.template teacher_vector<READING>(share.first));
    top_z.add(columns.template student_vector<READING>(share.first));
  }
  if (loose >= 0) top_y.add(row.teacher_at(loose)), top_z.add(row.student_at(loose));
  float my = largest_of<kWarp>(top_y.value()), mz = largest_of<kWarp>(top_z.value());
  sums.start(my, mz);
  if (!job.slopes) {
    sweep<BATCH, READING>(sums, columns, share, job.hard == kOwnHardSum);
    if (loose >= 0) {
      const float y = row.teacher_at(loose), z = row.student_at(loose);
      sums.follow(y, z);
      sums.add_column(y, z);
    }
  }
  const bool guarded = job.slopes || sums.was_too_fast();
  RowState<float> s;
  if (guarded) s = guarded_sums(job, row, share, loose, k);
  my = largest_of<kWarp>(guarded ? s.My : sums.s.My), mz = largest_of<kWarp>(guarded ? s.Mz : sums.s.Mz);
  if (!guarded) return sums.about(my, mz, job.hard);
  s.recentre(my, mz, k);
  return s;
}

// Two levels of sums: shares of at most kMostTerms columns, merged. All threads of the row have as many of them.
template <Reading READING, int P, typename S, typename T, int W>
__device__ RowState<float> streamed_state(const RowJob& job, const RowColumns<S, T, W>& row, int thread, int threads,
                                          const Temperatures<float>& k) {
  const int loose = row.loose_column(thread);
  const int64_t part = static_cast<int64_t>(kMostTerms / W) * threads;
  RowState<float> total;
  for (int64_t begin = 0; begin == 0 || begin < row.vectors; begin += part) {
    const int64_t end = begin + part < row.vectors ? begin + part : row.vectors;
    const Share share = {static_cast<int>(begin + thread), static_cast<int>(end), threads};
    const RowState<float> s = swept_state<kBatch, READING, P>(job, row, row, share, begin == 0 ? loose : -1, k);
    if (begin == 0)
      total = s;
    else
      total.merge(s, k);
  }
  // Parts have maxima of their own, the same for every lane.
  return total;
}

// The share of `thread`, last vector first.
template <bool ENTROPY, typename S, typename T, int W>
__device__ __forceinline__ void stream_gradient(const RowColumns<S, T, W>& row,
                                                const GradientOfRow<false, ENTROPY, S, T, W>& gradient, int thread,
                                                int threads) {
  const int count = thread < row.vectors ? (row.vectors - thread - 1) / threads + 1 : 0;
  for (int last = thread + (count - 1) * threads; last >= 0; last -= kBatch * threads) {
    Packed<T, W> y[kBatch];
    Packed<S, W> z[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int v = last - i * threads;
      if (v >= 0)
        z[i] = row.template student_vector<Reading::kOnce>(v), y[i] = row.template teacher_vector<Reading::kOnce>(v);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (last - i * threads >= 0) gradient.vector(last - i * threads, y[i], z[i]);
  }
  gradient.column(row.loose_column(thread));
  gradient.out.store_padding(thread, threads);
}

template <bool ONE_PASS, int P, typename S, typename T, int W>
__global__ void __launch_bounds__(kStreamThreads, 2)
    stream_rows_kernel(const __grid_constant__ RowJob job, int cluster) {
  MergeSpace& space = *reinterpret_cast<MergeSpace*>(ptx::dynamic_shared());
  const int thread = thread_of_row(cluster), threads = cluster * blockDim.x;
  int turn = 0;
  for (int r = blockIdx.x / cluster; r < job.rows; r += gridDim.x / cluster) {
    const RowColumns<S, T, W> row(job, r);
    if (!job.keep.at(r, true)) {
      if (ONE_PASS) GradientColumns<false, S, T, W>(row).store_nothing(thread, threads);
      if (thread == 0) store_no_fields(job, r, ONE_PASS ? int(kNumLossStatistics) : fields_of_statistics(job));
      continue;
    }
    const Temperatures<float> k = row_temperatures(job, r);
    // Now, before the gradient may be written over it.
    const float label_logit = threadIdx.x < kWarp && job.hard != kNoHardSum ? row.label_logit() : 0.f;
    constexpr Reading kReading = ONE_PASS ? Reading::kAgain : Reading::kOnce;
    const RowState<float> s = streamed_state<kReading, P>(job, row, thread, threads, k);
    const RowState<float> merged = merge_row(space, s, job.slopes, cluster, turn, k);
    if (!ONE_PASS && thread == 0) store_statistics(job, r, merged, k, label_logit);
    if (ONE_PASS && threadIdx.x < kWarp) {
      const GradientBasis<float> basis = finish_row(job, r, merged, k, label_logit, thread == 0);
      if (threadIdx.x == 0) space.basis = basis;
    }
    __syncthreads();
    if (ONE_PASS) { stream_gradient(row, GradientOfRow<false, false, S, T, W>(row, space.basis, k), thread, threads); }
    turn ^= 1;
  }
  leave_cluster(cluster);
}

}  // namespace
}  // namespace cuda
}  // namespace eakd
