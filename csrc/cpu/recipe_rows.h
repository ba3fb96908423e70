// Rows with a recipe (../recipe.h): a thread loads a row pair into its caches as the arithmetic type and goes over it
// block by block, once for each sweep.
#pragma once

#include <algorithm>
#include <optional>

#include "recipe_job.h"
#include "recipe_kernels.h"
#include "rows.h"

namespace eakd {
namespace {

// The largest block of any instruction set. Four arrays of it fit the first-level cache.
constexpr int64_t kMostColumnsOfBlock = 2048;

// One thread's row.
template <typename T>
class RecipeRow {
 public:
  explicit RecipeRow(const RecipeJob& job)
      : job_(job), recipe_(job.recipe), kernels_(recipe_kernels_of<T>()), columns_(job.rows.vocab_size) {
    const int64_t blocks = (columns_ + kMostColumnsOfBlock - 1) / kMostColumnsOfBlock;
    const int64_t row = blocks * kMostColumnsOfBlock + kPadding, bias = job.class_bias == nullptr ? 0 : 2 * row;
    const int64_t kept = keeps() ? (3 * recipe_.count + 2) * row : 0;
    static thread_local std::vector<T> room;
    const int64_t needed = 2 * row + kept + bias + kScratches * (kMostColumnsOfBlock + kPadding);
    if (int64_t(room.size()) < needed) room.resize(needed);
    T* p = room.data();
    for (T*& side : room_)
      side = p, p += row;
    for (T*& scratch : scratch_)
      scratch = p, p += kMostColumnsOfBlock + kPadding;
    if (bias > 0) set_class_bias(p, row), p += bias;
    kept_ = p, row_room_ = row;
    if (!job.per_row) set_temperatures(0);
  }

  // Reads a row pair: maxima, and mean and deviation where logits are standardised.
  void load(int64_t row) {
    if (job_.per_row) set_temperatures(row);
    pair_.emplace(job_.rows, row);
    next_.reset();
    if (row + 1 < job_.rows.rows) next_.emplace(job_.rows, row + 1);
    sums_ = RecipeSums<double>();
    filled_ = kept_h_ = false;
    labelled_ = pair_->label >= 0 && pair_->label < columns_;
    const bool apart = recipe_.decoupled() && labelled_;
    load_side(kTeacher, job_.rows.teacher, pair_->teacher, recipe_.teacher_scale, recipe_.teacher_cap, apart);
    load_side(kStudent, job_.rows.student, pair_->student, recipe_.student_scale, recipe_.student_cap, apart);
    set_scales(sums_.teacher.deviation(), sums_.student.deviation());
  }

  RecipeNumbers<double> statistics() {
    sum_up();
    const bool values = recipe_.wants_values(job_.pulls());
    if (values) add_values();
    const LabelColumn<double> label = this->label();
    const bool has_label = job_.rows.labels != nullptr;
    if (recipe_.decoupled()) add_label_to_sides();
    return recipe_numbers(recipe_, taus_, job_.t, scales_[kTeacher], scales_[kStudent], sums_,
                          has_label ? &label : nullptr, values);
  }

  // The gradient of the loaded row from its numbers, wherever they come from.
  void write_gradient(const double* common, const double (*tau)[kNumTauFields], const RowUpstream<double>& upstream) {
    sums_.rest_My = common[kRestTeacherMax], sums_.rest_Mz = common[kRestStudentMax];
    RecipeBasis<double> basis = recipe_basis(recipe_, common, tau, taus_, job_.t, upstream);
    TauBasis<double> bases[kMostTemperatures];
    double at_label = 0;
    for (int k = 0; k < recipe_.count; ++k) {
      bases[k] = tau_basis(recipe_, k, taus_[k], tau[k], odds(k, tau[k]), upstream);
      at_label += bases[k].label;
    }
    const OwnGradient<double> own = {basis, about(common[kRecipeStudentMax]), scales_[kStudent].t,
                                     recipe_.student_scale, recipe_.student_cap};
    for (int64_t begin = (columns_ - 1) / kernels_.block * kernels_.block; begin >= 0; begin -= kernels_.block)
      write_block(begin, bases, tau, own, at_label);
  }

 private:
  static constexpr int64_t kPadding = 64;
  enum Scratch { kRaisedTeacher, kRaisedStudent, kBaseTeacher, kBaseStudent, kGradient, kScratches };

