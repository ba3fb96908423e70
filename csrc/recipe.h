// Divergences beyond KL(p || q) of the logits at one temperature: what the numbers of a row amount to. A recipe sums
// over temperatures, standardises, scales and caps logits, weights classes, and takes a label's class apart.
//
// A row goes through up to four sweeps, and nothing but sums over columns leaves a sweep:
//     moments    mean and deviation of both sides       where logits are standardised
//     sums       maxima, entropies, B0 and D0 at every temperature, and for the KL family what its value needs
//     values     sum of f and h (divergence.h), and the moments of h    for other divergences, or where pulls are
//     wanted gradient
// x are logits, scaled and capped; u = (x - mean)/(deviation + 1e-7) where they are standardised, else u = x. With the
// maxima My, Mz of x over the columns of the divergence (all but the label where that is apart: the "rest"),
//     b = (y - My) log2(e)/tau [/(teacher_deviation + 1e-7)] + class bias log2(e)        d likewise of the student
//
// The pull of a divergence on a side is sum_j x_j dD/dx_j over that side's exponents in nats: dD/dtau is
// -(student_pull + teacher_pull)/tau, and through the deviation it is what standardisation adds to the gradient.
#pragma once

#include "divergence.h"

namespace eakd {

constexpr int kMostTemperatures = 8;
constexpr double kStandardizeEpsilon = 1e-7;

// Order of the rows of the statistics tensor, as eakd_kernels/stats.py names them: the six public fields, these, and
// kNumTauFields for every temperature; behind them the two slopes where a temperature requires grad.
enum RecipeField : int {
  kRestTeacherMax = kTeacherMax,
  kRestStudentMax,
  kRecipeStudentMax,
  kRecipeStudentEntropySum,
  kRecipeStudentHardSum,
  kStudentCount,  // of columns that are not -inf, their mean and deviation: where logits are standardised
  kStudentMean,   // less the maximum
  kStudentDeviation,
  kTeacherDeviation,
  kEntropyPull,
  kLsePull,
  kRecipeTeacherEntropySum,  // about the largest of all columns, as the student's
  kNumRecipeFields,
};
enum TauField : int {
  kRestTeacherSum,
  kRestStudentSum,
  kPull,
  kStudentPull,
  kTeacherPull,
  kForwardKL,  // the two parts of the KL family, 0 where not asked for: shards of a row merge them one by one
  kReverseKL,
  kNumTauFields,
};

enum Standardize : int { kNoStandardize, kStandardizeDivergence, kStandardizeAll };

struct Recipe {
  int divergence = kKL;
  double first = 1, second = 0;
  int standardize = kNoStandardize;
  double student_scale = 1, teacher_scale = 1, student_cap = 0, teacher_cap = 0;
  int count = 0;  // of temperatures
  double tau[kMostTemperatures] = {}, factor[kMostTemperatures] = {};

  // As eakd_kernels/ops.py, Recipe.flat.
  template <typename List>
  static Recipe parse(const List& flat) {
    Recipe r;
    r.divergence = static_cast<int>(flat[0]), r.first = flat[1], r.second = flat[2];
    r.standardize = static_cast<int>(flat[3]);
    r.student_scale = flat[4], r.teacher_scale = flat[5], r.student_cap = flat[6], r.teacher_cap = flat[7];
    r.count = static_cast<int>((flat.size() - 8) / 2);
    for (int k = 0; k < r.count && k < kMostTemperatures; ++k)
      r.tau[k] = flat[8 + 2 * k], r.factor[k] = flat[9 + 2 * k];
    return r;
  }

