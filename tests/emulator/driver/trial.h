// One launch, or the two of row statistics and their gradient, over rows of some shape, against expected.h.
#pragma once

#include <random>

#include "cuda/shapes.h"
#include "kernels.h"
#include "rows.h"

namespace driver {
namespace {

using namespace eakd;

struct Variant {
  const char* name;
  bool labels, keep, infinities, in_place, unlike;  // unlike: the gradient's rows begin elsewhere within a vector
  int padding;                                      // columns past the vocabulary

  bool takes(Kernel kernel, bool two_pass) const {
    const bool holds_rows = kernel == Kernel::kResident || kernel == Kernel::kRing;
    return !(unlike && holds_rows) && !(in_place && two_pass);
  }
};

constexpr const char* kNames[] = {"small", "resident", "ring", "stream"};  // of Kernel

constexpr Variant kVariants[] = {
    {"no labels", false, false, false, false, false, 0},
    {"labels and padding", true, false, false, false, false, 5},
    {"labels, rows left out and -inf", true, true, true, false, false, 0},
    {"labels and rows left out, in place", true, true, false, true, false, 3},
    {"labels, gradients unlike", true, false, false, false, true, 0},
};

struct Case {
  Kernel kernel;
  bool two_pass;        // statistics by this kernel, then the gradient from these
  int columns, offset;  // offset: where the first row begins within a vector
  int cluster, threads, rows;
  Variant variant;
};

// Logits in T, and P tau = t.
template <typename T, int P>
class Trial {
 public:
  explicit Trial(const Case& c)
      : c_(c),
        student_(c.rows, c.variant.in_place ? padded() : c.columns, c.offset, stride()),
        teacher_(c.rows, c.columns, c.offset, stride() + kVector),
        gradient_(c.rows, padded(), c.offset + c.variant.unlike, stride() + 2 * kVector, kVector),
        labels_(c.rows),
        keep_(std::make_unique<bool[]>(c.rows)),
        out_(static_cast<std::size_t>(c.rows) * (c.two_pass ? kNumStatisticsWithSlopes : kNumLossStatistics), -777.f) {
    fill_logits();
    set_job();
    set_plan();
    for (int r = 0; r < c.rows; ++r)
      pairs_.push_back({student_.row(r, c.columns), teacher_.row(r, c.columns), kTau, kT, label(r)});
  }

  void run() {
    if (c_.two_pass) {
      require_success(Kernels<T, P>::sums(job_, plan_, false));
      check_statistics();
      require_success(gradient_of_statistics());
    } else {
      require_success(Kernels<T, P>::sums(job_, plan_, true));
      check_loss();
    }
    for (int r = 0; r < c_.rows; ++r)
      check_gradient(r);
    student_.require_foreign_untouched("student");
    teacher_.require_foreign_untouched("teacher");
    gradient_.require_foreign_untouched("gradient");
  }

 private:
  static constexpr int kVector = 16 / sizeof(T);
  // A temperature of 1 stands in for the cross-entropy's, so there are all three places for it.
  static constexpr double kTau = P == 0 ? 2 : P == 1 ? 1 : 1.5, kT = P == 0 ? 1 : P * kTau;
  static constexpr float kScale = 0.75f, kDivisor = 3, kHardWeight = 0.5f;
  static constexpr float kEntropySlope = 0.3f, kLseSlope = 0.2f;

  int padded() const { return c_.columns + c_.variant.padding; }
  int stride() const { return padded(); }
  bool whole() const {
    return c_.offset == 0 && c_.columns % kVector == 0 && !c_.variant.unlike && padded() == c_.columns;
  }
  bool kept(int r) const { return !c_.variant.keep || r % 3 != 1; }
  int label(int r) const { return c_.variant.labels ? static_cast<int>(labels_[r]) : -1; }

  // First and last columns, and some in between.
  int64_t label_of(int r) const {
    const int places[] = {0, c_.columns - 1, c_.columns / 2, kVector, c_.columns - kVector, 1, c_.columns / 3};
    return std::clamp(places[r % 7], 0, c_.columns - 1);
  }