  // A few megabytes a thread; beyond, exponentials are computed again in every sweep.
  bool keeps() const { return columns_ * (recipe_.count + 1) <= 4 * kMaxKeptColumns; }
  // One loop for both temperatures' sums, with one exponential for both where they allow it.
  bool fuses() const {
    return recipe_.count == 1 && recipe_.standardize == kNoStandardize && job_.class_bias == nullptr;
  }
  // Several temperatures of KL(p || q): one loop for all that share a base.
  bool shares_loops() const {
    return recipe_.count > 1 && recipe_.is_linear() && recipe_.standardize == kNoStandardize &&
           job_.class_bias == nullptr && !recipe_.wants_values(job_.pulls());
  }
  int64_t block_columns(int64_t begin) const { return std::min(kernels_.block, columns_ - begin); }
  // Of every instruction set.
  static int64_t whole_vectors(int64_t n) { return (n + 15) / 16 * 16; }
  double rest_max(Side side) const { return about(side == kTeacher ? sums_.rest_My : sums_.rest_Mz); }

  void set_class_bias(T* to, int64_t row) {
    bias_ = to, weights_ = to + row;
    for (int64_t j = 0; j < row; ++j) {
      const double bias = j < columns_ ? job_.class_bias[j] : 0;
      bias_[j] = T(bias * kLog2E), weights_[j] = T(std::exp(bias));
    }
  }

  void set_temperatures(int64_t row) {
    double all[kMostTemperatures + 1];
    for (int k = 0; k < recipe_.count; ++k)
      all[k] = taus_[k] = job_.per_row ? job_.temperatures.at(row).tau : recipe_.tau[k];
    // The entropies' exponents are powers of the same numbers only where they see the same logits.
    const bool shares_entropies = recipe_.standardize != kStandardizeDivergence;
    all[recipe_.count] = job_.t;
    bases_ = SharedBases(all, fuses() ? 1 : recipe_.count + shares_entropies);
    if (fuses())
      bases_.power[0] = 1, bases_.base[0] = taus_[0];
    else if (!shares_entropies) {
      bases_.base[bases_.count] = job_.t;
      bases_.of[recipe_.count] = bases_.count++, bases_.power[recipe_.count] = 1;
    }
  }

  // Where they lie, if nothing has to be done to them.
  bool lies_ready(const LogitsView& view, double scale, double cap) const {
    const bool native = view.storage == (sizeof(T) == 8 ? Storage::kDouble : Storage::kFloat);
    return native && view.vocab_stride == 1 && scale == 1 && cap == 0 && !recipe_.decoupled() &&
           columns_ == whole_vectors(columns_);
  }

  void load_side(Side side, const LogitsView& view, const char* row, double scale, double cap, bool apart) {
    const bool ready = lies_ready(view, scale, cap);
    T* const x = ready ? const_cast<T*>(reinterpret_cast<const T*>(row)) : room_[side];  // and is not written
    x_[side] = x;
    const int64_t label = pair_->label;
    double all = -INFINITY, rest = -INFINITY;
    Moments<double>& moments = side == kTeacher ? sums_.teacher : sums_.student;
    for (int64_t begin = 0; begin < columns_; begin += kernels_.block) {
      const int64_t n = block_columns(begin);
      double largest =
          ready ? kernels_.largest(x + begin, n) : kernels_.load(view, row, begin, n, T(scale), T(cap), x + begin);
      if (!ready) std::fill(x + begin + n, x + begin + whole_vectors(n), -T(INFINITY));
      if (recipe_.standardize != kNoStandardize) moments.merge(kernels_.moments(x + begin, whole_vectors(n)));
      all = std::max(all, largest);
      if (label >= begin && label < begin + n) {
        label_[side] = x[label];
        if (apart) x[label] = -INFINITY, largest = kernels_.largest(x + begin, whole_vectors(n));
      }
      rest = std::max(rest, largest);
    }
    (side == kTeacher ? sums_.My : sums_.Mz) = all;
    (side == kTeacher ? sums_.rest_My : sums_.rest_Mz) = rest;
  }

  void set_scales(double teacher_deviation, double student_deviation) {
    inverse_[kTeacher] = inverse_deviation(recipe_, teacher_deviation);
    inverse_[kStudent] = inverse_deviation(recipe_, student_deviation);
    for (const Side side : {kTeacher, kStudent})
      scales_[side] = side_scales(recipe_, taus_, job_.t, inverse_[side]);
  }

