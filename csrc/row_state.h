// The maths of the package, once, for host and device code: what one sweep over a row carries, how two partial
// sweeps merge, and what the loss, the weight and the gradient make of the result. docs/math.md derives it.
//
// One row: student logits z, teacher logits y, KD temperature tau, entropy temperature t. With centred base-2 exponents
//     b = (y - My) log2(e)/tau   d = (z - Mz) log2(e)/tau   a = (y - My) log2(e)/t   e = (z - Mz) log2(e)/t
// the state is
//     My, Mz           running maxima (-inf: nothing but -inf was seen, and every sum below is 0)
//     A0 = S 2^a       A1 = S a 2^a                 teacher entropy
//     E0 = S 2^e       E1 = S e 2^e                 student entropy
//     B0 = S 2^b       D0 = S 2^d    Bd = S (b - d) 2^b   forward KL
//     F0 = S 2^((z - Mz) log2(e))                   hard-label cross-entropy at temperature 1
//     B1 = S b 2^b     D1 = S d 2^d  Bbd = S b (b - d) 2^b   derivatives in tau, filled only when asked for
// Base 2 because that is the exponential that hardware has; the factors ln 2 come in at the end.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define EAKD_HD __host__ __device__ __forceinline__
#else
// Columns' formulas return several vectors, which a call would pass through memory.
#define EAKD_HD inline __attribute__((always_inline))
#endif

namespace eakd {
// Order of the rows of the statistics tensor, as eakd_kernels/stats.py names them. The first six are public; the
// next six are what the gradient needs (sums, not log-sum-exps: at an offset of 1000 an fp32 lse has steps of 6e-5);
// the teacher's sum at t is what merging shards of a row needs besides; the last two are there only for a temperature
// that requires grad.
enum Field : int {
  kDivergence,
  kTeacherEntropy,
  kStudentEntropy,
  kTeacherLse,
  kStudentLse,
  kCrossEntropy,
  kTeacherMax,
  kStudentMax,
  kTeacherSum,
  kStudentSum,
  kStudentEntropySum,
  kStudentHardSum,
  kTeacherEntropySum,
  kNumStatistics,
  kDivergenceSlope = kNumStatistics,
  kStudentLseSlope,
  kNumStatisticsWithSlopes,
  // The one-pass operator returns the six public fields and these two.
  kWeight = 6,
  kLoss,
  kNumLossStatistics,
};

enum Weighting : int { kWeightNone, kWeightTeacher, kWeightStudent, kWeightEA, kWeightTensor };

// How a row's statistics become its share of the loss: kd_weight * w * (tau^2) * D + ce_weight * CE.
struct LossRule {
  Weighting weighting;
  bool tau_squared;
  double entropy_bound;  // H_ub, nats
  double weight_scale;   // multiplies every weight: 1/H_ub for weight_norm="bound"
  double kd_weight, ce_weight;
};

// One copy per translation unit: the same header is compiled for several instruction sets, and a linker that merged
// the copies could hand AVX-512 code to a machine without it.
namespace {

// <cmath>'s overloads are inline functions of the standard library, which the note above keeps out of here.
EAKD_HD float pow2(float x) { return exp2f(x); }
EAKD_HD double pow2(double x) { return ::exp2(x); }
EAKD_HD float ln(float x) { return logf(x); }
EAKD_HD double ln(double x) { return ::log(x); }

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// log2(e)/temperature for the three temperatures of a row; `tau` and `t` themselves for the gradients.
template <typename T>
struct Temperatures {
  T tau, t;
  T k_tau, k_t;
  EAKD_HD Temperatures(double tau_, double t_) : tau(T(tau_)), t(T(t_)), k_tau(T(kLog2E / tau_)), k_t(T(kLog2E / t_)) {}
  EAKD_HD Temperatures(T tau_, T t_, T k_tau_, T k_t_) : tau(tau_), t(t_), k_tau(k_tau_), k_t(k_t_) {}
};

// One number for each of the exponents above; `hard` is the one at temperature 1.
template <typename T>
struct PerExponent {
  T a, e, b, d, hard;
};

// A step is multiplied by sums before the factor 2^step = 0 is: it must stay finite, 0 * (-inf) would be NaN.
EAKD_HD float exponent_step(float step) { return step < -0x1p100f ? -0x1p100f : step; }
EAKD_HD double exponent_step(double step) { return step < -0x1p1000 ? -0x1p1000 : step; }

template <typename T>
struct RowState {
  T My = T(-INFINITY), Mz = T(-INFINITY);
  T A0 = 0, A1 = 0, E0 = 0, E1 = 0, B0 = 0, Bd = 0, D0 = 0, F0 = 0;
  T B1 = 0, D1 = 0, Bbd = 0;

