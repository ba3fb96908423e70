// The three operators on CPU tensors: check, take raw pointers, share the rows out.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <sys/mman.h>

#include <tuple>

#include "../operators.h"
#include "recipe_rows.h"
#include "rows.h"

namespace eakd {
namespace {

// ---- tensors -> views --------------------------------------------------------------------------------------------

Storage storage_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Storage::kFloat;
    case at::kDouble: return Storage::kDouble;
    case at::kBFloat16: return Storage::kBFloat16;
    case at::kHalf: return Storage::kHalf;
    default: TORCH_CHECK(false, "logits must be float64, float32, bfloat16 or float16, got ", t.scalar_type());
  }
}

// Makes `t` contiguous where its leading dimensions need more than two strides; the caller keeps it alive.
LogitsView view(Tensor& t) {
  const LeadingStrides rows = rows_of(t);
  LogitsView v;
  v.inner = rows.inner, v.outer_stride = rows.outer_stride, v.inner_stride = rows.inner_stride;
  v.data = static_cast<char*>(t.data_ptr());
  v.storage = storage_of(t);
  v.item_bytes = t.element_size();
  v.vocab_stride = t.size(-1) > 1 ? t.stride(-1) : 1;
  return v;
}

// ---- the arguments that all operators share ----------------------------------------------------------------------

struct Rows {
  Tensor student, teacher, labels, keep, temperature_values, gradient;  // what `job` points into
  RowJob job;
  const double* row_temperatures = nullptr;
  double tau, t;
  std::optional<Recipe> recipe;
  Tensor class_bias;
  std::vector<int64_t> leading;

  Rows(const Tensor& student_, const Tensor& teacher_, const OptionalTensor& labels_, const OptionalTensor& keep_,
       const OptionalTensor& temperatures_, double temperature, double entropy_temperature, int64_t vocab_size,
       at::ArrayRef<double> recipe_, const OptionalTensor& class_bias_)
      : student(student_), teacher(teacher_), tau(temperature), t(entropy_temperature) {
    check_rows(student, teacher, vocab_size);
    leading = student.sizes().slice(0, student.dim() - 1).vec();
    job.rows = c10::multiply_integers(leading);
    job.vocab_size = vocab_size;
    job.student = view(student);
    job.teacher = view(teacher);
    job.labels = per_row<int64_t>(labels_, at::kLong, labels);
    job.keep = per_row<bool>(keep_, at::kBool, keep);
    row_temperatures = per_row<double>(temperatures_, at::kDouble, temperature_values);
    if (recipe_.empty()) return;
    TORCH_CHECK(recipe_.size() >= 10 && recipe_.size() <= 8 + 2 * kMostTemperatures, "a recipe of ", recipe_.size(),
                " numbers is none");
    recipe = Recipe::parse(recipe_);
    if (class_bias_.has_value()) class_bias = class_bias_->to(at::kDouble).contiguous();
  }

  RecipeJob recipe_job(const RowTemperatures& temperatures, bool slopes) const {
    RecipeJob made{job, temperatures, *recipe, t};
    made.slopes = slopes, made.per_row = row_temperatures != nullptr;
    if (class_bias.defined()) made.class_bias = class_bias.const_data_ptr<double>();
    return made;
  }

  RowTemperatures temperatures() const { return RowTemperatures(row_temperatures, tau, t); }

  // A pointer to one value a row; a 0-d tensor serves every row.
  template <typename T>
  const T* per_row(const OptionalTensor& given, at::ScalarType type, Tensor& holder) const {
    if (!given.has_value()) return nullptr;
    holder = given->to(type).expand(leading).contiguous();
    return holder.const_data_ptr<T>();
  }

  bool is_double() const { return job.student.storage == Storage::kDouble || job.teacher.storage == Storage::kDouble; }

  at::TensorOptions options() const { return student.options().dtype(is_double() ? at::kDouble : at::kFloat); }

  Tensor new_statistics(int64_t fields) const {
    std::vector<int64_t> sizes = {fields};
    sizes.insert(sizes.end(), leading.begin(), leading.end());
    return at::zeros(sizes, options());
  }