  // Noise over a slope: maxima differ from thread to thread, and rise as a thread goes on. Some rows are far below 0,
  // so that a zero that is no column outweighs all that are.
  void fill_logits() {
    std::mt19937 random(static_cast<unsigned>(c_.columns * 31 + c_.offset));
    std::normal_distribution<float> noise(0, 2);
    for (int r = 0; r < c_.rows; ++r) {
      labels_[r] = label_of(r), keep_[r] = kept(r);
      for (int i = 0; i < c_.columns; ++i) {
        const float place = static_cast<float>(i) / c_.columns;
        const float z = noise(random) + 20 * place - 9 * r;
        const float y = noise(random) + (r % 2 ? -25 : 30) * place - 20 * (r % 3);
        student_.set(r, i, masked(r, i) ? -INFINITY : z);
        teacher_.set(r, i, masked(r, i) || without_mass(r, i) ? -INFINITY : y);
      }
    }
  }

  bool masked(int r, int i) const { return c_.variant.infinities && i % 5 == 2 && i != labels_[r]; }
  // In one row, nothing has.
  bool without_mass(int r, int i) const { return c_.variant.infinities && (i % 7 == 3 || r == 6); }

  void set_job() {
    job_.student = student_.matrix(), job_.teacher = teacher_.matrix();
    job_.gradient = c_.variant.in_place ? student_.matrix() : gradient_.matrix();
    job_.rows = c_.rows, job_.vocab_size = c_.columns, job_.gradient_columns = padded();
    job_.gradient_vectors = !c_.variant.unlike;
    if (c_.variant.keep) job_.keep = {keep_.get(), 1};
    const Temperatures<float> k(kTau, kT);
    job_.tau = k.tau, job_.t = k.t, job_.k_tau = k.k_tau, job_.k_t = k.k_t, job_.P = P;
    if (c_.variant.labels) {
      job_.labels = {labels_.data(), 1};
      job_.hard = kTau == 1 ? kHardSumAtTau : kT == 1 ? kHardSumAtT : kOwnHardSum;
    }
    job_.slopes = c_.two_pass && c_.variant.infinities;
    job_.out = out_.data();
    const double bound = std::log(static_cast<double>(c_.columns));
    job_.rule = {kWeightEA, true, bound, 1, 1, c_.variant.labels ? kHardWeight : 0.};
    job_.scale = kScale, job_.denominator = divisor_.get();
  }

  // Not as the planner would: two clusters for all rows, so that they loop, and threads that need not suit the row.
  void set_plan() {
    plan_.kernel = c_.kernel, plan_.width = whole() ? kVector : 1;
    plan_.cluster = c_.cluster, plan_.threads = c_.threads, plan_.blocks = 2 * c_.cluster;
    if (c_.kernel == Kernel::kSmall) {
      plan_.lanes = c_.columns <= kFewColumns * kFewLanes ? kFewLanes : kManyLanes;
      plan_.blocks = (c_.rows * plan_.lanes + c_.threads - 1) / c_.threads;
    }
    plan_.slice = std::max(1, (c_.columns / kVector + c_.cluster - 1) / c_.cluster);
    plan_.stages = c_.cluster == 1 ? 2 : 3;
    plan_.shared_bytes = c_.kernel == Kernel::kRing ? kRingSpace + plan_.stages * plan_.slice * 32 : 0;
  }

  cudaError_t gradient_of_statistics() {
    for (int r = 0; r < c_.rows; ++r)
      upstream_.push_back(static_cast<float>(slopes(r).divergence));
    static constexpr float kEntropy = kEntropySlope, kLse = kLseSlope;
    hard_slope_ = kHardWeight * kScale / kDivisor;
    job_.statistics = out_.data();
    job_.upstream = {{upstream_.data(), 1}, {&kEntropy, 0}, {&kLse, 0}, {&hard_slope_, 0}};
    if (!c_.variant.labels) job_.upstream.cross_entropy = {};
    Plan plan;
    plan.threads = c_.threads;
    const int warps = c_.rows * stretches(padded(), kVector);
    plan.blocks = (warps * kWarp + c_.threads - 1) / c_.threads;
    return Kernels<T, P>::row_gradient(job_, plan);
  }