  // Every exponent grows by a constant; `factor` is 2 to the power of it.
  EAKD_HD void rescale(const PerExponent<T>& by, const PerExponent<T>& factor) {
    A1 = factor.a * (A1 + by.a * A0), A0 *= factor.a;
    E1 = factor.e * (E1 + by.e * E0), E0 *= factor.e;
    // b - d moves with either, so Bd changes even where only the student's maximum moved. Teacher mass that vanishes
    // (factor.b == 0) takes an infinite Bd with it; times B0, so that NaN stays.
    const bool vanished = factor.b == 0;
    Bbd = vanished ? factor.b * B0 : factor.b * (Bbd + by.b * Bd + (by.b - by.d) * (B1 + by.b * B0));
    Bd = vanished ? factor.b * B0 : factor.b * (Bd + (by.b - by.d) * B0);
    B1 = factor.b * (B1 + by.b * B0), B0 *= factor.b;
    D1 = factor.d * (D1 + by.d * D0), D0 *= factor.d;
    if (F0 != 0) F0 *= factor.hard;
  }

  // Re-centre on maxima (my, mz) that are at least the present ones: every exponent grows by a constant <= 0.
  EAKD_HD void recentre(T my, T mz, const Temperatures<T>& k) {
    if (my == My && mz == Mz) return;
    // An empty side has sums of 0 and takes any centre; (-inf) - (-inf) would make them NaN.
    const T y = My == T(-INFINITY) ? T(0) : My - my, z = Mz == T(-INFINITY) ? T(0) : Mz - mz;
    const PerExponent<T> by = {exponent_step(y * k.k_t), exponent_step(z * k.k_t), exponent_step(y * k.k_tau),
                               exponent_step(z * k.k_tau), exponent_step(z * T(kLog2E))};
    rescale(by, {pow2(by.a), pow2(by.e), pow2(by.b), pow2(by.d), pow2(by.hard)});
    My = my, Mz = mz;
  }