  // ---- exponentials ----------------------------------------------------------------------------------------------

  T* base_room(Side side, int base, int64_t begin) const {
    return keeps() ? kept_ + (2 * base + side) * row_room_ + begin
                   : scratch_[side == kTeacher ? kBaseTeacher : kBaseStudent];
  }

  const T* base_exponentials(Side side, int base, int64_t begin, int64_t n) {
    T* to = base_room(side, base, begin);
    if (keeps() && filled_) return to;
    const bool raw = recipe_.standardize == kStandardizeDivergence && base == bases_.of[recipe_.count];
    const double k = kLog2E / bases_.base[base] * (raw ? 1 : inverse_[side]);
    kernels_.exponentials(x_[side] + begin, n, T(rest_max(side)), T(k), to);
    return to;
  }

  // which: a temperature's number, or recipe_.count for the entropies'.
  const T* exponentials(Side side, int which, int64_t begin, int64_t n) {
    const T* base = base_exponentials(side, bases_.of[which], begin, n);
    const T* weights = side == kTeacher && which < recipe_.count && bias_ != nullptr ? weights_ + begin : nullptr;
    if (bases_.power[which] == 1 && weights == nullptr) return base;
    T* to = scratch_[side == kTeacher ? kRaisedTeacher : kRaisedStudent];
    kernels_.raise(base, n, bases_.power[which], weights, to);
    return to;
  }

  // The next row comes into the second-level cache while this one's gradient is computed, if there is room for both.
  void prefetch_next(int64_t begin, int64_t columns) const {
    constexpr int64_t kCacheLine = 64, kMostColumns = 1 << 16;
    if (!next_ || columns_ > kMostColumns) return;
    const auto prefetch = [&](const LogitsView& view, const char* row) {
      if (view.vocab_stride != 1) return;
      for (int64_t at = begin * view.item_bytes; at < (begin + columns) * view.item_bytes; at += kCacheLine)
        __builtin_prefetch(row + at);
    };
    prefetch(job_.rows.teacher, next_->teacher), prefetch(job_.rows.student, next_->student);
  }

  // raised: with 2^b and 2^d themselves.
  RecipeBlock<T> block_at(int k, int64_t begin, int64_t n, bool raised) {
    raised = raised || bias_ != nullptr;
    const int base = bases_.of[k];
    return {x_[kTeacher] + begin,
            x_[kStudent] + begin,
            raised ? exponentials(kTeacher, k, begin, n) : base_exponentials(kTeacher, base, begin, n),
            raised ? exponentials(kStudent, k, begin, n) : base_exponentials(kStudent, base, begin, n),
            bias_ == nullptr ? nullptr : bias_ + begin,
            n,
            T(rest_max(kTeacher)),
            T(rest_max(kStudent)),
            T(scales_[kTeacher].tau[k]),
            T(scales_[kStudent].tau[k]),
            T(inverse_[kTeacher] / taus_[k]),
            T((inverse_[kTeacher] - inverse_[kStudent]) / taus_[k]),
            raised ? 1 : bases_.power[k]};
  }

  // Where h of a temperature stays between values and gradient; null where there is no room.
  T* kept_h(int k, int64_t begin) const {
    return keeps() ? kept_ + (2 * recipe_.count + 2 + k) * row_room_ + begin : nullptr;
  }

  // ---- sums ------------------------------------------------------------------------------------------------------

  void sum_up() {
    const bool second = recipe_.standardize == kStandardizeAll, kl = recipe_.is_kl();
    const bool values = recipe_.wants_values(job_.pulls());  // which then come from a sweep of their own
    const bool forward = kl && !values && recipe_.first_of_columns() != 0;
    const bool reverse = kl && !values && recipe_.second_of_columns() != 0;
    const bool own_hard = job_.rows.labels != nullptr && (job_.t != 1 || second);
    for (int64_t begin = 0; begin < columns_; begin += kernels_.block) {
      const int64_t n = whole_vectors(block_columns(begin));
      if (fuses())
        add_fused_sums(begin, n, reverse);
      else
        add_sums(begin, n, forward, reverse, second);
      if (own_hard) {
        T* hard = scratch_[kGradient];
        kernels_.exponentials(x_[kStudent] + begin, n, T(rest_max(kStudent)), T(kLog2E), hard);
        sums_.F0 += kernels_.sum(hard, n);
      }
    }
    if (job_.rows.labels != nullptr && !own_hard) sums_.F0 = sums_.E0;
    filled_ = true;
  }

