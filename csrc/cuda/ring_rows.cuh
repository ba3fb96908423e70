// One pass with the row pair in shared memory: a ring of stages, each with this CTA's slice of a row pair, filled by
// the copy engine while the CTA computes on the stages before. For rows too long for registers, and for GPUs that
// compute too slowly for two rows a processor to hide each other's loads.
//
// Slices are whole vectors; the columns before and after are read one by one, so that no copy touches foreign memory.
#pragma once

#include "stream_rows.cuh"

namespace eakd {
namespace cuda {
namespace {

constexpr int kRingBatch = 2;

struct RingSpace {
  MergeSpace merge;
  uint64_t full[kMostStages];  // completes when a stage has its slice
};
static_assert(sizeof(RingSpace) <= kRingSpace && kRingSpace % 128 == 0, "stages begin behind it, aligned");

// A CTA's part of every row: `vectors` of them, in stages behind one another.
template <typename S, typename T, int W>
struct Ring {
  unsigned char* slots;
  uint64_t* full;
  int vectors, stages;

  __device__ __forceinline__ S* student(int stage) const {
    return reinterpret_cast<S*>(slots + static_cast<int64_t>(stage) * vectors * W * (sizeof(S) + sizeof(T)));
  }
  __device__ __forceinline__ T* teacher(int stage) const { return reinterpret_cast<T*>(student(stage) + vectors * W); }

  // The slice of CTA `rank`: may be empty at the end of a short row.
  __device__ __forceinline__ Share slice(const RowColumns<S, T, W>& row, int rank) const {
    const int first = min(rank * vectors, row.vectors), end = min(first + vectors, row.vectors);
    return {first + static_cast<int>(threadIdx.x), end, static_cast<int>(blockDim.x)};
  }

  // By one thread: announce the bytes, then copy them. A row left out is not read and its stage completes at once.
  __device__ void fill(const RowJob& job, int r, int rank, int stage) const {
    if (r >= job.rows) return;
    const RowColumns<S, T, W> row(job, r);
    const int first = min(rank * vectors, row.vectors), end = min(first + vectors, row.vectors);
    const unsigned columns = job.keep.at(r, true) ? (end - first) * W : 0;
    ptx::barrier_expect_bytes(&full[stage], columns * (sizeof(S) + sizeof(T)));
    if (columns == 0) return;
    ptx::bulk_copy(student(stage), row.student + row.column(first), columns * sizeof(S), &full[stage]);
    ptx::bulk_copy(teacher(stage), row.teacher + row.column(first), columns * sizeof(T), &full[stage]);
  }
};

// The vectors of a slice, numbered as in the row.
template <typename S, typename T, int W>
struct SliceColumns {
  const S* student;
  const T* teacher;
  int first;

  template <Reading>
  __device__ __forceinline__ Packed<S, W> student_vector(int vector) const {
    return load<Reading::kAgain, S, W>(student + (vector - first) * W);
  }
  template <Reading>
  __device__ __forceinline__ Packed<T, W> teacher_vector(int vector) const {
    return load<Reading::kAgain, T, W>(teacher + (vector - first) * W);
  }
};

template <int P, typename S, typename T, int W>
__global__ void __launch_bounds__(kRingThreads, 1)
    ring_rows_kernel(const __grid_constant__ RowJob job, int cluster, int slice_vectors, int stages) {
  RingSpace& space = *reinterpret_cast<RingSpace*>(ptx::dynamic_shared());
  const Ring<S, T, W> ring = {ptx::dynamic_shared() + kRingSpace, space.full, slice_vectors, stages};
  const int rank = cluster > 1 ? ptx::cluster_rank() : 0;
  const int thread = thread_of_row(cluster), threads = cluster * blockDim.x;
  const int step = gridDim.x / cluster;
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i)
      ptx::barrier_init(&space.full[i], 1);
    ptx::barrier_init_fence();
    for (int i = 0; i < stages; ++i)
      ring.fill(job, blockIdx.x / cluster + i * step, rank, i);
  }
  __syncthreads();
  int stage = 0, parity = 0, turn = 0;
  for (int r = blockIdx.x / cluster; r < job.rows; r += step) {
    const RowColumns<S, T, W> row(job, r);
    ptx::barrier_wait(&space.full[stage], parity);
    if (job.keep.at(r, true)) {
      const Temperatures<float> k = row_temperatures(job, r);
      const Share share = ring.slice(row, rank);
      const SliceColumns<S, T, W> columns = {ring.student(stage), ring.teacher(stage),
                                             share.first - static_cast<int>(threadIdx.x)};
      const int loose = row.loose_column(thread);
      // Now, before the gradient may be written over it.
      const float label_logit = threadIdx.x < kWarp && job.hard != kNoHardSum ? row.label_logit() : 0.f;
      const RowState<float> s = swept_state<kRingBatch, Reading::kAgain, P>(job, columns, row, share, loose, k);
      const RowState<float> merged = merge_row(space.merge, s, false, cluster, turn, k);
      if (threadIdx.x < kWarp) {
        const GradientBasis<float> basis = finish_row(job, r, merged, k, label_logit, thread == 0);
        if (threadIdx.x == 0) space.merge.basis = basis;
      }
      __syncthreads();
      const GradientOfRow<true, false, S, T, W> gradient(row, space.merge.basis, k);
      for (int v = share.first; v < share.end; v += share.step)
        gradient.vector(v, columns.template teacher_vector<Reading::kOnce>(v),
                        columns.template student_vector<Reading::kOnce>(v));
      gradient.column(loose);
      gradient.out.store_padding(thread, threads);
      turn ^= 1;
    } else {
      GradientColumns<true, S, T, W>(row).store_nothing(thread, threads);
      if (thread == 0) store_no_fields(job, r, kNumLossStatistics);
    }
    __syncthreads();  // nobody reads this stage any more
    if (threadIdx.x == 0) ring.fill(job, r + stages * step, rank, stage);
    if (++stage == stages) stage = 0, parity ^= 1;
  }
  leave_cluster(cluster);
}

}  // namespace
}  // namespace cuda
}  // namespace eakd
