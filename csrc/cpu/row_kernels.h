// What the operators (ops.cpp) hand to the kernels of one instruction set (row_kernels_impl.h), and back.
#pragma once

#include <cstdint>

#include "../row_state.h"

namespace eakd {
namespace {

// Columns are summed block by block and states merged segment by segment. Both are fixed for an instruction set, so
// results do not depend on how the segments were shared among threads.
constexpr int64_t kTermsPerLane = 128, kSmallestBlock = 4 * kTermsPerLane, kSegment = 16384;

enum class Storage { kFloat, kDouble, kBFloat16, kHalf };

// [rows, vocab] logits behind at most two leading strides, all in elements. Row r is at (r / inner, r % inner).
struct LogitsView {
  char* data = nullptr;
  Storage storage = Storage::kFloat;
  int64_t inner = 1, outer_stride = 0, inner_stride = 0, vocab_stride = 1, item_bytes = 4;

  char* at(int64_t row, int64_t column) const {
    return data + ((row / inner) * outer_stride + (row % inner) * inner_stride + column * vocab_stride) * item_bytes;
  }
};

struct RowJob {
  LogitsView student, teacher, gradient;
  int64_t rows = 0, vocab_size = 0, gradient_columns = 0;  // columns past vocab_size get gradient 0
  const int64_t* labels = nullptr;                         // [rows]; null: no cross-entropy
  const bool* keep = nullptr;                              // [rows]; null: all
  bool temperature_slopes = false;                         // fill B1, D1, Bbd
  bool gradient_over_student = false;
  bool gradient_past_caches = false;  // it is large, and the rows in work have the caches

  bool kept(int64_t row) const { return keep == nullptr || keep[row]; }
  int64_t segments() const { return (vocab_size + kSegment - 1) / kSegment; }
};

// Where one row lies.
struct RowPair {
  const char *teacher, *student;
  char* gradient;
  int64_t label;  // -1: none

  RowPair(const RowJob& job, int64_t row)
      : teacher(job.teacher.at(row, 0)),
        student(job.student.at(row, 0)),
        gradient(job.gradient.data == nullptr ? nullptr : job.gradient.at(row, 0)),
        label(job.labels == nullptr ? -1 : job.labels[row]) {}
};

// The exponentials at tau of a whole row, kept between its statistics and its gradient, each block relative to its own
// maxima. A megabyte or two that stays in the second-level cache costs less than computing them again.
template <typename T>
struct KeptExponentials {
  T *teacher, *student;          // [vocab_size, rounded up to whole vectors]
  T *teacher_max, *student_max;  // [blocks]
};
constexpr int64_t kMaxKeptColumns = 1 << 18;

// T is the arithmetic type of the columns; states are double throughout, so that only the lanes of a block round.
template <typename T>
struct RowKernels {
  // `kept` may be null; the gradient needs what the state of the same segment left there.
  RowState<double> (*segment_state)(const RowJob&, const RowPair&, const Temperatures<double>&, int64_t segment,
                                    const KeptExponentials<T>* kept);
  void (*segment_gradient)(const RowJob&, const RowPair&, const Temperatures<double>&, const GradientBasis<double>&,
                           int64_t segment, const KeptExponentials<T>* kept);
};

}  // namespace

// One per instruction set that the compiler targeted; null where it is not of this architecture.
struct KernelTables {
  const char* name;
  const void* fp32;         // RowKernels<float>
  const void* fp64;         // RowKernels<double>
  const void* recipe_fp32;  // RecipeKernels<float>
  const void* recipe_fp64;  // RecipeKernels<double>
};
KernelTables kernels_default();
KernelTables kernels_avx2();
KernelTables kernels_avx512();

}  // namespace eakd
