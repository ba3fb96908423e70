// The student's gradient from the statistics of its rows and the gradients in them: a warp takes a stretch of a row.
#pragma once

#include "row_result.cuh"
#include "shapes.h"

namespace eakd {
namespace cuda {
namespace {

constexpr int kGradientBatch = 4;  // vectors of a stretch that are under way together

__device__ __forceinline__ GradientBasis<float> saved_basis(const RowJob& job, int row, const Temperatures<float>& k) {
  const auto field = [&](Field f) { return job.statistics[job.at(f, row)]; };
  const Upstream& g = job.upstream;
  return prepared(gradient_basis(field(kTeacherMax), field(kStudentMax), field(kTeacherSum), field(kStudentSum),
                                 field(kStudentEntropySum), field(kStudentHardSum), field(kStudentEntropy), k,
                                 g.divergence.at(row, 0), g.student_entropy.at(row, 0), g.student_lse.at(row, 0),
                                 g.cross_entropy.at(row, 0)),
                  job.hard);
}

__device__ __forceinline__ int64_t warp_of_grid() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}

template <bool ENTROPY, typename S, typename T, int W>
__global__ void __launch_bounds__(kGradientThreads) row_gradient_kernel(const __grid_constant__ RowJob job) {
  const int parts = stretches(job.gradient_columns, W), lane = threadIdx.x % kWarp;
  const int64_t warp = warp_of_grid();
  if (warp >= static_cast<int64_t>(job.rows) * parts) return;
  const int r = static_cast<int>(warp / parts), part = static_cast<int>(warp % parts);
  const int thread = part * kWarp + lane, threads = parts * kWarp;
  const RowColumns<S, T, W> row(job, r);
  if (!job.keep.at(r, true)) {
    GradientColumns<false, S, T, W>(row).store_nothing(thread, threads);
    return;
  }
  const Temperatures<float> k = row_temperatures(job, r);
  const GradientBasis<float> basis = saved_basis(job, r, k);
  const GradientOfRow<false, ENTROPY, S, T, W> gradient(row, basis, k);
  const int begin = part * kStretch * kWarp + lane;
#pragma unroll 1
  for (int first = begin; first < begin + kStretch * kWarp; first += kGradientBatch * kWarp) {
    Packed<T, W> y[kGradientBatch];
    Packed<S, W> z[kGradientBatch];
#pragma unroll
    for (int i = 0; i < kGradientBatch; ++i) {
      const int v = first + i * kWarp;
      if (v >= row.vectors) break;
      z[i] = row.template student_vector<Reading::kOnce>(v), y[i] = row.template teacher_vector<Reading::kOnce>(v);
    }
#pragma unroll
    for (int i = 0; i < kGradientBatch; ++i) {
      const int v = first + i * kWarp;
      if (v >= row.vectors) break;
      gradient.vector(v, y[i], z[i]);
    }
  }
  gradient.column(row.loose_column(thread));
  gradient.out.store_padding(thread, threads);
}

// out = factor * gradient, for a factor that lives on the device. Both may be the same memory, and then a factor of
// exactly 1 leaves it alone: the grid is small, so that this costs next to nothing.
template <typename S, int W>
__global__ void __launch_bounds__(kGradientThreads)
    scale_kernel(const __grid_constant__ RowJob job, const float* factor, bool in_place) {
  const float scale = *factor;
  if (in_place && scale == 1.f) return;
  const int lane = threadIdx.x % kWarp, parts = stretches(job.gradient_columns, W);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  for (int64_t i = warp_of_grid(); i < static_cast<int64_t>(job.rows) * parts; i += warps) {
    const int part = static_cast<int>(i % parts);
    const RowColumns<S, S, W> row(job, static_cast<int>(i / parts));
    const GradientColumns<false, S, S, W> out(row);
#pragma unroll 4
    for (int j = 0; j < kStretch; ++j) {
      const int v = (part * kStretch + j) * kWarp + lane;
      if (v >= row.vectors) break;
      const Packed<S, W> given = row.template student_vector<Reading::kOnce>(v);
      float g[W];
#pragma unroll
      for (int c = 0; c < W; ++c)
        g[c] = scale * given[c];
      out.store_vector(v, g);
    }
    const int loose = row.loose_column(part * kWarp + lane);
    if (loose >= 0) out.store_column(loose, scale * row.student_at(loose));
  }
}

// total = scale / denominator * sum of `values`, by one block and in a fixed order.
__global__ void __launch_bounds__(1024)
    total_kernel(const float* values, int64_t count, float scale, const float* denominator, float* total) {
  double* sums = reinterpret_cast<double*>(ptx::dynamic_shared());
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x)
    sum += values[i];
  sums[threadIdx.x] = sum;
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *total = static_cast<float>(sums[0] * (denominator == nullptr ? scale : scale / *denominator));
}

}  // namespace
}  // namespace cuda
}  // namespace eakd