  void add_sums(int64_t begin, int64_t n, bool forward, bool reverse, bool second) {
    // One after the other: both sides may use the same scratch.
    const SideSums a = kernels_.side_sums(x_[kTeacher] + begin, exponentials(kTeacher, recipe_.count, begin, n), n,
                                          T(rest_max(kTeacher)), T(scales_[kTeacher].t), false);
    const SideSums e = kernels_.side_sums(x_[kStudent] + begin, exponentials(kStudent, recipe_.count, begin, n), n,
                                          T(rest_max(kStudent)), T(scales_[kStudent].t), second);
    sums_.A0 += a.sum, sums_.A1 += a.first, sums_.E0 += e.sum, sums_.E1 += e.first, sums_.E2 += e.second;
    if (shares_loops()) return add_power_sums(begin, n);
    for (int k = 0; k < recipe_.count; ++k)
      kernels_.kl_sums(sums_.tau[k], block_at(k, begin, n, false), forward, reverse);
  }

  // visit(block, the temperatures of one base), for every base that has some.
  template <typename Visit>
  void each_base(int64_t begin, int64_t n, const Visit& visit) {
    for (int base = 0; base < bases_.count; ++base) {
      int of_base[kMostTemperatures], count = 0;
      for (int k = 0; k < recipe_.count; ++k)
        if (bases_.of[k] == base) of_base[count++] = k;
      if (count > 0) visit(block_at(of_base[0], begin, n, false), of_base, count);
    }
  }

  void add_power_sums(int64_t begin, int64_t n) {
    each_base(begin, n, [&](const RecipeBlock<T>& block, const int* of_base, int count) {
      unsigned mask = 0;
      for (int i = 0; i < count; ++i)
        mask |= 1u << bases_.power[of_base[i]];
      PowerSums s;
      kernels_.power_sums(s, block, mask);
      for (int i = 0; i < count; ++i) {
        TauSums<double>& sums = sums_.tau[of_base[i]];
        const int P = bases_.power[of_base[i]];
        sums.B0 += s.B0[P], sums.D0 += s.D0[P];
        sums.Bd += s.difference[P] * (kLog2E / taus_[of_base[i]]);
      }
    });
  }

  void add_power_gradients(int64_t begin, int64_t n, const TauBasis<double>* bases, const double (*tau)[kNumTauFields],
                           bool* first) {
    each_base(begin, n, [&](const RecipeBlock<T>& block, const int* of_base, int count) {
      PowerFactors<T> by{};
      for (int i = 0; i < count; ++i) {
        const int k = of_base[i], P = bases_.power[k];  // the same temperature may be there twice
        const Normalisers<T> over = normalisers(tau[k][kRestTeacherSum], tau[k][kRestStudentSum]);
        by.p[P] -= T(bases[k].c * recipe_.first_of_columns()) * over.inverse_B0;
        by.q[P] += T(bases[k].q) * over.inverse_D0;
      }
      kernels_.add_power_gradient(scratch_[kGradient], block, by, *first);
      *first = false;
    });
  }

  void add_fused_sums(int64_t begin, int64_t n, bool reverse) {
    RowState<double> s;
    s.My = sums_.rest_My, s.Mz = sums_.rest_Mz;
    T *const eb = base_room(kTeacher, 0, begin), *const ed = base_room(kStudent, 0, begin);
    const Temperatures<double> k(taus_[0], job_.t);
    kernels_.fused_sums(s, x_[kTeacher] + begin, x_[kStudent] + begin, n, k, eb, ed);
    TauSums<double>& sums = sums_.tau[0];
    if (reverse) {
      filled_ = true;  // this block
      sums.Dd += kernels_.reverse_sum(block_at(0, begin, n, true));
      filled_ = false;
    }
    sums.B0 += s.B0, sums.D0 += s.D0, sums.Bd += s.Bd;
    sums_.A0 += s.A0, sums_.A1 += s.A1, sums_.E0 += s.E0, sums_.E1 += s.E1;
  }

  Normalisers<T> normalisers(double B0, double D0) const {
    return {T(B0 == 0 ? 0 : 1 / B0), T(D0 == 0 ? 0 : 1 / D0), T(B0 == 0 ? 0 : std::log2(B0)),
            T(D0 == 0 ? 0 : std::log2(D0)), T((D0 == 0 ? 0 : std::log(D0)) - (B0 == 0 ? 0 : std::log(B0)))};
  }

