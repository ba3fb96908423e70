// What every column adds to a divergence, and its derivative: the one place to add a divergence for C++ and CUDA. The
// Python twin, differentiated by PyTorch, is eakd_kernels/divergences.py; Triton's is backends/triton/divergence.py.
//
// A divergence is D = sum_j f(p_j, q_j), p the teacher, q the student. With h_j = df/d(log q_j) its gradient in the
// student's exponents is h_j - q_j sum_k h_k. All formulas but AlphaBeta's are homogeneous of degree 1 in (p, q), so
// that df/d(log p_j) = degree f - h_j needs no formula of its own.
#pragma once

#include "row_state.h"

namespace eakd {

enum Divergence : int {
  kKL,  // first KL(p || q) + second KL(q || p)
  kJSD,
  kSkewForwardKL,
  kSkewReverseKL,
  kTotalVariation,
  kAlphaBeta,
  kSquaredHellinger,
  kUsualAlphaBeta,  // kAlphaBeta with a, b > 0 and 1/2 <= a + b <= 2, for loops that are compiled for it
  kDecoupled = 16,  // first TCKD + second NCKD (recipe_result.h); its columns are those of KL(p || q) without the label
};

namespace {

// One column: probabilities, their base-2 logarithms, and delta = ln p - ln q. V is float, double, or a vector of them.
template <typename V>
struct Column {
  V p, q, log2_p, log2_q, delta;
};

template <typename V>
struct Terms {
  V f, h;
};

// mass * x, and 0 where there is no mass, whatever x is.
template <typename V>
EAKD_HD V times(V mass, V x) {
  return mass == 0 ? V{} : mass * x;  // NaN stays
}

// m = of_p p + of_q q, weights > 0 of sum 1, in log space, from the smaller of p/q and q/p: log p - log m, log q - log
// m, p/m and q/m.
template <typename V>
struct Mixture {
  V p_over_m, q_over_m, p_share, q_share;

