// What the operators (ops.cpp) hand to the launchers (*.cu) and these, by value, to the kernels: raw pointers and
// numbers, nothing of torch. The CPU's twin is cpu/row_kernels.h.
#pragma once

#include <cstdint>

#include "../row_state.h"

namespace eakd {
namespace cuda {

// [rows, columns] behind at most two leading strides, all in elements. Row r is at (r / inner, r % inner).
struct Matrix {
  void* data = nullptr;
  int inner = 1;
  int64_t outer_stride = 0, inner_stride = 0, column_stride = 1;

  EAKD_HD int64_t offset(int row) const {
    if (inner == 1) return row * outer_stride;
    const int outer = row / inner;
    return outer * outer_stride + (row - outer * inner) * inner_stride;
  }
};

// One value a row, or (stride 0) one for all; null where there is none.
template <typename T>
struct PerRow {
  const T* data = nullptr;
  int64_t stride = 0;

  EAKD_HD T at(int row, T otherwise) const { return data == nullptr ? otherwise : data[row * stride]; }
};

// Where the sum of the hard-label cross-entropy comes from: one of the sums that are there, where a temperature is 1.
enum HardSum : int { kNoHardSum, kHardSumAtTau, kHardSumAtT, kOwnHardSum };

// Gradients of the four statistics that are differentiable in the student.
struct Upstream {
  PerRow<float> divergence, student_entropy, student_lse, cross_entropy;
};

struct RowJob {
  Matrix student, teacher, gradient;
  int rows = 0;
  int vocab_size = 0, gradient_columns = 0;  // columns past vocab_size get gradient 0
  bool gradient_vectors = false;             // gradient rows begin as the student's do, so vectors can be stored
  PerRow<int64_t> labels;
  PerRow<bool> keep;
  PerRow<float> temperatures;                // in the place of tau
  float tau = 1, t = 1, k_tau = 0, k_t = 0;  // Temperatures<float>
  // P tau = t: the exponentials at tau are powers of those at t (row_sums.cuh). P = 0: they are not.
  int P = 0;
  HardSum hard = kNoHardSum;
  bool slopes = false;  // fill B1, D1, Bbd

  // One pass: [kNumLossStatistics, rows]. Row statistics: [kNumStatistics or kNumStatisticsWithSlopes, rows].
  float* out = nullptr;
  LossRule rule{kWeightNone, false, 0, 0, 0, 0};
  PerRow<float> weights;
  float scale = 1;                     // loss = scale / denominator * sum over rows
  const float* denominator = nullptr;  // on the device

  // Row gradient: what the statistics were, and the gradients of the loss in them.
  const float* statistics = nullptr;
  Upstream upstream;

  // Where field `field` of a row is in [fields, rows].
  EAKD_HD int64_t at(int field, int row) const { return static_cast<int64_t>(field) * rows + row; }
};

}  // namespace cuda
}  // namespace eakd
