// The operators on CUDA tensors: check, take raw pointers, plan, launch. Schemas are in ../operators.h.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "../operators.h"
#include "device.h"
#include "launch.h"
#include "shapes.h"

namespace eakd {
namespace cuda {
namespace {

// ---- tensors -> matrices -----------------------------------------------------------------------------------------

Matrix matrix(Tensor& t) {
  const LeadingStrides rows = rows_of(t);
  TORCH_CHECK(rows.inner <= std::numeric_limits<int>::max(), "too many rows: ", t.sizes());
  Matrix m;
  m.data = t.data_ptr();
  m.column_stride = t.size(-1) > 1 ? t.stride(-1) : 1;
  if (rows.outer_stride == 0 && rows.inner_stride != 0 && t.numel() / t.size(-1) == rows.inner) {
    m.outer_stride = rows.inner_stride;  // one stride is enough, and needs no division
  } else {
    m.inner = static_cast<int>(rows.inner), m.outer_stride = rows.outer_stride, m.inner_stride = rows.inner_stride;
  }
  return m;
}

// Where the rows of a tensor begin within vectors of `width` columns.
struct Alignment {
  int64_t width, first, inner, outer_step, inner_step;
  bool neighbours;

  Alignment(const Tensor& t, const Matrix& m, int64_t width_)
      : width(width_),
        first(reinterpret_cast<uintptr_t>(m.data) / t.element_size() % width_),
        inner(m.inner),
        outer_step(m.outer_stride % width_),
        inner_step(m.inner_stride % width_),
        neighbours(m.column_stride == 1) {}

  bool constant() const { return neighbours && outer_step == 0 && inner_step == 0; }
  bool like(const Alignment& other) const {
    if (!neighbours || !other.neighbours || first != other.first) return false;
    if (constant() && other.constant()) return true;
    if (inner == other.inner) return outer_step == other.outer_step && inner_step == other.inner_step;
    return inner == 1 ? as_if_inner(other.inner).like(other) : other.inner == 1 && other.like(*this);
  }

  // Rows of one stride, counted as the rows of two are.
  Alignment as_if_inner(int64_t rows) const {
    Alignment split = *this;
    split.inner = rows, split.inner_step = outer_step, split.outer_step = outer_step * rows % width;
    return split;
  }
};

Dtypes dtypes_of(const Tensor& student, const Tensor& teacher) {
  const auto s = student.scalar_type(), t = teacher.scalar_type();
  if (s == at::kFloat && t == at::kFloat) return Dtypes::kFloat;
  if (s == at::kBFloat16 && t == at::kBFloat16) return Dtypes::kBFloat16;
  if (s == at::kHalf && t == at::kHalf) return Dtypes::kHalf;
  if (s == at::kFloat && t == at::kBFloat16) return Dtypes::kFloatBFloat16;
  if (s == at::kFloat && t == at::kHalf) return Dtypes::kFloatHalf;
  TORCH_CHECK(false, "the CUDA kernels have no student in ", s, " with a teacher in ", t);
}

void check(int error, const Plan& plan) {
  TORCH_CHECK(error == 0, "CUDA kernel \"", name_of(plan.kernel), "\" with ", plan.blocks, " blocks of ", plan.threads,
              " threads, clusters of ", plan.cluster, " and ", plan.shared_bytes,
              " bytes of shared memory was not launched: ", eakd_error_name(error));
}

// ---- the arguments that all operators share ----------------------------------------------------------------------

class Rows {
 public:
  RowJob job;
  Dtypes dtypes;

  Rows(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels, const OptionalTensor& keep,
       const OptionalTensor& temperatures, double temperature, double entropy_temperature, int64_t vocab_size,
       at::ArrayRef<double> recipe, const OptionalTensor& class_bias)
      : dtypes(dtypes_of(student, teacher)), student_(student), teacher_(teacher), on_device_(student) {
    check_rows(student, teacher, vocab_size);
    leading_ = student.sizes().slice(0, student.dim() - 1).vec();
    const int64_t rows = c10::multiply_integers(leading_), largest = 1 << 30;
    TORCH_CHECK(rows <= largest && student.size(-1) <= largest, "the CUDA kernels take up to 2^30 rows and columns");
    job.rows = static_cast<int>(rows), job.vocab_size = static_cast<int>(vocab_size);
    job.student = matrix(student_), job.teacher = matrix(teacher_);
    job.labels = per_row<int64_t>(labels, at::kLong);
    job.keep = per_row<bool>(keep, at::kBool);
    job.temperatures = per_row<float>(temperatures, at::kFloat);
    const Temperatures<float> k(temperature, entropy_temperature);
    job.tau = k.tau, job.t = k.t, job.k_tau = k.k_tau, job.k_t = k.k_t;
    if (!temperatures.has_value() && temperature == entropy_temperature) job.P = 1;
    if (!temperatures.has_value() && 3 * temperature == entropy_temperature) job.P = 3;
    const bool fixed = !temperatures.has_value();
    job.hard = fixed && temperature == 1 ? kHardSumAtTau : entropy_temperature == 1 ? kHardSumAtT : kOwnHardSum;
    if (!labels.has_value()) job.hard = kNoHardSum;
    problem_.student_bytes = static_cast<int>(student.element_size());
    problem_.teacher_bytes = static_cast<int>(teacher.element_size());
    problem_.rows = rows, problem_.vocab_size = job.vocab_size;
    if (recipe.empty()) return;
    recipe_ = Recipe::parse(recipe);
    TORCH_CHECK(recipe_->count >= 1 && recipe_->count <= kMostTemperatures, "a recipe has 1 to ", kMostTemperatures,
                " temperatures, got ", recipe_->count);
    if (class_bias.has_value()) {
      held_.push_back(class_bias->to(student.device(), at::kFloat).contiguous());
      TORCH_CHECK(held_.back().numel() >= vocab_size, "class_bias must have ", vocab_size, " entries");
      class_bias_ = held_.back().const_data_ptr<float>();
    }
    problem_.recipe = true;
  }

