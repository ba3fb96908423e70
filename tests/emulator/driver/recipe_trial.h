// One pass, or statistics and the gradient from them, of a recipe, against expected.h and differences of it.
#pragma once

#include <random>

#include "cuda/shapes.h"
#include "kernels.h"
#include "rows.h"

namespace driver {
namespace {

using namespace eakd;

struct NamedRecipe {
  const char* name;
  Recipe recipe;
  bool weighted;  // classes

  static NamedRecipe of(const char* name, int divergence, double first, double second, Standardize standardize,
                        std::vector<double> taus, bool weighted) {
    Recipe r;
    r.divergence = divergence, r.first = first, r.second = second, r.standardize = standardize;
    for (const double tau : taus)
      r.tau[r.count] = tau, r.factor[r.count++] = taus.size() == 1 ? 1 : tau;
    return {name, r, weighted};
  }
};

const NamedRecipe kRecipes[] = {
    NamedRecipe::of("JSD at two temperatures", kJSD, 0.3, 0.7, kNoStandardize, {2, 1}, false),
    NamedRecipe::of("DKD of weighted classes", kDecoupled, 1.5, 2, kNoStandardize, {2}, true),
    NamedRecipe::of("reverse KL, standardised", kKL, 0, 1, kStandardizeAll, {1}, false),
};

struct RecipeCase {
  const NamedRecipe* recipe;
  bool two_pass, staged, vectors;
  int columns, offset, cluster, threads;
  bool in_place, left_out;
};

template <typename T>
class RecipeTrial {
 public:
  explicit RecipeTrial(const RecipeCase& c)
      : c_(c),
        student_(kRows, padded(), c.offset, padded()),
        teacher_(kRows, c.columns, c.offset, padded() + kVector),
        gradient_(kRows, padded(), c.offset, padded() + 2 * kVector, kVector) {
    fill();
    set_plan();
  }

  void run() {
    const Operation first = c_.two_pass ? Operation::kRowStatistics : Operation::kOnePass;
    launch(first);
    for (int r = 0; r < kRows; ++r)
      check_statistics(r);
    if (c_.two_pass) launch(Operation::kRowGradient);
    for (int r = 0; r < kRows; ++r)
      check_gradient(r);
    student_.require_foreign_untouched("student");
    teacher_.require_foreign_untouched("teacher");
    gradient_.require_foreign_untouched("gradient");
  }

 private:
  static constexpr int kVector = 16 / sizeof(T), kRows = 5, kPadding = 3;
  static constexpr double kT = 3, kScale = 0.25, kHardWeight = 0.5, kLseSlope = 0.2;

  int padded() const { return c_.columns + kPadding; }
  bool kept(int r) const { return !c_.left_out || r % 3 != 1; }
  int label(int r) const {
    const int places[] = {0, c_.columns - 1, c_.columns / 2, std::min(1, c_.columns - 1), c_.columns / 3};
    return places[r];
  }

  void fill() {
    std::mt19937 random(static_cast<unsigned>(c_.columns * 31 + c_.offset));
    std::normal_distribution<float> noise(0, 2);
    for (int r = 0; r < kRows; ++r) {
      labels_[r] = label(r), keep_[r] = kept(r);
      for (int i = 0; i < c_.columns; ++i) {
        const bool masked = i % 5 == 2 && i != labels_[r];
        student_.set(r, i, masked ? -INFINITY : noise(random) + 3.f * i / c_.columns - 9 * r);
        teacher_.set(r, i, masked ? -INFINITY : noise(random) + (i == labels_[r] ? 9 : 0) - 20 * (r % 3));
      }
      for (int i = c_.columns; i < padded(); ++i)
        student_.set(r, i, NAN);
      pairs_.push_back({student_.row(r, c_.columns), teacher_.row(r, c_.columns), 1, kT, label(r)});
    }
    if (!c_.recipe->weighted) return;
    for (int i = 0; i < c_.columns; ++i)
      bias_.push_back(-0.25f * (i % 4));
  }

  void set_plan() {
    plan_.width = c_.vectors ? kVector : 1, plan_.cluster = c_.cluster, plan_.threads = c_.threads;
    plan_.blocks = 2 * c_.cluster, plan_.shared_bytes = kRecipeSpace;
    if (!c_.staged) return;
    const int tile = c_.vectors ? 1 : 4, vectors = c_.columns / plan_.width, each = c_.cluster * c_.threads * tile;
    plan_.slice = std::max(1, (vectors + each - 1) / each) * tile;
    plan_.shared_bytes += 32l / (kVector / plan_.width) * plan_.slice * c_.threads;
  }