  void set_gradient(const Tensor& gradient_) {
    gradient = gradient_;
    job.gradient = view(gradient);
    TORCH_CHECK(gradient.data_ptr() == gradient_.data_ptr(), "the gradient needs at most two leading strides");
    job.gradient_columns = gradient.size(-1);
    job.gradient_over_student = gradient.data_ptr() == student.data_ptr();
    // Measured: from 2 MB on, rows in work need the caches more than whoever reads the gradient next.
    constexpr size_t kLargerThanCaches = 2 << 20;
    job.gradient_past_caches = !job.gradient_over_student && gradient.nbytes() > kLargerThanCaches;
    if (!job.gradient_over_student) advise_huge_pages();
  }

  // Half of the time of a large fresh buffer goes into page faults; huge pages have 512 times fewer.
  void advise_huge_pages() const {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHugePage = 2 << 20;
    const auto begin = reinterpret_cast<uintptr_t>(gradient.data_ptr());
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = (begin + gradient.nbytes()) / kHugePage * kHugePage;
    if (gradient.is_contiguous() && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  }

  double label_logit(int64_t row) const {
    if (job.labels == nullptr) return 0;
    const int64_t label = job.labels[row];
    if (label < 0 || label >= job.vocab_size) return NAN;
    const char* p = job.student.at(row, label);
    switch (job.student.storage) {
      case Storage::kFloat: return *reinterpret_cast<const float*>(p);
      case Storage::kDouble: return *reinterpret_cast<const double*>(p);
      case Storage::kBFloat16: return *reinterpret_cast<const c10::BFloat16*>(p);
      case Storage::kHalf: return *reinterpret_cast<const c10::Half*>(p);
    }
    return NAN;
  }
};

// ---- row statistics ----------------------------------------------------------------------------------------------

template <typename T>
RowResult<double> finish_row(const Rows& rows, int64_t row, const RowState<double>& state,
                             const Temperatures<double>& k, T* out) {
  const RowResult<double> r = finish(state, k, rows.label_logit(row));
  const int64_t stride = rows.job.rows;
  out += row;
  out[kDivergence * stride] = r.divergence;
  out[kTeacherEntropy * stride] = r.teacher_entropy, out[kStudentEntropy * stride] = r.student_entropy;
  out[kTeacherLse * stride] = r.teacher_lse, out[kStudentLse * stride] = r.student_lse;
  if (rows.job.labels != nullptr) out[kCrossEntropy * stride] = r.cross_entropy;
  return r;
}

template <typename T>
void compute_statistics(const Rows& rows, T* out) {
  const int64_t stride = rows.job.rows;
  const RowTemperatures temperatures = rows.temperatures();
  visit_states<T>(rows.job, temperatures, [&](int64_t row, const RowState<double>& s) {
    const RowResult<double> r = finish_row(rows, row, s, temperatures.at(row), out);
    const double saved[] = {s.My, s.Mz, s.B0, s.D0, s.E0, s.F0, s.A0};
    for (int i = 0; i < kNumStatistics - kTeacherMax; ++i)
      out[(kTeacherMax + i) * stride + row] = T(saved[i]);
    if (!rows.job.temperature_slopes) return;
    out[kDivergenceSlope * stride + row] = r.divergence_slope;
    out[kStudentLseSlope * stride + row] = r.student_lse_slope;
  });
}

// visit(row, the thread's RecipeRow at it) for every row kept.
template <typename T, typename Visit>
void visit_recipe_rows(const RecipeJob& job, const Visit& visit) {
  share_out(job.rows.rows, row_grain(job.rows), [&](const auto& each) {
    RecipeRow<T> opened(job);
    each([&](int64_t row) {
      if (!job.rows.kept(row)) return;
      opened.open(row);
      visit(row, opened);
    });
  });
}

template <typename T>
void compute_recipe_statistics(const Rows& rows, bool slopes, T* out) {
  const RowTemperatures temperatures = rows.temperatures();
  const RecipeJob job = rows.recipe_job(temperatures, slopes);
  visit_recipe_rows<T>(job, [&](int64_t row, RecipeRow<T>& opened) {
    const RecipeNumbers<double> numbers = opened.statistics();
    int field = 0;
    const auto put = [&](double value) { out[field++ * rows.job.rows + row] = T(value); };
    for (const double value : numbers.common)
      put(value);
    for (int k = 0; k < job.recipe.count; ++k)
      for (const double value : numbers.tau[k])
        put(value);
    if (slopes) put(numbers.divergence_slope), put(numbers.student_lse_slope);
  });
}

Tensor row_statistics(EAKD_ROW_PARAMETERS, bool temperature_slopes) {
  Rows rows(EAKD_ROW_ARGUMENTS);
  rows.job.temperature_slopes = temperature_slopes;
  const int plain = temperature_slopes ? kNumStatisticsWithSlopes : kNumStatistics;
  Tensor out = rows.new_statistics(rows.recipe ? rows.recipe->fields(temperature_slopes) : plain);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    if (rows.recipe)
      compute_recipe_statistics(rows, temperature_slopes, out.data_ptr<T>());
    else
      compute_statistics(rows, out.data_ptr<T>());
  };
  if (rows.is_double())
    run(double());
  else
    run(float());
  return out;
}