  const Recipe* recipe() const { return recipe_.has_value() ? &*recipe_ : nullptr; }

  // One value a row; a tensor of one value serves every row. Whatever had to be made for that lives as long as this.
  template <typename T>
  PerRow<T> per_row(const OptionalTensor& given, at::ScalarType type) {
    if (!given.has_value()) return {};
    Tensor values = given->to(student_.device(), type);
    bool one = true;
    for (int64_t i = 0; i < values.dim(); ++i)
      one = one && (values.stride(i) == 0 || values.size(i) == 1);
    if (!one) values = values.expand(leading_).contiguous();
    held_.push_back(values);
    return {values.const_data_ptr<T>(), one ? 0 : 1};
  }

  void set_gradient(const Tensor& gradient) {
    Tensor target = gradient;
    job.gradient = matrix(target);
    TORCH_CHECK(target.data_ptr() == gradient.data_ptr(), "the gradient needs at most two leading strides");
    job.gradient_columns = problem_.gradient_columns = static_cast<int>(gradient.size(-1));
    gradient_ = target;
  }

  Tensor new_statistics(int64_t fields) {
    std::vector<int64_t> sizes = {fields};
    sizes.insert(sizes.end(), leading_.begin(), leading_.end());
    Tensor out = at::empty(sizes, student_.options().dtype(at::kFloat).requires_grad(false));
    job.out = out.data_ptr<float>();
    return out;
  }

  Plan plan(Operation operation, const std::string& wanted);

  // Plans and launches, with smaller clusters where the planned ones do not fit: parts of GPUs have few processors.
  template <typename Start>
  void run(Operation operation, const std::string& wanted, Start&& start) {
    for (;;) {
      const Plan found = plan(operation, wanted);
      const int error = start(found);
      const bool insists = !wanted.empty() && !problem_.recipe;
      if (error != kNothingFits || found.cluster == 1 || insists) return check(error, found);
      largest_cluster_ = found.cluster / 2;
    }
  }

  void run_recipe(Operation operation, const std::string& wanted) {
    run(operation, wanted, [&](const Plan& plan) {
      const RecipeJob recipe_job(job, operation, *recipe_, class_bias_);
      return eakd_launch_recipe(&recipe_job, &plan, dtypes, stream());
    });
  }

  const OnDeviceOf& on_device() const { return on_device_; }
  void* stream() const { return on_device_.stream(); }

