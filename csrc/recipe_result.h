// A row's statistics from its sums (recipe.h), and the factors of its gradient from its statistics.
#pragma once

#include "recipe.h"

namespace eakd {
namespace {

EAKD_HD float ln_1p(float x) { return log1pf(x); }
EAKD_HD double ln_1p(double x) { return ::log1p(x); }

// The label's column: x of both sides, and its class bias in nats.
template <typename T>
struct LabelColumn {
  T teacher, student, bias;
};

// Of a decoupled label: q_k - p_k, q_k, and log(p_k/(1 - p_k)) of both sides.
template <typename T>
struct LabelOdds {
  T target, student, odds_p, odds_q;
};

template <typename T>
EAKD_HD T softplus(T x) {  // ln(1 + e^x)
  return (x > 0 ? x : T(0)) + ln_1p(pow2((x > 0 ? -x : x) * T(kLog2E)));
}
template <typename T>
EAKD_HD T sigmoid(T x) {
  const T e = pow2((x < 0 ? x : -x) * T(kLog2E));
  return (x < 0 ? e : T(1)) / (1 + e);
}
// mass * x, and 0 where there is no mass.
template <typename T>
EAKD_HD T mass_times(T mass, T x) {
  return mass == 0 ? T(0) : mass * x;
}

// The KL family from one sweep. As in row_state.h: 0 without mass to average over, +inf where only the other side has
// none, and NaN stays.
template <typename T>
EAKD_HD T kl_of_sums(T mass, T first_moment, T other) {
  return mass == 0    ? T(0) * other
         : other == 0 ? T(INFINITY) * mass
                      : T(kLn2) * (first_moment / mass) + ln(other / mass);
}

template <typename T>
struct TauResult {
  T divergence;                  // without the factor of its temperature
  T pull;                        // S h over the columns, for a gradient h - q S h
  T student_pull, teacher_pull;  // only after a sweep of values
  T mean_d;                      // E_q[d] in nats, over all columns; only after a sweep of values
  T forward, reverse;            // of the KL family; only without a sweep of values
};

// values: whether the sweep of values ran.
template <typename T>
EAKD_HD TauResult<T> finish_columns(const Recipe& recipe, const TauSums<T>& s, bool values) {
  TauResult<T> r{};
  const T nan_stays = T(0) * (s.B0 + s.D0);  // whatever the other side's mass is
  const T first = T(recipe.first_of_columns()), second = T(recipe.second_of_columns());
  if (values) {
    const T ln2 = T(kLn2), of_degree = T(degree(recipe.divergence, recipe.first, recipe.second));
    r.divergence = s.f + nan_stays, r.pull = s.h, r.mean_d = ln2 * s.qd;
    r.student_pull = ln2 * (s.hd - s.h * s.qd), r.teacher_pull = ln2 * (s.fb - (of_degree * s.f - s.h) * s.pb);
    return r;
  }
  const T forward = first == 0 ? T(0) : kl_of_sums(s.B0, s.Bd, s.D0);
  const T reverse = second == 0 ? T(0) : kl_of_sums(s.D0, s.Dd, s.B0);
  r.divergence = (first == 0 ? T(0) : first * forward) + (second == 0 ? T(0) : second * reverse) + nan_stays;
  r.pull = (second == 0 ? T(0) : second * (1 + reverse)) - (s.B0 == 0 ? T(0) : first);
  r.forward = forward, r.reverse = reverse;
  return r;
}

// b, d: the label's exponents about the maxima of the rest, whose sums are B0 and D0.
template <typename T>
EAKD_HD LabelOdds<T> label_odds(T b, T d, T B0, T D0) {
  LabelOdds<T> r;
  if (b == T(INFINITY) || d == T(INFINITY)) return {T(NAN), T(NAN), T(NAN), T(NAN)};
  r.odds_p = b == T(-INFINITY) ? b : T(kLn2) * b - ln(B0);
  r.odds_q = d == T(-INFINITY) ? d : T(kLn2) * d - ln(D0);
  // The difference of whichever is small, so that nothing cancels at p_k -> 1.
  const bool high = r.odds_p > 0 && r.odds_q > 0;
  r.target = high ? sigmoid(-r.odds_p) - sigmoid(-r.odds_q) : sigmoid(r.odds_q) - sigmoid(r.odds_p);
  // An infinite divergence does not move with a masked label.
  if (d == T(-INFINITY)) r.target = 0;
  r.student = sigmoid(r.odds_q);
  return r;
}

// alpha TCKD + beta NCKD from NCKD. unbiased: b without the class bias.
template <typename T>
EAKD_HD TauResult<T> with_target(const Recipe& recipe, TauResult<T> r, const TauSums<T>& s, const LabelOdds<T>& odds,
                                 T unbiased, T d, bool values) {
  const T alpha = T(recipe.first), beta = T(recipe.second), p = sigmoid(odds.odds_p), rest = sigmoid(-odds.odds_p);
  const T target = mass_times(p, softplus(-odds.odds_q) - softplus(-odds.odds_p)) +
                   mass_times(rest, softplus(odds.odds_q) - softplus(odds.odds_p));
  r.divergence = (alpha == 0 ? T(0) : alpha * target) + (beta == 0 ? T(0) : beta * r.divergence);
  if (!values) return r;
  const T ln2 = T(kLn2), student_step = ln2 * d - r.mean_d, teacher_step = ln2 * (unbiased - s.pb);
  r.student_pull = beta * r.student_pull + mass_times(alpha * odds.target, student_step);
  r.teacher_pull = beta * r.teacher_pull + mass_times(alpha * p * rest, (odds.odds_p - odds.odds_q) * teacher_step);
  r.mean_d += mass_times(odds.student, student_step);
  return r;
}

// Everything that a row's statistics tensor gets, in its order.
template <typename T>
struct RecipeNumbers {
  T common[kNumRecipeFields] = {};
  T tau[kMostTemperatures][kNumTauFields] = {};
  T divergence_slope = 0, student_lse_slope = 0;
};

// About a maximum; 0 for that of nothing, as (-inf) - (-inf) would be NaN.
template <typename T>
EAKD_HD T about(T m) {
  return m == T(-INFINITY) ? T(0) : m;
}

// taus: the row's temperatures. label: its column, null without one. values: whether the sweep of values ran.
template <typename T>
EAKD_HD RecipeNumbers<T> recipe_numbers(const Recipe& recipe, const double* taus, double t,
                                        const SideScales<T>& teacher, const SideScales<T>& student,
                                        const RecipeSums<T>& s, const LabelColumn<T>* label, bool values) {
  const T ln2 = T(kLn2), my = about(s.rest_My), mz = about(s.rest_Mz);
  RecipeNumbers<T> out;
  // Entropies and cross-entropy come out of row_state.h's own formulas.
  RowState<T> state;
  state.My = s.My, state.Mz = s.Mz, state.A0 = s.A0, state.A1 = s.A1, state.E0 = s.E0, state.E1 = s.E1, state.F0 = s.F0;
  const RowResult<T> row = finish(state, Temperatures<T>(1, t), label == nullptr ? T(0) : label->student);
  out.common[kTeacherEntropy] = row.teacher_entropy, out.common[kStudentEntropy] = row.student_entropy;
  out.common[kCrossEntropy] = label == nullptr ? T(0) : row.cross_entropy;
  T slope = 0;
  for (int k = 0; k < recipe.count; ++k) {
    const TauSums<T>& sums = s.tau[k];
    TauResult<T> r = finish_columns(recipe, sums, values);
    // The maxima in nats; of standardised logits, about their mean.
    const bool plain = recipe.standardize == kNoStandardize;
    const T y_max = plain ? my / T(taus[k]) : (my - s.teacher.mean) * teacher.tau[k] * ln2;
    const T z_max = plain ? mz / T(taus[k]) : (mz - s.student.mean) * student.tau[k] * ln2;
    T teacher_lse = sums.B0 == 0 ? T(-INFINITY) : y_max + ln(sums.B0);
    T student_lse = sums.D0 == 0 ? T(-INFINITY) : z_max + ln(sums.D0);
    if (recipe.decoupled()) {
      const T unbiased = (label->teacher - my) * teacher.tau[k], d = (label->student - mz) * student.tau[k];
      const T b = unbiased + label->bias * T(kLog2E);
      const LabelOdds<T> odds = label_odds(b, d, sums.B0, sums.D0);
      r = with_target(recipe, r, sums, odds, unbiased, d, values);
      const T y = ln2 * b + y_max, z = ln2 * d + z_max;
      teacher_lse = y + softplus(-odds.odds_p), student_lse = z + softplus(-odds.odds_q);
      if (y == T(-INFINITY)) teacher_lse = sums.B0 == 0 ? y : ln(sums.B0) + y_max;
      if (z == T(-INFINITY)) student_lse = sums.D0 == 0 ? z : ln(sums.D0) + z_max;
    }
    out.common[kDivergence] += T(recipe.factor[k]) * r.divergence;
    out.common[kTeacherLse] = teacher_lse == T(-INFINITY) ? T(0) : teacher_lse;
    out.common[kStudentLse] = student_lse == T(-INFINITY) ? T(0) : student_lse;
    out.common[kLsePull] = sums.D0 == 0 ? T(0) : r.mean_d + z_max;
    slope += T(recipe.factor[k]) * -(r.student_pull + r.teacher_pull) / T(taus[k]);
    out.student_lse_slope = -out.common[kLsePull] / T(taus[k]);
    T* numbers = out.tau[k];
    numbers[kRestTeacherSum] = sums.B0, numbers[kRestStudentSum] = sums.D0, numbers[kPull] = r.pull;
    numbers[kStudentPull] = r.student_pull, numbers[kTeacherPull] = r.teacher_pull;
    numbers[kForwardKL] = r.forward, numbers[kReverseKL] = r.reverse;
  }
  out.divergence_slope = slope;
  out.common[kRestTeacherMax] = s.rest_My, out.common[kRestStudentMax] = s.rest_Mz;
  out.common[kRecipeStudentMax] = s.Mz;
  out.common[kRecipeStudentEntropySum] = s.E0, out.common[kRecipeStudentHardSum] = s.F0;
  out.common[kRecipeTeacherEntropySum] = s.A0;
  out.common[kStudentCount] = s.student.count, out.common[kStudentMean] = s.student.mean;
  out.common[kStudentDeviation] = s.student.deviation(), out.common[kTeacherDeviation] = s.teacher.deviation();
  const T mean = s.E1 / s.E0;
  out.common[kEntropyPull] = s.E0 == 0 ? T(0) : -ln2 * ln2 * (s.E2 / s.E0 - mean * mean);
  return out;
}

// Gradients of the loss in the row's statistics.
template <typename T>
struct RowUpstream {
  T divergence, student_entropy, student_lse, cross_entropy;
};

// The gradient in u of one temperature: c h_j + q q_j over the columns of the divergence, `label` in a decoupled one.
template <typename T>
struct TauBasis {
  T c, q, label;
};

// unbiased etc. as in recipe_numbers; `odds` of a decoupled label.
template <typename T>
EAKD_HD TauBasis<T> tau_basis(const Recipe& recipe, int k, T tau, const T* numbers, const LabelOdds<T>& odds,
                              const RowUpstream<T>& upstream) {
  const T B0 = numbers[kRestTeacherSum], D0 = numbers[kRestStudentSum], pull = numbers[kPull];
  const T g = upstream.divergence * T(recipe.factor[k]) / tau, g_lse = upstream.student_lse / tau;
  TauBasis<T> basis{};
  if (!recipe.decoupled()) {
    basis.c = D0 == 0 ? T(0) : g;
    // A weight of 0 silences an infinite divergence, not a NaN.
    const bool silent = g == 0 && (pull == T(INFINITY) || pull == T(-INFINITY));
    basis.q = D0 == 0 ? T(0) : (silent ? T(0) : -g * pull) + g_lse;
    return basis;
  }
  const T target = g * T(recipe.first) * odds.target;
  basis.c = B0 == 0 || D0 == 0 ? T(0) : g * T(recipe.second);
  basis.q = D0 == 0 ? T(0) : -basis.c * pull - target + g_lse * (1 - odds.student);
  basis.label = target + g_lse * odds.student;
  return basis;
}

// What the logits' own gradient adds to and makes of the one in u:
//     g_j = inverse (G_j - constant) - linear (x_j - mean) + entropy 2^e_j (ln2 e_j + entropy_shift)
//           + hard (2^((x_j - Mz) log2(e)) - F0 [j = label])
// Of standardised logits mean and deviation pass gradient too; others have inverse 1 and neither term.
template <typename T>
struct RecipeBasis {
  T inverse = 1, constant = 0, linear = 0, mean = 0;
  T entropy = 0, entropy_shift = 0, hard = 0, label = 0;
};

template <typename T>
EAKD_HD RecipeBasis<T> recipe_basis(const Recipe& recipe, const T* common, const T (*tau_numbers)[kNumTauFields],
                                    const double* taus, double t, const RowUpstream<T>& upstream) {
  RecipeBasis<T> basis;
  const T E0 = common[kRecipeStudentEntropySum], F0 = common[kRecipeStudentHardSum];
  basis.entropy = E0 == 0 ? T(0) : -upstream.student_entropy / (T(t) * E0);
  basis.entropy_shift = E0 == 0 ? T(0) : common[kStudentEntropy] - ln(E0);
  basis.hard = F0 == 0 ? T(0) : upstream.cross_entropy / F0;
  basis.label = F0 == 0 ? T(0) : -upstream.cross_entropy;
  if (recipe.standardize == kNoStandardize) return basis;
  const T deviation = common[kStudentDeviation], count = common[kStudentCount];
  basis.inverse = inverse_deviation(recipe, deviation), basis.mean = common[kStudentMean];
  if (recipe.standardize == kStandardizeAll) basis.entropy *= basis.inverse;
  T pull = upstream.student_lse == 0 ? T(0) : upstream.student_lse * common[kLsePull];
  if (recipe.standardize == kStandardizeAll && upstream.student_entropy != 0)
    pull += upstream.student_entropy * common[kEntropyPull];
  for (int k = 0; k < recipe.count; ++k)
    pull += mass_times(upstream.divergence * T(recipe.factor[k]), tau_numbers[k][kStudentPull]);
  basis.constant = upstream.student_lse / (T(taus[recipe.count - 1]) * count);
  // Equal logits have no deviation to differentiate.
  basis.linear = deviation == 0 ? T(0) : pull * basis.inverse / ((count - 1) * deviation);
  return basis;
}

}  // namespace
}  // namespace eakd