  // The state of two disjoint sets of columns. Associative and commutative up to rounding, so it serves blocks,
  // threads, vocabulary shards and ranks; callers fix the order to stay deterministic.
  EAKD_HD void merge(RowState other, const Temperatures<T>& k) {
    const T my = My > other.My ? My : other.My, mz = Mz > other.Mz ? Mz : other.Mz;
    recentre(my, mz, k), other.recentre(my, mz, k);
    A0 += other.A0, A1 += other.A1, E0 += other.E0, E1 += other.E1;
    B0 += other.B0, Bd += other.Bd, D0 += other.D0, F0 += other.F0;
    B1 += other.B1, D1 += other.D1, Bbd += other.Bbd;
  }
};

template <typename T>
struct RowResult {
  T divergence, teacher_entropy, student_entropy, teacher_lse, student_lse, cross_entropy;
  T divergence_slope, student_lse_slope;  // d/dtau
};

template <typename T>
EAKD_HD T nonnegative(T x) {  // an entropy falls below 0 by rounding only; NaN stays
  return x < 0 ? T(0) : x;
}

// A side that is -inf throughout has no distribution: its own statistics read 0. The divergence is 0 where the teacher
// has no mass and +inf where only the student has none. NaN != 0, so NaN takes the ordinary formulas and stays NaN; the
// products with the other side's sum keep a NaN that is there.
template <typename T>
EAKD_HD RowResult<T> finish(const RowState<T>& s, const Temperatures<T>& k, T label_logit) {
  const T ln2 = T(kLn2);
  RowResult<T> r;
  r.teacher_entropy = s.A0 == 0 ? T(0) : nonnegative(ln(s.A0) - ln2 * (s.A1 / s.A0));
  r.student_entropy = s.E0 == 0 ? T(0) : nonnegative(ln(s.E0) - ln2 * (s.E1 / s.E0));
  r.teacher_lse = s.B0 == 0 ? T(0) : s.My / k.tau + ln(s.B0);
  r.student_lse = s.D0 == 0 ? T(0) : s.Mz / k.tau + ln(s.D0);
  r.divergence = s.B0 == 0 ? T(0) * s.D0 : s.D0 == 0 ? T(INFINITY) * s.B0 : ln2 * (s.Bd / s.B0) + ln(s.D0 / s.B0);
  r.cross_entropy = s.F0 == 0 ? T(0) : (s.Mz - label_logit) + ln(s.F0);
  // d lse_S/dtau = -E_q[z]/tau^2,  dD/dtau = -(E_q[z] - E_p[z] + Cov_p(y, y - z)/tau)/tau^2, in centred exponents
  const T mean_d = s.D1 / s.D0, mean_bd = s.Bd / s.B0, mean_b = s.B1 / s.B0;
  r.student_lse_slope = s.D0 == 0 ? T(0) : -(ln2 * mean_d + s.Mz / k.tau) / k.tau;
  const T covariance = s.Bbd / s.B0 - mean_b * mean_bd;
  r.divergence_slope = s.B0 == 0 ? T(0) : -(ln2 * (mean_d - (mean_b - mean_bd)) + ln2 * ln2 * covariance) / k.tau;
  return r;
}

template <typename T>
struct RowLoss {
  T weight, loss;
  T divergence_factor;  // d loss / d D
};

// `given` is the row's entry of a weight tensor, used when rule.weighting says so.
template <typename T>
EAKD_HD RowLoss<T> row_loss(const RowResult<T>& r, const Temperatures<T>& k, const LossRule& rule, T given) {
  const T bound = T(rule.entropy_bound);
  T w = T(1);
  switch (rule.weighting) {
    case kWeightNone: break;
    case kWeightTeacher: w = r.teacher_entropy; break;
    case kWeightStudent: w = r.student_entropy; break;
    case kWeightEA: w = bound == 0 ? T(0) : T(0.5) * r.teacher_entropy * (1 + r.student_entropy / bound); break;
    case kWeightTensor: w = given; break;
  }
  RowLoss<T> out;
  out.weight = w * T(rule.weight_scale);
  out.divergence_factor = T(rule.kd_weight) * out.weight * (rule.tau_squared ? k.tau * k.tau : T(1));
  // A weight of 0 silences an infinite divergence, not a NaN.
  const bool silent = out.divergence_factor == 0 && r.divergence == T(INFINITY);
  out.loss = silent ? T(0) : out.divergence_factor * r.divergence;
  if (rule.ce_weight != 0) out.loss += T(rule.ce_weight) * r.cross_entropy;
  return out;
}

// The student gradient of a row in the basis of docs/math.md:
//     g_j = q 2^d_j + p 2^b_j + hard 2^((z_j - Mz) log2(e)) + entropy 2^e_j (ln2 e_j + entropy_shift) + label [j =
//     label]
template <typename T>
struct GradientBasis {
  T My, Mz;
  T q, p, hard, entropy, entropy_shift, label;

  template <typename U>
  EAKD_HD GradientBasis<U> as() const {
    return {U(My), U(Mz), U(q), U(p), U(hard), U(entropy), U(entropy_shift), U(label)};
  }
};

// From the upstream gradients of the row's divergence, student entropy, student lse and cross-entropy:
//     dD/dz = (q - p)/tau    dlse/dz = q/tau    dH_S/dz = -q' (log q' + H_S)/t    dCE/dz = softmax(z) - onehot
template <typename T>
EAKD_HD GradientBasis<T> gradient_basis(T My, T Mz, T B0, T D0, T E0, T F0, T student_entropy, const Temperatures<T>& k,
                                        T g_divergence, T g_entropy, T g_lse, T g_hard) {
  GradientBasis<T> c;
  c.My = My, c.Mz = Mz;
  // A fully masked side has a sum of 0, and a divergence that does not move.
  if (B0 == 0 || D0 == 0) g_divergence = T(0);
  c.q = D0 == 0 ? T(0) : (g_divergence + g_lse) / (k.tau * D0);
  c.p = B0 == 0 ? T(0) : -g_divergence / (k.tau * B0);
  c.entropy = E0 == 0 ? T(0) : -g_entropy / (k.t * E0);
  c.entropy_shift = E0 == 0 ? T(0) : student_entropy - ln(E0);
  c.hard = F0 == 0 ? T(0) : g_hard / F0;
  c.label = F0 == 0 ? T(0) : -g_hard;
  return c;
}

}  // namespace
}  // namespace eakd