// ---- gradient from row coefficients ------------------------------------------------------------------------------

template <typename T>
void compute_gradient(const Rows& rows, const T* statistics, const T* const upstream[4]) {
  const int64_t stride = rows.job.rows;
  const RowTemperatures temperatures = rows.temperatures();
  write_gradient<T>(rows.job, temperatures, [&](int64_t row) {
    const auto saved = [&](Field field) { return double(statistics[field * stride + row]); };
    const auto g = [&](int i) { return upstream[i] == nullptr ? 0.0 : double(upstream[i][row]); };
    return gradient_basis<double>(saved(kTeacherMax), saved(kStudentMax), saved(kTeacherSum), saved(kStudentSum),
                                  saved(kStudentEntropySum), saved(kStudentHardSum), saved(kStudentEntropy),
                                  temperatures.at(row), g(0), g(1), g(2), g(3));
  });
}

template <typename T>
void compute_recipe_gradient(const Rows& rows, const T* statistics, const T* const upstream[4]) {
  const RowTemperatures temperatures = rows.temperatures();
  const RecipeJob job = rows.recipe_job(temperatures, false);
  write_zeros(rows.job);
  visit_recipe_rows<T>(job, [&](int64_t row, RecipeRow<T>& opened) {
    RecipeNumbers<double> numbers;
    int field = 0;
    const auto next = [&] { return double(statistics[field++ * rows.job.rows + row]); };
    for (double& value : numbers.common)
      value = next();
    for (int k = 0; k < job.recipe.count; ++k)
      for (double& value : numbers.tau[k])
        value = next();
    const auto g = [&](int i) { return upstream[i] == nullptr ? 0.0 : double(upstream[i][row]); };
    opened.write_gradient(numbers.common, numbers.tau, {g(0), g(1), g(2), g(3)});
  });
}

void row_gradient(EAKD_ROW_PARAMETERS, const Tensor& statistics, EAKD_UPSTREAM_PARAMETERS, const Tensor& gradient) {
  Rows rows(EAKD_ROW_ARGUMENTS);
  rows.set_gradient(gradient);
  Tensor holders[4];
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const OptionalTensor* given[4] = {&grad_divergence, &grad_student_entropy, &grad_student_lse, &grad_cross_entropy};
    const T* upstream[4];
    for (int i = 0; i < 4; ++i)
      upstream[i] = rows.per_row<T>(*given[i], rows.options().dtype().toScalarType(), holders[i]);
    const Tensor saved = statistics.contiguous();
    if (rows.recipe)
      compute_recipe_gradient<T>(rows, saved.const_data_ptr<T>(), upstream);
    else
      compute_gradient<T>(rows, saved.const_data_ptr<T>(), upstream);
  };
  if (rows.is_double())
    run(double());
  else
    run(float());
}

