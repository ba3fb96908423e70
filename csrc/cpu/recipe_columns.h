// A row pair as the sweeps of a recipe (../recipe.h) see it: its logits in the thread's caches as the arithmetic type,
// block by block, with the exponentials of every temperature.
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

// One thread's row. The exponents of a block are about its centres: the row's maxima as far as they were known when its
// sums were taken.
template <typename T>
class RecipeColumns {
 public:
  enum Scratch { kRaisedTeacher, kRaisedStudent, kBaseTeacher, kBaseStudent, kGradient, kScratches };

  explicit RecipeColumns(const RecipeJob& job)
      : job(job), recipe(job.recipe), kernels(recipe_kernels_of<T>()), count(job.rows.vocab_size) {
    row_room_ = round_up(count, kMostColumnsOfBlock) + kPadding;
    const int64_t blocks = round_up(count / kernels.block + 1, kPadding);
    const int64_t bias = job.class_bias == nullptr ? 0 : 2, kept = keeps() ? 3 * recipe.count + 2 : 0;
    const int64_t scratch_room = kMostColumnsOfBlock + kPadding;
    T* p = thread_room<T>((2 + bias + kept) * row_room_ + 2 * blocks + kScratches * scratch_room);
    const auto take = [&p](int64_t n) { return p += n, p - n; };
    for (T*& side : room_)
      side = take(row_room_);
    for (T*& each : centres_)
      each = take(blocks);
    for (T*& each : scratch)
      each = take(scratch_room);
    if (bias > 0) bias_ = take(row_room_), weights_ = take(row_room_), set_class_bias();
    kept_ = take(kept * row_room_);
    if (!job.per_row) set_temperatures(0);
  }

  // Nothing is read yet.
  void open(int64_t row) {
    if (job.per_row) set_temperatures(row);
    pair.emplace(job.rows, row);
    filled_ = kept_h_ = false;
    for (Known& known : known_)
      known.b = NAN;
    labelled = pair->label >= 0 && pair->label < count;
    set_scales(0, 0);
  }

  struct Maxima {
    T all, rest;  // over all columns, and over those of the divergence
  };
  // A block of one side; its mean and deviation go into `moments` if those are wanted.
  Maxima load(Side side, int64_t begin, Moments<double>& moments) {
    const bool teacher = side == kTeacher;
    const LogitsView& view = teacher ? job.rows.teacher : job.rows.student;
    const char* const row = teacher ? pair->teacher : pair->student;
    const double scale = teacher ? recipe.teacher_scale : recipe.student_scale;
    const double cap = teacher ? recipe.teacher_cap : recipe.student_cap;
    const bool ready = lies_ready(view, scale, cap);
    // Where it lies, if nothing has to be done to it; it is not written then.
    x[side] = ready ? const_cast<T*>(reinterpret_cast<const T*>(row)) : room_[side];
    T* const to = x[side] + begin;
    const int64_t n = block_columns(begin), label = pair->label - begin;
    Maxima m;
    m.all = ready ? kernels.largest(to, n) : kernels.load(view, row, begin, n, T(scale), T(cap), to);
    if (!ready) std::fill(to + n, to + whole_vectors(n), -T(INFINITY));
    if (recipe.standardize != kNoStandardize) moments.merge(kernels.moments(to, whole_vectors(n)));
    m.rest = m.all;
    if (label >= 0 && label < n) {
      label_[side] = to[label];
      if (recipe.decoupled()) to[label] = -INFINITY, m.rest = kernels.largest(to, whole_vectors(n));
    }
    return m;
  }

  void set_centres(int64_t begin, double teacher, double student) {
    centres_[kTeacher][begin / kernels.block] = T(teacher);
    centres_[kStudent][begin / kernels.block] = T(student);
  }
  // Blocks of -inf at the row's beginning: 0 would be as far away as logits are from 0.
  void fill_empty_centres(double teacher, double student) {
    for (int64_t begin = 0; begin < count; begin += kernels.block)
      for (const Side side : {kTeacher, kStudent})
        if (T& c = centres_[side][begin / kernels.block]; c == -T(INFINITY))
          c = T(side == kTeacher ? teacher : student);
  }
  T centre(Side side, int64_t begin) const { return about(centres_[side][begin / kernels.block]); }

  void set_scales(double teacher_deviation, double student_deviation) {
    inverse_[kTeacher] = inverse_deviation(recipe, teacher_deviation);
    inverse_[kStudent] = inverse_deviation(recipe, student_deviation);
    for (const Side side : {kTeacher, kStudent})
      scales[side] = side_scales(recipe, taus, job.t, inverse_[side]);
  }

