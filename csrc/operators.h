// What the operators on CPU tensors (cpu/ops.cpp) and on CUDA tensors (cuda/ops.cpp) have in common: arguments,
// schemas, and how the leading dimensions of a tensor become rows. The Python twin of every argument is
// eakd_kernels/ops.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>

namespace eakd {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define EAKD_ROW_PARAMETERS \
  const Tensor &student, const Tensor &teacher, const OptionalTensor &labels, const OptionalTensor &keep, \
      const OptionalTensor &temperatures, double temperature, double entropy_temperature, int64_t vocab_size, \
      at::ArrayRef<double> recipe, const OptionalTensor &class_bias
#define EAKD_ROW_ARGUMENTS \
  student, teacher, labels, keep, temperatures, temperature, entropy_temperature, vocab_size, recipe, class_bias
#define EAKD_RULE_PARAMETERS \
  const OptionalTensor &weights, int64_t weighting, double entropy_bound, double weight_scale, bool tau_squared, \
      double kd_weight, double ce_weight, double scale, const OptionalTensor &denominator
#define EAKD_UPSTREAM_PARAMETERS \
  const OptionalTensor &grad_divergence, const OptionalTensor &grad_student_entropy, \
      const OptionalTensor &grad_student_lse, const OptionalTensor &grad_cross_entropy

#define EAKD_ROW_SCHEMA \
  "Tensor student, Tensor teacher, Tensor? labels, Tensor? keep, Tensor? temperatures, float temperature, " \
  "float entropy_temperature, int vocab_size, float[] recipe, Tensor? class_bias, "

// `more`: schema of further arguments of this device, with a comma before.
#define EAKD_DEFINE_OPERATORS(m, more) \
  m.def("row_statistics(" EAKD_ROW_SCHEMA "bool temperature_slopes" more ") -> Tensor"); \
  m.def("row_gradient(" EAKD_ROW_SCHEMA \
        "Tensor statistics, Tensor? grad_divergence, Tensor? grad_student_entropy, Tensor? grad_student_lse, " \
        "Tensor? grad_cross_entropy, Tensor(a!) gradient" more ") -> ()"); \
  m.def("one_pass(" EAKD_ROW_SCHEMA \
        "Tensor? weights, int weighting, float entropy_bound, float weight_scale, bool tau_squared, float kd_weight, " \
        "float ce_weight, float scale, Tensor? denominator, Tensor(a!) gradient" more ") -> (Tensor, Tensor)")

// The leading dimensions as (outer, inner) with one stride each.
struct LeadingStrides {
  int64_t inner = 1, outer_stride = 0, inner_stride = 0;
};

// None if they need more than two strides.
inline std::optional<LeadingStrides> leading_strides(const Tensor& t) {
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0};  // innermost first
  int used = 0;
  for (int64_t i = t.dim() - 2; i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (used > 0 && t.stride(i) == strides[used - 1] * sizes[used - 1]) {
      sizes[used - 1] *= t.size(i);
    } else {
      if (used == 2) return std::nullopt;
      sizes[used] = t.size(i), strides[used] = t.stride(i), ++used;
    }
  }
  return LeadingStrides{sizes[0], strides[1], strides[0]};
}

// Where the strides are too many, the rows of a contiguous copy, which takes the place of `t`.
inline LeadingStrides rows_of(Tensor& t) {
  if (t.numel() == 0) return {};
  if (const auto found = leading_strides(t)) return *found;
  t = t.contiguous();
  return *leading_strides(t);
}

inline void check_rows(const Tensor& student, const Tensor& teacher, int64_t vocab_size) {
  TORCH_CHECK(
      student.dim() >= 1 && student.sizes().slice(0, student.dim() - 1) == teacher.sizes().slice(0, teacher.dim() - 1),
      "student and teacher must have the same rows");
  TORCH_CHECK(vocab_size >= 1 && vocab_size <= student.size(-1) && vocab_size <= teacher.size(-1), "vocab_size ",
              vocab_size, " is outside the logits' last dimension");
}

}  // namespace eakd