// ---- one pass ----------------------------------------------------------------------------------------------------

template <typename T>
void compute_loss(const Rows& rows, const LossRule& rule, const T* weights, double scale, T* out) {
  const RowJob& job = rows.job;
  const RowTemperatures temperatures = rows.temperatures();
  write_gradient_in_one_pass<T>(job, temperatures, [&](int64_t row, const RowState<double>& s) {
    const Temperatures<double> k = temperatures.at(row);
    const RowResult<double> r = finish_row(rows, row, s, k, out);
    const RowLoss<double> loss = row_loss(r, k, rule, weights == nullptr ? 1.0 : double(weights[row]));
    out[kWeight * job.rows + row] = loss.weight, out[kLoss * job.rows + row] = loss.loss;
    return gradient_basis<double>(s.My, s.Mz, s.B0, s.D0, s.E0, s.F0, r.student_entropy, k,
                                  loss.divergence_factor * scale, 0, 0, rule.ce_weight * scale);
  });
}

// A recipe's row loss and the factors of its gradient are those of row_state.h, with its own statistics in them.
template <typename T>
void compute_recipe_loss(const Rows& rows, const LossRule& rule, const T* weights, double scale, T* out) {
  const RowTemperatures temperatures = rows.temperatures();
  const RecipeJob job = rows.recipe_job(temperatures, false);
  write_zeros(rows.job);
  visit_recipe_rows<T>(job, [&](int64_t row, RecipeRow<T>& opened) {
    const RecipeNumbers<double> numbers = opened.statistics();
    for (int field = 0; field < 6; ++field)
      out[field * rows.job.rows + row] = T(numbers.common[field]);
    const double* c = numbers.common;
    const RowResult<double> r = {c[0], c[1], c[2], c[3], c[4], c[5], 0, 0};
    const RowLoss<double> loss =
        row_loss(r, temperatures.at(row), rule, weights == nullptr ? 1.0 : double(weights[row]));
    out[kWeight * rows.job.rows + row] = loss.weight, out[kLoss * rows.job.rows + row] = loss.loss;
    opened.write_gradient(c, numbers.tau, {loss.divergence_factor * scale, 0, 0, rule.ce_weight * scale});
  });
}

template <typename T>
double total_loss(const Rows& rows, double scale, const T* out) {
  double total = 0;  // in row order, so that the sum does not depend on the threads
  for (int64_t row = 0; row < rows.job.rows; ++row)
    total += out[kLoss * rows.job.rows + row];
  return total * scale;
}

std::tuple<Tensor, Tensor> one_pass(EAKD_ROW_PARAMETERS, EAKD_RULE_PARAMETERS, const Tensor& gradient) {
  Rows rows(EAKD_ROW_ARGUMENTS);
  rows.set_gradient(gradient);
  const LossRule rule{
      static_cast<Weighting>(weighting), tau_squared, entropy_bound, weight_scale, kd_weight, ce_weight};
  if (denominator.has_value()) scale /= denominator->item<double>();
  Tensor out = rows.new_statistics(kNumLossStatistics), loss = at::empty({}, rows.options()), holder;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* given = rows.per_row<T>(weights, rows.options().dtype().toScalarType(), holder);
    T* const fields = out.data_ptr<T>();
    if (rows.recipe)
      compute_recipe_loss<T>(rows, rule, given, scale, fields);
    else
      compute_loss<T>(rows, rule, given, scale, fields);
    *loss.data_ptr<T>() = T(total_loss(rows, scale, fields));
  };
  if (rows.is_double())
    run(double());
  else
    run(float());
  return {loss, out};
}

TORCH_LIBRARY(eakd_cpu, m) { EAKD_DEFINE_OPERATORS(m, ""); }

TORCH_LIBRARY_IMPL(eakd_cpu, CPU, m) {
  m.impl("row_statistics", &row_statistics);
  m.impl("row_gradient", &row_gradient);
  m.impl("one_pass", &one_pass);
}

}  // namespace
}  // namespace eakd