  void launch(Operation operation) {
    RowJob job;
    job.student = student_.matrix(), job.teacher = teacher_.matrix();
    job.gradient = c_.in_place ? student_.matrix() : gradient_.matrix();
    job.rows = kRows, job.vocab_size = c_.columns, job.gradient_columns = padded(), job.gradient_vectors = c_.vectors;
    job.labels = {labels_, 1}, job.keep = {keep_, 1};
    const Temperatures<float> k(1, kT);
    job.t = k.t, job.k_t = k.k_t, job.slopes = c_.two_pass;
    job.rule = {kWeightNone, false, 0, 1, 1, kHardWeight};
    job.scale = kScale;
    if (operation != Operation::kRowGradient)
      out_.assign(std::size_t(kRows) * std::max<int>(c_.recipe->recipe.fields(true), kNumLossStatistics), -777.f);
    job.out = out_.data(), job.statistics = out_.data();
    static constexpr float kDivergenceSlope = kScale, kHard = kScale * kHardWeight, kLse = kLseSlope;
    job.upstream = {{&kDivergenceSlope, 0}, {}, {&kLse, 0}, {&kHard, 0}};
    const RecipeJob recipe_job(job, operation, c_.recipe->recipe, bias_.empty() ? nullptr : bias_.data());
    Plan plan = plan_;
    if (operation == Operation::kRowGradient) plan.slice = 0;  // it reads a row once
    require_success(launch_recipe<T>(recipe_job, plan));
  }

  double of_student(int r, const Numbers& student) const {
    const RecipeValue value = recipe_value(c_.recipe->recipe, pairs_[r].teacher, student, label(r), bias_);
    return kScale * value.divergence + (c_.two_pass ? kLseSlope * value.student_lse : 0);
  }

  void check_statistics(int r) const {
    const RecipeValue value = recipe_value(c_.recipe->recipe, pairs_[r].teacher, pairs_[r].student, label(r), bias_);
    check("divergence", kDivergence, r, value.divergence);
    check("student lse", kStudentLse, r, value.student_lse);
    check("cross-entropy", kCrossEntropy, r, pairs_[r].cross_entropy());
    if (!c_.two_pass) return;
    const auto with = [&](double tau) {
      Recipe recipe = c_.recipe->recipe;
      for (int k = 0; k < recipe.count; ++k)
        recipe.tau[k] += tau;
      return recipe_value(recipe, pairs_[r].teacher, pairs_[r].student, label(r), bias_).divergence;
    };
    check("slope of the divergence", c_.recipe->recipe.fields(false), r, slope(with, 0));
  }

  void check(const char* name, int field, int r, double expected) const {
    const double found = out_[std::size_t(field) * kRows + r];
    require_close(name + std::string(" of row ") + std::to_string(r), found, kept(r) ? expected : 0,
                  kept(r) ? 3e-5 * (1 + std::fabs(expected)) : 0);
  }

  void check_gradient(int r) const {
    const Rows<T>& found = c_.in_place ? student_ : gradient_;
    Numbers expected(padded(), 0), student = pairs_[r].student;
    Slopes hard;
    hard.cross_entropy = kScale * kHardWeight;
    const Numbers of_hard = pairs_[r].gradient(hard);
    for (int i = 0; i < padded(); i = next(i)) {
      if (i < c_.columns && kept(r)) {
        const double z = student[i];
        const auto at = [&](double x) { return student[i] = x, of_student(r, student); };
        expected[i] = of_hard[i] + (z == -INFINITY ? 0 : slope(at, z));
        student[i] = z;
      }
      const double tolerance = kept(r) ? 1e-5 + (sizeof(T) == 4 ? 2e-4 : 0x1p-8) * std::fabs(expected[i]) : 0;
      require_close("gradient of row " + std::to_string(r) + " column " + std::to_string(i), found.get(r, i),
                    expected[i], tolerance);
    }
  }

  // Of many columns some: each takes two rows of differences.
  int next(int i) const { return c_.columns < 100 || i + 31 >= c_.columns ? i + 1 : i + 31; }

  const RecipeCase c_;
  Rows<T> student_, teacher_, gradient_;
  int64_t labels_[kRows];
  bool keep_[kRows];
  std::vector<float> bias_, out_;
  Plan plan_;
  std::vector<RowPair> pairs_;
};

}  // namespace
}  // namespace driver