  template <typename Visit>
  void each_block(const Visit& visit) const {
    for (int64_t begin = 0; begin < count; begin += kernels.block)
      visit(begin, whole_vectors(block_columns(begin)));
  }
  int64_t block_columns(int64_t begin) const { return std::min(kernels.block, count - begin); }
  // Of every instruction set.
  static int64_t whole_vectors(int64_t n) { return round_up(n, 16); }

  // One loop for both temperatures' sums, with one exponential for both where they allow it.
  bool fuses() const { return recipe.count == 1 && recipe.standardize == kNoStandardize && job.class_bias == nullptr; }
  // AlphaBeta term by term; fp64 is for those who want every digit.
  bool takes_terms() const {
    return sizeof(T) == sizeof(float) && recipe.suits_terms() && job.class_bias == nullptr && !job.pulls();
  }
  // Several temperatures of KL(p || q): one loop for all that share a base.
  bool shares_loops() const {
    return recipe.count > 1 && recipe.is_linear() && recipe.standardize == kNoStandardize &&
           job.class_bias == nullptr && !recipe.wants_values(job.pulls());
  }

  // ---- exponentials ----------------------------------------------------------------------------------------------

  // From here on exponentials that are kept are read and not computed.
  void set_filled() { filled_ = true; }
  void set_kept_h() { kept_h_ = keeps(); }

  bool reads_again(Side side) const { return keeps() && (side == kStudent || !takes_terms()); }
  // Where 2^(x/base) of a block is, or goes.
  T* base_room(Side side, int base, int64_t begin) const {
    return reads_again(side) ? kept_ + (2 * base + side) * row_room_ + begin
                             : scratch[side == kTeacher ? kBaseTeacher : kBaseStudent];
  }
  // Where h of a temperature stays between values and gradient; null where there is no room.
  T* room_for_h(int k, int64_t begin) const {
    return keeps() ? kept_ + (2 * recipe.count + 2 + k) * row_room_ + begin : nullptr;
  }
  const T* kept_h(int k, int64_t begin) const { return kept_h_ ? room_for_h(k, begin) : nullptr; }

  // which: a temperature's number, or recipe.count for the entropies'.
  const T* exponentials(Side side, int which, int64_t begin, int64_t n) {
    const T* base = base_exponentials(side, bases.of[which], begin, n);
    const T* weights = side == kTeacher && which < recipe.count && bias_ != nullptr ? weights_ + begin : nullptr;
    if (bases.power[which] == 1 && weights == nullptr) return base;
    T* to = scratch[side == kTeacher ? kRaisedTeacher : kRaisedStudent];
    kernels.raise(base, n, bases.power[which], weights, to);
    return to;
  }

  // raised: with 2^b and 2^d themselves.
  RecipeBlock<T> block_at(int k, int64_t begin, int64_t n, bool raised) {
    RecipeBlock<T> block = logits_at(k, begin, n);
    raised = raised || bias_ != nullptr;
    const int base = bases.of[k];
    block.eb = raised ? exponentials(kTeacher, k, begin, n) : base_exponentials(kTeacher, base, begin, n);
    block.ed = raised ? exponentials(kStudent, k, begin, n) : base_exponentials(kStudent, base, begin, n);
    if (!raised) block.power = bases.power[k];
    return block;
  }
  // Without exponentials.
  RecipeBlock<T> logits_at(int k, int64_t begin, int64_t n) const {
    return {x[kTeacher] + begin,
            x[kStudent] + begin,
            nullptr,
            nullptr,
            bias_ == nullptr ? nullptr : bias_ + begin,
            n,
            centre(kTeacher, begin),
            centre(kStudent, begin),
            T(scales[kTeacher].tau[k]),
            T(scales[kStudent].tau[k]),
            T(std::min(inverse_[kTeacher], inverse_[kStudent]) / taus[k]),
            T(std::max(inverse_[kTeacher] - inverse_[kStudent], 0.0) / taus[k]),
            T(std::max(inverse_[kStudent] - inverse_[kTeacher], 0.0) / taus[k]),
            1};
  }