  template <typename Math>
  static EAKD_HD Mixture of(const Column<V>& c, V of_p, V of_q) {
    typedef typename Math::Scalar T;
    const auto larger_p = c.delta > T(0);
    const V magnitude = Math::abs(c.delta);
    const V ratio = Math::exp2_below_128(magnitude * T(-kLog2E)), one = V{} + 1;
    const V x = (larger_p ? of_p : of_q) + (larger_p ? of_q : of_p) * ratio;  // m over the larger
    const V log_x = Math::ln(x), p_share = (larger_p ? one : ratio) / x, q_share = (larger_p ? ratio : one) / x;
    return {larger_p ? -log_x : c.delta - log_x, larger_p ? -c.delta - log_x : -log_x, p_share, q_share};
  }
};

// 2^shift (p^x - q^x)/x, the fraction delta at x = 0: by the larger of the two and 1 - 2^(a negative power), so that
// nothing cancels where p and q are close or x is small. One power of 2: factors may be out of range where the product
// is not.
template <typename Math, typename V, typename T>
EAKD_HD V power_difference(const Column<V>& c, T x, V shift) {
  if (x == 0) return times(Math::exp2(shift), c.delta);
  const V u = c.log2_p * x, v = c.log2_q * x;
  const V larger = u > v ? u : v;
  const T size = x < 0 ? -x : x;
  const auto larger_p = c.delta > T(0);
  const V magnitude = Math::abs(c.delta);
  const V value = times(-Math::exp2m1(magnitude * (size * T(-kLog2E))), Math::exp2(larger + shift)) / size;
  return shift == T(-INFINITY) ? V{} : (larger_p ? value : -value);
}

// mass^x for 1/2 <= x <= 2. A logarithm of 17 has lost four bits, so the mass itself goes with what is left of the
// power; below 1e-38 nothing is left of it either way.
template <typename Math, typename V, typename T>
EAKD_HD V power_near_one(V mass, V log2_mass, T x) {
  return mass * Math::exp2_bounded((x - 1) * Math::larger(log2_mass, V{} + T(-150)));
}

// mass^x. As near 1 where the mass has not underflowed.
template <typename Math, typename V, typename T>
EAKD_HD V power_of(V mass, V log2_mass, T x) {
  if (!(x > 0 && x <= 2)) return Math::exp2(log2_mass * x);
  if (x >= T(0.5)) return power_near_one<Math>(mass, log2_mass, x);
  const auto there = mass > T(1e-30);
  const V rest = Math::exp2_below_128(log2_mass * (there ? V{} + (x - 1) : V{} + x));
  return there ? mass * rest : rest;
}

// AlphaBeta with both powers positive, as almost everybody has them, in three exponentials: with e the larger of p and
// q to the power s = a + b, and A, B = 1 - e^(-a |delta|), 1 - e^(-b |delta|),
//     (p^s - q^s)/s = +-e S/s        q^b (p^a - q^a)/a = e (1 - B) A/a, or -e A/a where q is larger
//     S = A + B - A B
// NEAR: 1/2 <= s <= 2. No mass, no term.
template <bool NEAR, typename Math, typename V, typename T>
EAKD_HD Terms<V> positive_alpha_beta(const Column<V>& c, T a, T b) {
  const T s = a + b;
  const auto larger_p = c.delta > T(0);
  const V magnitude = Math::abs(c.delta), mass = Math::larger(c.p, c.q), log2_mass = Math::larger(c.log2_p, c.log2_q);
  const V e = NEAR ? power_near_one<Math>(mass, log2_mass, s) : power_of<Math>(mass, log2_mass, s);
  const V A = -Math::exp2m1(magnitude * (a * T(-kLog2E))), B = -Math::exp2m1(magnitude * (b * T(-kLog2E)));
  const V S = (A + B - A * B) * (1 / s), share = A * (1 / a);
  const V h = larger_p ? (B - T(1)) * share : share, f = (1 / b) * ((larger_p ? S : -S) + h);
  return {times(e, f), times(e, h)};
}

// f = ((p^s - q^s)/s - q^b (p^a - q^a)/a)/b with s = a + b, and its limits; h = -q^b (p^a - q^a)/a
template <typename Math, typename V, typename T>
EAKD_HD Terms<V> alpha_beta(const Column<V>& c, T a, T b) {
  if (a > 0 && b > 0) return positive_alpha_beta<false, Math>(c, a, b);
  if (b == 0) {
    const V from_a = power_difference<Math>(c, a, V{});
    const V f = a == 0 ? T(0.5) * c.delta * c.delta : (times(power_of<Math>(c.p, c.log2_p, a), c.delta) - from_a) / a;
    return {f, -from_a};
  }
  const V h = -power_difference<Math>(c, a, b * c.log2_q);
  return {(power_difference<Math>(c, a + b, V{}) + h) / b, h};
}

// first, second: the divergence's parameters, or the weights of a mixture. Without mass on either side, where delta is
// NaN, both terms are 0.
template <int KIND, typename Math, typename V, typename T>
EAKD_HD Terms<V> terms(const Column<V>& c, T first, T second) {
  if constexpr (KIND == kKL) {
    const V forward = first == 0 ? V{} : times(c.p, c.delta), reverse = second == 0 ? V{} : times(c.q, -c.delta);
    return {first * forward + second * reverse, second * (c.q + reverse) - first * c.p};
  } else if constexpr (KIND == kJSD) {
    const auto m = Mixture<V>::template of<Math>(c, V{} + first, V{} + second);
    const V h = second * times(c.q, m.q_over_m);
    return {first * times(c.p, m.p_over_m) + h, h};
  } else if constexpr (KIND == kSkewForwardKL) {
    const auto m = Mixture<V>::template of<Math>(c, V{} + first, V{} + second);
    return {times(c.p, m.p_over_m), -second * times(c.p, m.q_share)};
  } else if constexpr (KIND == kSkewReverseKL) {
    const auto m = Mixture<V>::template of<Math>(c, V{} + second, V{} + first);
    const V f = times(c.q, m.q_over_m);
    return {f, f + second * times(c.q, m.p_share)};  // q (1 - first q/m), which would cancel
  } else if constexpr (KIND == kTotalVariation) {
    const V difference = T(0.5) * (c.p - c.q);
    const V half = T(0.5) * c.q;
    return {difference > 0 ? difference : -difference, c.delta > T(0) ? -half : (c.delta < T(0) ? half : V{})};
  } else if constexpr (KIND == kSquaredHellinger) {
    // sqrt p - sqrt q is +- the larger's root times E = 1 - e^(-|delta|/2)
    const auto larger_p = c.delta > T(0);
    const V magnitude = Math::abs(c.delta);
    const V E = -Math::exp2m1(magnitude * T(-0.5 * kLog2E)), half = T(0.5) * E, larger = larger_p ? c.p : c.q;
    return {times(larger, half * E), times(larger, larger_p ? (E - T(1)) * half : half)};
  } else if constexpr (KIND == kUsualAlphaBeta) {
    return positive_alpha_beta<true, Math>(c, first, second);
  } else {
    static_assert(KIND == kAlphaBeta, "a divergence without a formula");
    const Terms<V> t = alpha_beta<Math>(c, first, second);
    const auto nothing = (c.p == 0) & (c.q == 0) & (c.delta != c.delta);
    return {nothing ? V{} : t.f, nothing ? V{} : t.h};
  }
}

// visit(std::integral_constant<int, KIND>): `kind` as a constant.
template <int KIND>
struct Kind {
  static constexpr int value = KIND;
};

template <typename Visit>
EAKD_HD void with_kind(int kind, Visit&& visit) {
  switch (kind) {
    case kJSD: return visit(Kind<kJSD>());
    case kSkewForwardKL: return visit(Kind<kSkewForwardKL>());
    case kSkewReverseKL: return visit(Kind<kSkewReverseKL>());
    case kTotalVariation: return visit(Kind<kTotalVariation>());
    case kAlphaBeta: return visit(Kind<kAlphaBeta>());
    case kSquaredHellinger: return visit(Kind<kSquaredHellinger>());
    default: return visit(Kind<kKL>());
  }
}

EAKD_HD double degree(int kind, double first, double second) { return kind == kAlphaBeta ? first + second : 1; }

}  // namespace
}  // namespace eakd