  Slopes slopes(int r) const {
    const double scale = double(kScale) / kDivisor;
    Slopes g;
    g.divergence = pairs_[r].weight() * kTau * kTau * scale;
    g.cross_entropy = c_.variant.labels ? kHardWeight * scale : 0;
    if (c_.two_pass) g.student_entropy = kEntropySlope, g.student_lse = kLseSlope;
    return g;
  }

  void check_field(const char* name, int field, int r, double expected) const {
    const double found = out_[job_.at(field, r)], tolerance = kept(r) ? 3e-5 * (1 + std::fabs(expected)) : 0;
    require_close(name + std::string(" of row ") + std::to_string(r), found, kept(r) ? expected : 0, tolerance);
  }

  void check_fields(int r) const {
    const RowPair& pair = pairs_[r];
    check_field("divergence", kDivergence, r, pair.divergence_at(kTau));
    check_field("teacher entropy", kTeacherEntropy, r, pair.teacher_entropy());
    check_field("student entropy", kStudentEntropy, r, pair.student_entropy());
    check_field("teacher lse", kTeacherLse, r, log_sum_exp(pair.teacher, kTau));
    check_field("student lse", kStudentLse, r, log_sum_exp(pair.student, kTau));
    check_field("cross-entropy", kCrossEntropy, r, pair.cross_entropy());
  }

  void check_loss() const {
    for (int r = 0; r < c_.rows; ++r) {
      check_fields(r);
      const RowPair& pair = pairs_[r];
      const double loss = pair.weight() * kTau * kTau * pair.divergence_at(kTau);
      check_field("weight", kWeight, r, pair.weight());
      check_field("loss", kLoss, r, loss + kHardWeight * pair.cross_entropy());
    }
  }

  void check_statistics() const {
    for (int r = 0; r < c_.rows; ++r) {
      check_fields(r);
      if (!job_.slopes) continue;
      const RowPair& pair = pairs_[r];
      check_field("slope of the divergence", kDivergenceSlope, r,
                  slope([&](double tau) { return pair.divergence_at(tau); }, kTau));
      check_field("slope of the student's lse", kStudentLseSlope, r,
                  slope([&](double tau) { return log_sum_exp(pair.student, tau); }, kTau));
    }
  }

  void check_gradient(int r) const {
    const Rows<T>& found = c_.variant.in_place ? student_ : gradient_;
    const Slopes g = slopes(r);
    Numbers expected = pairs_[r].gradient(g);
    if (!kept(r)) std::fill(expected.begin(), expected.end(), 0);
    expected.resize(padded(), 0);
    // Of what cancels in the difference of two softmaxes, and in an entropy, and so a weight, that is next to nothing.
    const double cancelled = kept(r) ? 3e-6 * (1 + g.divergence + g.cross_entropy) : 0;
    for (int i = 0; i < padded(); ++i) {
      const double tolerance = cancelled + (sizeof(T) == 4 ? 2e-4 : 0x1p-8) * std::fabs(expected[i]);
      require_close("gradient of row " + std::to_string(r) + " column " + std::to_string(i), found.get(r, i),
                    expected[i], tolerance);
    }
  }

  const Case c_;
  Rows<T> student_, teacher_, gradient_;
  std::vector<int64_t> labels_;
  std::unique_ptr<bool[]> keep_;
  std::vector<float> out_, upstream_;
  std::unique_ptr<float> divisor_ = std::make_unique<float>(kDivisor);
  float hard_slope_ = 0;
  RowJob job_;
  Plan plan_;
  std::vector<RowPair> pairs_;
};

}  // namespace
}  // namespace driver