  void add_values() {
    for (int64_t begin = 0; begin < columns_; begin += kernels_.block) {
      const int64_t n = whole_vectors(block_columns(begin));
      for (int k = 0; k < recipe_.count; ++k) {
        TauSums<double>& s = sums_.tau[k];
        const RecipeBlock<T> block = block_at(k, begin, n, true);
        kernels_.values(s, block, normalisers(s.B0, s.D0), recipe_, job_.pulls(), kept_h(k, begin));
      }
    }
    kept_h_ = keeps();
  }

  LabelColumn<double> label() const {
    if (!labelled_) return {NAN, NAN, 0};
    return {label_[kTeacher], label_[kStudent], bias_ == nullptr ? 0 : job_.class_bias[pair_->label]};
  }

  void add_label_to_sides() {
    const LabelColumn<double> c = label();
    add_column(sums_.rest_My, c.teacher, scales_[kTeacher].t, &sums_.A0, &sums_.A1);
    add_column(sums_.rest_Mz, c.student, scales_[kStudent].t, &sums_.E0, &sums_.E1, &sums_.E2, &sums_.F0);
  }

  // ---- gradient --------------------------------------------------------------------------------------------------

  LabelOdds<double> odds(int k, const double* numbers) const {
    if (!recipe_.decoupled()) return {};
    const LabelColumn<double> c = label();
    const double b = (c.teacher - rest_max(kTeacher)) * scales_[kTeacher].tau[k] + c.bias * kLog2E;
    const double d = (c.student - rest_max(kStudent)) * scales_[kStudent].tau[k];
    return label_odds(b, d, numbers[kRestTeacherSum], numbers[kRestStudentSum]);
  }

  void write_block(int64_t begin, const TauBasis<double>* bases, const double (*tau)[kNumTauFields],
                   const OwnGradient<double>& own, double at_label) {
    const int64_t columns = block_columns(begin), n = whole_vectors(columns), label = pair_->label - begin;
    T *g = scratch_[kGradient], *z = x_[kStudent] + begin;
    bool first = true;
    prefetch_next(begin, columns);
    if (shares_loops()) add_power_gradients(begin, n, bases, tau, &first);
    for (int k = 0; k < recipe_.count && !shares_loops(); ++k) {
      if (bases[k].c == 0 && bases[k].q == 0) continue;
      const Normalisers<T> by = normalisers(tau[k][kRestTeacherSum], tau[k][kRestStudentSum]);
      kernels_.add_gradient(g, block_at(k, begin, n, !recipe_.is_linear()), by, recipe_, T(bases[k].c), T(bases[k].q),
                            kept_h_ ? kept_h(k, begin) : nullptr, first);
      first = false;
    }
    if (first) std::fill(g, g + n, T(0));
    const bool here = labelled_ && label >= 0 && label < columns;
    if (here && recipe_.decoupled()) g[label] = T(at_label), z[label] = T(label_[kStudent]);
    const RecipeBasis<double>& c = own.basis;
    const OwnGradient<T> rounded = {
        {T(c.inverse), T(c.constant), T(c.linear), T(c.mean), T(c.entropy), T(c.entropy_shift), T(c.hard), T(c.label)},
        T(own.mz),
        T(own.k_t),
        T(own.scale),
        T(own.cap)};
    kernels_.finish_gradient(g, z, n, rounded);
    if (here && own.basis.label != 0) {
      const double share = own.cap == 0 ? 0 : label_[kStudent] / own.cap;
      g[label] += T(own.basis.label * own.scale * (1 - share * share));
    }
    kernels_.store(job_.rows.gradient, pair_->gradient, begin, columns, g, job_.rows.gradient_past_caches);
  }

  const RecipeJob& job_;
  const Recipe& recipe_;
  const RecipeKernels<T>& kernels_;
  const int64_t columns_;
  // x_: the row as the sweeps read it, in room_ or where it lies
  T *x_[2], *room_[2], *scratch_[kScratches], *kept_, *bias_ = nullptr, *weights_ = nullptr;
  int64_t row_room_;
  std::optional<RowPair> pair_, next_;
  double taus_[kMostTemperatures], inverse_[2], label_[2];
  SharedBases bases_;
  SideScales<double> scales_[2];
  RecipeSums<double> sums_;
  bool filled_ = false, kept_h_ = false, labelled_ = false;
};

}  // namespace
}  // namespace eakd