  EAKD_HD bool decoupled() const { return divergence == kDecoupled; }
  // Of the divergence that is summed over columns: for a decoupled one, KL(p || q) of the rest.
  EAKD_HD double first_of_columns() const { return decoupled() ? 1 : first; }
  EAKD_HD double second_of_columns() const { return decoupled() ? 0 : second; }
  EAKD_HD bool is_kl() const { return divergence == kKL || decoupled(); }
  // Whether h is -p, so that the gradient needs no logarithms.
  EAKD_HD bool is_linear() const { return is_kl() && second_of_columns() == 0; }
  EAKD_HD bool wants_values(bool pulls) const { return pulls || !is_kl(); }
  // AlphaBeta that loses few digits to the terms of AlphaBetaTerms: they cancel, and are 1/(a b) and V^(1 - a - b)
  // large.
  EAKD_HD bool suits_terms() const {
    const double a = first, b = second;
    return divergence == kAlphaBeta && a >= 0.2 && b >= 0.2 && a + b > 0.85 && a + b <= 2 &&
           standardize == kNoStandardize;
  }
  EAKD_HD int fields(bool slopes) const { return kNumRecipeFields + count * kNumTauFields + (slopes ? 2 : 0); }
};

namespace {

EAKD_HD float root(float x) { return sqrtf(x); }
EAKD_HD double root(double x) { return ::sqrt(x); }

// Mean and sum of squared deviations of some columns.
template <typename T>
struct Moments {
  T count = 0, mean = 0, squares = 0;

  EAKD_HD void merge(const Moments& other) {
    if (other.count == 0) return;
    const T all = count + other.count, step = other.mean - mean, share = other.count / all;
    squares += other.squares + step * step * count * share;
    mean += step * share, count = all;
  }
  // Unbiased, as torch.std.
  EAKD_HD T deviation() const { return count > 1 ? root(squares / (count - 1)) : T(0); }
};

// Factors of the exponents of one side.
template <typename T>
struct SideScales {
  T tau[kMostTemperatures];  // log2(e)/tau_k, over the deviation where logits are standardised
  T t;                       // log2(e)/t
};

// inverse: 1/(deviation + epsilon), 1 where logits are not standardised.
template <typename T>
EAKD_HD SideScales<T> side_scales(const Recipe& recipe, const double* taus, double t, T inverse) {
  SideScales<T> s;
  for (int k = 0; k < recipe.count; ++k)
    s.tau[k] = T(kLog2E / taus[k]) * inverse;
  s.t = T(kLog2E / t) * (recipe.standardize == kStandardizeAll ? inverse : T(1));
  return s;
}

template <typename T>
EAKD_HD T inverse_deviation(const Recipe& recipe, T deviation) {
  return recipe.standardize == kNoStandardize ? T(1) : T(1) / (deviation + T(kStandardizeEpsilon));
}

// The sums of one temperature over the columns of the divergence; exponents are base 2, f and h in nats.
template <typename T>
struct TauSums {
  T B0 = 0, D0 = 0;  // S 2^b, S 2^d
  T Bd = 0, Dd = 0;  // S (b - d) 2^b, S (d - b) 2^d: the KL family's value
  // the sweep of values: S f, S h, S h d, S (degree f - h) b, S p b, S q d, the b without the class bias
  T f = 0, h = 0, hd = 0, fb = 0, pb = 0, qd = 0;

  // Before the sweep of values: exponents grow by constants, as in row_state.h.
  EAKD_HD void rescale(T by_b, T by_d) {
    const T b = pow2(by_b), d = pow2(by_d);
    Bd = b == 0 ? b * B0 : b * (Bd + (by_b - by_d) * B0);
    Dd = d == 0 ? d * D0 : d * (Dd + (by_d - by_b) * D0);
    B0 *= b, D0 *= d;
  }
};

// S 2^e, S e 2^e and S e^2 2^e where e grows by a constant.
template <typename T>
EAKD_HD void rescale_moments(T by, T* sum, T* first, T* second) {
  const T factor = pow2(by);
  *second = factor * (*second + by * (2 * *first + by * *sum));
  *first = factor * (*first + by * *sum), *sum *= factor;
}

// AlphaBeta term by term, with s = a + b, from the differences
//     step = p^s - q^s,    pull = q^s - p^a q^b:    a h = pull,    a b f = a/s step + pull
// Where divergence.h's formula asks which of p and q is larger, so that nothing cancels, this one has three
// exponentials of exponents about any centres; it is as exact as the same formula in PyTorch.
//     p^s = of_p 2^(k x_p),    q^s = of_q 2^(k x_q),    p^a q^b = of_both 2^(k x_q + share k (x_p - x_q))
// The last exponent is the second one where x_p = x_q, to the last bit.
template <typename T>
struct AlphaBetaTerms {
  T k, share;                // s log2(e)/tau, a/s
  T p_ratio, both_ratio;     // of_p and of_both over of_q: a loop has step and pull over of_q
  double f_step, f_pull, h;  // what f and h have of those

