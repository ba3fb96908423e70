// From the states of threads to that of the row: warps by shuffles, CTAs through shared memory, clusters through each
// other's. Every tree is fixed and there are no atomics, so the same bits come out every time; and every CTA of a
// cluster merges the same states in the same order, so that all of them go on with the same row.
#pragma once

#include "row_sums.cuh"
#include "shapes.h"

namespace eakd {
namespace cuda {
namespace {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kStateFloats = 13;

template <int LANES>
__device__ __forceinline__ float largest_of(float x) {
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, offset));
  return x;
}

// Every lane has the sum: addition commutes, so a tree of exchanges gives all of them the same bits.
template <int LANES>
__device__ __forceinline__ float sum_of(float x) {
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2)
    x += __shfl_xor_sync(kWholeWarp, x, offset);
  return x;
}

// Eight sums over a warp in 9 shuffles instead of 40: half of the values change sides at each of the first steps. Lane
// l has the sum of value l / 4.
__device__ __forceinline__ float transposed_sum(const float (&values)[8]) {
  const unsigned lane = threadIdx.x % kWarp;
  float half[4], quarter[2];
  const bool high = lane & 16, odd_pair = lane & 8, odd = lane & 4;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    half[i] = (high ? values[i + 4] : values[i]) + __shfl_xor_sync(kWholeWarp, high ? values[i] : values[i + 4], 16);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    quarter[i] = (odd_pair ? half[i + 2] : half[i]) + __shfl_xor_sync(kWholeWarp, odd_pair ? half[i] : half[i + 2], 8);
  float sum = (odd ? quarter[1] : quarter[0]) + __shfl_xor_sync(kWholeWarp, odd ? quarter[0] : quarter[1], 4);
  sum += __shfl_xor_sync(kWholeWarp, sum, 2);
  return sum + __shfl_xor_sync(kWholeWarp, sum, 1);
}

// States of LANES lanes about the same maxima, summed into all of them.
template <int LANES>
__device__ __forceinline__ void add_up(RowState<float>& s, bool slopes) {
  s.A0 = sum_of<LANES>(s.A0), s.A1 = sum_of<LANES>(s.A1), s.E0 = sum_of<LANES>(s.E0), s.E1 = sum_of<LANES>(s.E1);
  s.B0 = sum_of<LANES>(s.B0), s.Bd = sum_of<LANES>(s.Bd), s.D0 = sum_of<LANES>(s.D0), s.F0 = sum_of<LANES>(s.F0);
  if (slopes) s.B1 = sum_of<LANES>(s.B1), s.D1 = sum_of<LANES>(s.D1), s.Bbd = sum_of<LANES>(s.Bbd);
}

// This thread's number among those of the row.
__device__ __forceinline__ int thread_of_row(int cluster) {
  return (cluster > 1 ? ptx::cluster_rank() * blockDim.x : 0) + threadIdx.x;
}

// All threads of all CTAs, and of every warp together: the barrier's instructions are of whole warps.
__device__ __forceinline__ void meet_cluster() {
  __syncwarp();
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// What a CTA has in shared memory for merging.
struct MergeSpace {
  float warps[kMaxWarps][kStateFloats];
  float own[2][kStateFloats];  // by turns, so that a row need not wait until the one before was read everywhere
  GradientBasis<float> basis;
};

__device__ __forceinline__ RowState<float> load_state(const float* p) {
  RowState<float> s;
  s.A0 = p[0], s.A1 = p[1], s.E0 = p[2], s.E1 = p[3], s.B0 = p[4], s.Bd = p[5], s.D0 = p[6], s.F0 = p[7];
  s.My = p[8], s.Mz = p[9], s.B1 = p[10], s.D1 = p[11], s.Bbd = p[12];
  return s;
}

__device__ __forceinline__ void store_state(float* p, const RowState<float>& s) {
  p[0] = s.A0, p[1] = s.A1, p[2] = s.E0, p[3] = s.E1, p[4] = s.B0, p[5] = s.Bd, p[6] = s.D0, p[7] = s.F0;
  p[8] = s.My, p[9] = s.Mz, p[10] = s.B1, p[11] = s.D1, p[12] = s.Bbd;
}

// The state of a warp, whose lanes are about the same maxima, into `p`.
__device__ __forceinline__ void store_warp_state(float* p, const RowState<float>& s, bool slopes) {
  const int lane = threadIdx.x % kWarp;
  const float sum = transposed_sum({s.A0, s.A1, s.E0, s.E1, s.B0, s.Bd, s.D0, s.F0});
  if (lane % 4 == 0) p[lane / 4] = sum;
  float slope = 0;
  if (slopes) slope = transposed_sum({s.B1, s.D1, s.Bbd, 0, 0, 0, 0, 0});
  if (lane % 4 == 0 && lane < 12) p[10 + lane / 4] = slope;
  if (lane == 0) p[8] = s.My, p[9] = s.Mz;
}

// Each lane's state, or an empty one, merged into all lanes.
__device__ __forceinline__ RowState<float> merge_lanes(RowState<float> s, bool slopes, const Temperatures<float>& k) {
  s.recentre(largest_of<kWarp>(s.My), largest_of<kWarp>(s.Mz), k);
  add_up<kWarp>(s, slopes);
  return s;
}

// The state of the row in every lane of warp 0 of every CTA; other warps get nothing. `turn` alternates from row to
// row. All threads of the cluster take part.
__device__ RowState<float> merge_row(MergeSpace& space, const RowState<float>& s, bool slopes, int cluster, int turn,
                                     const Temperatures<float>& k) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  store_warp_state(space.warps[warp], s, slopes);
  __syncthreads();
  RowState<float> merged;
  if (warp == 0) {
    if (lane < warps) merged = load_state(space.warps[lane]);
    merged = merge_lanes(merged, slopes, k);
    if (cluster > 1 && lane == 0) store_state(space.own[turn], merged);
  }
  if (cluster > 1) {
    meet_cluster();
    if (warp == 0) {
      merged = RowState<float>();
      if (lane < cluster) {
        float p[kStateFloats];
#pragma unroll
        for (int i = 0; i < kStateFloats; ++i)
          p[i] = ptx::load_remote(&space.own[turn][i], lane);
        merged = load_state(p);
      }
      merged = merge_lanes(merged, slopes, k);
    }
  }
  return merged;
}

// Before a CTA of a cluster ends: others may still be reading its state.
__device__ __forceinline__ void leave_cluster(int cluster) {
  if (cluster > 1) meet_cluster();
}

}  // namespace
}  // namespace cuda
}  // namespace eakd