 private:
  Tensor student_, teacher_, gradient_;
  std::vector<Tensor> held_;
  std::vector<int64_t> leading_;
  OnDeviceOf on_device_;
  Problem problem_;
  std::optional<Recipe> recipe_;
  const float* class_bias_ = nullptr;
  int largest_cluster_ = kMaxCluster;
};

// What is asked of a device once, not at every launch. The emulated one changes between calls.
Device device_of(const OnDeviceOf& on_device) {
  const auto query = [] {
    Device device;
    const int error = eakd_query_device(&device);
    TORCH_CHECK(error == 0, "the CUDA device cannot be queried: ", eakd_error_name(error));
    return device;
  };
#if defined(EAKD_EMULATED)
  return query();
#else
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(on_device.index());
  return found != known.end() ? found->second : known[on_device.index()] = query();
#endif
}

Plan Rows::plan(Operation operation, const std::string& wanted) {
  const int64_t width = problem_.vector();
  const Alignment student(student_, job.student, width), teacher(teacher_, job.teacher, width);
  problem_.operation = operation;
  problem_.alike = student.like(teacher);
  problem_.whole = problem_.alike && student.constant() && student.first == 0 && job.vocab_size % width == 0;
  if (gradient_.defined()) {
    const Alignment gradient(gradient_, job.gradient, width);
    problem_.gradient_alike = gradient.like(student);
    problem_.whole = problem_.whole && problem_.gradient_alike;
  }
  job.gradient_vectors = problem_.gradient_alike;
  Device device = device_of(on_device_);
  device.largest_cluster = std::min(device.largest_cluster, largest_cluster_);
  try {
    return make_plan(problem_, device, wanted);
  } catch (const std::invalid_argument& error) { TORCH_CHECK(false, error.what()); }
}

// ---- the operators -----------------------------------------------------------------------------------------------

Tensor row_statistics(EAKD_ROW_PARAMETERS, bool temperature_slopes, const std::string& wanted) {
  Rows rows(EAKD_ROW_ARGUMENTS);
  rows.job.slopes = temperature_slopes;
  if (const Recipe* recipe = rows.recipe()) {
    Tensor out = rows.new_statistics(recipe->fields(temperature_slopes));
    rows.run_recipe(Operation::kRowStatistics, wanted);
    return out;
  }
  Tensor out = rows.new_statistics(temperature_slopes ? kNumStatisticsWithSlopes : kNumStatistics);
  rows.run(Operation::kRowStatistics, wanted, [&](const Plan& plan) {
    return plan.kernel == Kernel::kSmall ? eakd_launch_small(&rows.job, &plan, rows.dtypes, false, rows.stream())
                                         : eakd_launch_stream(&rows.job, &plan, rows.dtypes, false, rows.stream());
  });
  return out;
}

void row_gradient(EAKD_ROW_PARAMETERS, const Tensor& statistics, EAKD_UPSTREAM_PARAMETERS, const Tensor& gradient,
                  const std::string& wanted) {
  Rows rows(EAKD_ROW_ARGUMENTS);
  rows.set_gradient(gradient);
  const Tensor saved = statistics.contiguous();
  rows.job.statistics = saved.const_data_ptr<float>();
  rows.job.upstream = {
      rows.per_row<float>(grad_divergence, at::kFloat), rows.per_row<float>(grad_student_entropy, at::kFloat),
      rows.per_row<float>(grad_student_lse, at::kFloat), rows.per_row<float>(grad_cross_entropy, at::kFloat)};
  if (rows.recipe() != nullptr) return rows.run_recipe(Operation::kRowGradient, wanted);
  if (!grad_cross_entropy.has_value()) rows.job.hard = kNoHardSum;
  rows.run(Operation::kRowGradient, wanted, [&](const Plan& plan) {
    return eakd_launch_gradient(&rows.job, &plan, rows.dtypes, grad_student_entropy.has_value(), rows.stream());
  });
}

std::tuple<Tensor, Tensor> one_pass(EAKD_ROW_PARAMETERS, EAKD_RULE_PARAMETERS, const Tensor& gradient,
                                    const std::string& wanted) {
  Rows rows(EAKD_ROW_ARGUMENTS);
  rows.set_gradient(gradient);
  RowJob& job = rows.job;
  job.rule = {static_cast<Weighting>(weighting), tau_squared, entropy_bound, weight_scale, kd_weight, ce_weight};
  job.weights = rows.per_row<float>(weights, at::kFloat);
  job.scale = static_cast<float>(scale);
  job.denominator = rows.per_row<float>(denominator, at::kFloat).data;
  Tensor out = rows.new_statistics(kNumLossStatistics);
  Tensor loss = at::empty({}, out.options());
  if (rows.recipe() != nullptr) {
    rows.run_recipe(Operation::kOnePass, wanted);
  } else {
    rows.run(Operation::kOnePass, wanted, [&](const Plan& plan) {
      switch (plan.kernel) {
        case Kernel::kSmall: return eakd_launch_small(&job, &plan, rows.dtypes, true, rows.stream());
        case Kernel::kResident: return eakd_launch_resident(&job, &plan, rows.dtypes, rows.stream());
        case Kernel::kRing: return eakd_launch_ring(&job, &plan, rows.dtypes, rows.stream());
        default: return eakd_launch_stream(&job, &plan, rows.dtypes, true, rows.stream());
      }
    });
  }
  const Total total = {job.out + job.at(kLoss, 0), job.rows, job.scale, job.denominator, loss.data_ptr<float>()};
  check(eakd_launch_total(&total, rows.stream()), Plan());
  return {loss, out};
}

// out = gradient * factor, rounded once; in place by exactly 1, which only the device knows, nothing at all.
void scale_gradient(const Tensor& gradient, const Tensor& factor, const Tensor& out) {
  Rows rows(gradient, gradient, {}, {}, {}, 1, 1, std::max<int64_t>(gradient.size(-1), 1), {}, {});
  rows.set_gradient(out);
  const PerRow<float> by = rows.per_row<float>(factor, at::kFloat);
  const bool in_place = out.data_ptr() == gradient.data_ptr();
  rows.run(Operation::kScaleGradient, "", [&](const Plan& plan) {
    return eakd_launch_scale(&rows.job, &plan, rows.dtypes, by.data, in_place, rows.stream());
  });
}

TORCH_LIBRARY(eakd_cuda, m) {
  EAKD_DEFINE_OPERATORS(m, ", str plan");
  m.def("scale_gradient(Tensor gradient, Tensor factor, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(eakd_cuda, EAKD_CUDA_KEY, m) {
  m.impl("row_statistics", &row_statistics);
  m.impl("row_gradient", &row_gradient);
  m.impl("one_pass", &one_pass);
  m.impl("scale_gradient", &scale_gradient);
}

}  // namespace
}  // namespace cuda
}  // namespace eakd