  // k_tau: log2(e)/tau. log2_B0, log2_D0: of the sums about the same centres.
  EAKD_HD AlphaBetaTerms(const Recipe& recipe, double k_tau, double log2_B0, double log2_D0) {
    const double a = recipe.first, b = recipe.second, s = a + b;
    k = T(s * k_tau), share = T(a / s);
    const double p = k * log2_B0 / k_tau, q = k * log2_D0 / k_tau;  // the powers as they were rounded
    p_ratio = T(pow2(q - p)), both_ratio = T(pow2(share * (q - p)));
    const double of_q = pow2(-q);
    f_step = of_q / (b * s), f_pull = of_q / (a * b), h = of_q / a;
  }
};

// A row after its sweeps.
template <typename T>
struct RecipeSums {
  // maxima of x over all columns, and over those of the divergence
  T My = T(-INFINITY), Mz = T(-INFINITY), rest_My = T(-INFINITY), rest_Mz = T(-INFINITY);
  T A0 = 0, A1 = 0, E0 = 0, E1 = 0, F0 = 0;  // as in row_state.h, about My and Mz
  T E2 = 0;                                  // S e^2 2^e, where entropies are standardised
  Moments<T> student, teacher;
  TauSums<T> tau[kMostTemperatures];

  // About maxima of the rest that are at least the present ones.
  EAKD_HD void recentre(T my, T mz, int count, const SideScales<T>& of_teacher, const SideScales<T>& of_student) {
    if (my == rest_My && mz == rest_Mz) return;
    // An empty side takes any centre; (-inf) - (-inf) would be NaN.
    const T y = rest_My == T(-INFINITY) ? T(0) : rest_My - my, z = rest_Mz == T(-INFINITY) ? T(0) : rest_Mz - mz;
    T none = 0;
    rescale_moments(exponent_step(y * of_teacher.t), &A0, &A1, &none);
    rescale_moments(exponent_step(z * of_student.t), &E0, &E1, &E2);
    F0 *= pow2(exponent_step(z * T(kLog2E)));
    for (int k = 0; k < count; ++k)
      tau[k].rescale(exponent_step(y * of_teacher.tau[k]), exponent_step(z * of_student.tau[k]));
    rest_My = my, rest_Mz = mz;
  }
};

// A column that was not in the sums of one side, about `centre`, the maximum of those that were: afterwards they are
// about the larger of the two. second, hard: S e^2 2^e and the sum at temperature 1, where there are such.
template <typename T>
EAKD_HD void add_column(T centre, T x, T k, T* sum, T* first, T* second = nullptr, T* hard = nullptr) {
  if (x == T(-INFINITY)) return;
  T at = 0;
  if (x > centre || centre == T(-INFINITY)) {
    // 2^step = 0 meets sums times the step, which must stay finite.
    T none = 0;
    const T step = exponent_step(centre == T(-INFINITY) ? T(0) : (centre - x) * k);
    rescale_moments(step, sum, first, second == nullptr ? &none : second);
    if (hard != nullptr) *hard *= centre == T(-INFINITY) ? T(0) : pow2((centre - x) * T(kLog2E));
  } else {
    at = exponent_step((x - centre) * k);
  }
  const T e = pow2(at);
  *sum += e, *first += e * at;
  if (second != nullptr) *second += e * at * at;
  if (hard != nullptr) *hard += x > centre || centre == T(-INFINITY) ? T(1) : pow2((x - centre) * T(kLog2E));
}

}  // namespace
}  // namespace eakd