  // From a temperature's sums about My and Mz, about a block's centres. Most blocks have the last one's, which saves
  // some powers and logarithms.
  const Normalisers<T>& normalisers(int k, int64_t begin, double B0, double D0, double My, double Mz) {
    const double b = (centre(kTeacher, begin) - about(My)) * scales[kTeacher].tau[k];
    const double d = (centre(kStudent, begin) - about(Mz)) * scales[kStudent].tau[k];
    Known& known = known_[k];
    if (known.b == b && known.d == d && known.B0 == B0 && known.D0 == D0) return known.normalisers;
    const double log2_B0 = B0 == 0 ? 0 : std::log2(B0) - b, log2_D0 = D0 == 0 ? 0 : std::log2(D0) - d;
    known = {b,
             d,
             B0,
             D0,
             {T(B0 == 0 ? 0 : pow2(b) / B0), T(D0 == 0 ? 0 : pow2(d) / D0), T(log2_B0), T(log2_D0),
              T((log2_D0 - log2_B0) * kLn2)}};
    return known.normalisers;
  }
  // About My and Mz.
  AlphaBetaTerms<T> alpha_beta_terms(int k, double B0, double D0) const {
    return AlphaBetaTerms<T>(recipe, scales[kTeacher].tau[k], B0 == 0 ? 0 : std::log2(B0), D0 == 0 ? 0 : std::log2(D0));
  }
  RecipeBlock<T> block_about(double My, double Mz, int k, int64_t begin, int64_t n) const {
    RecipeBlock<T> block = logits_at(k, begin, n);
    block.my = T(about(My)), block.mz = T(about(Mz));
    return block;
  }

  // Where the loop that makes a block's gradient may write it; null: not as it is.
  T* place_of_gradient(int64_t begin) const {
    const LogitsView& view = job.rows.gradient;
    T* const p = reinterpret_cast<T*>(pair->gradient) + begin;
    const bool native = view.storage == kNative && view.vocab_stride == 1 && block_columns(begin) % 16 == 0;
    const bool aligned = !job.rows.gradient_past_caches || reinterpret_cast<uintptr_t>(p) % 64 == 0;
    return native && aligned && !job.rows.gradient_over_student && recipe.count == 1 ? p : nullptr;
  }

  LabelColumn<double> label() const {
    if (!labelled) return {NAN, NAN, 0};
    return {label_[kTeacher], label_[kStudent], bias_ == nullptr ? 0 : job.class_bias[pair->label]};
  }

  const RecipeJob& job;
  const Recipe& recipe;
  const RecipeKernels<T>& kernels;
  const int64_t count;
  double taus[kMostTemperatures];
  SideScales<double> scales[2];
  SharedBases bases;
  std::optional<RowPair> pair;
  bool labelled = false;
  T *x[2] = {}, *scratch[kScratches];

 private:
  static constexpr int64_t kPadding = 64;
  static constexpr Storage kNative = sizeof(T) == 8 ? Storage::kDouble : Storage::kFloat;
  static int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

  // A few megabytes a thread; beyond, exponentials are computed again in every sweep.
  bool keeps() const { return count * (recipe.count + 1) <= 4 * kMaxKeptColumns; }

  bool lies_ready(const LogitsView& view, double scale, double cap) const {
    return view.storage == kNative && view.vocab_stride == 1 && scale == 1 && cap == 0 &&
           !(recipe.decoupled() && labelled) && count == whole_vectors(count);
  }

  void set_class_bias() {
    for (int64_t j = 0; j < row_room_; ++j) {
      const double bias = j < count ? job.class_bias[j] : 0;
      bias_[j] = T(bias * kLog2E), weights_[j] = T(std::exp(bias));
    }
  }

  void set_temperatures(int64_t row) {
    double all[kMostTemperatures + 1];
    for (int k = 0; k < recipe.count; ++k)
      all[k] = taus[k] = job.per_row ? job.temperatures.at(row).tau : recipe.tau[k];
    // The entropies' exponents are powers of the same numbers only where they see the same logits.
    const bool shares_entropies = recipe.standardize != kStandardizeDivergence;
    all[recipe.count] = job.t;
    bases = SharedBases(all, fuses() ? 1 : recipe.count + shares_entropies);
    if (fuses())
      bases.power[0] = 1, bases.base[0] = taus[0];
    else if (!shares_entropies) {
      bases.base[bases.count] = job.t;
      bases.of[recipe.count] = bases.count++, bases.power[recipe.count] = 1;
    }
  }

  const T* base_exponentials(Side side, int base, int64_t begin, int64_t n) {
    T* to = base_room(side, base, begin);
    if (keeps() && filled_) return to;
    const bool raw = recipe.standardize == kStandardizeDivergence && base == bases.of[recipe.count];
    const double k = kLog2E / bases.base[base] * (raw ? 1 : inverse_[side]);
    kernels.exponentials(x[side] + begin, n, centre(side, begin), T(k), to);
    return to;
  }

  // x: the row as the sweeps read it, in room_ or where it lies
  T *room_[2], *centres_[2], *kept_, *bias_ = nullptr, *weights_ = nullptr;
  int64_t row_room_;
  double inverse_[2], label_[2];
  struct Known {
    double b, d, B0, D0;
    Normalisers<T> normalisers;
  } known_[kMostTemperatures];
  bool filled_ = false, kept_h_ = false;
};

}  // namespace
}  // namespace eakd
