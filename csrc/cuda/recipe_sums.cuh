// What a thread sums over its columns in the sweeps of ../recipe.h. Every sum is about the row's own maxima, which the
// first sweep has found: exponents are <= 0 and nothing is ever rescaled.
#pragma once

#include "recipe_columns.cuh"
#include "row_sums.cuh"

namespace eakd {
namespace cuda {
namespace {

// At least those of every sweep: as many as a warp adds up at once.
constexpr int kSweepSums = 8;

// x of a logit.
__device__ __forceinline__ float logit(const Side& side, float raw) {
  const float x = raw * side.scale;
  if (side.cap == 0 || x == -INFINITY) return x;
  return side.cap * tanhf(x / side.cap);
}

struct DeviceMath {
  using Scalar = float;
  static __device__ __forceinline__ float abs(float x) { return fabsf(x); }
  static __device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }
  static __device__ __forceinline__ float exp2(float x) { return ptx::ex2(x); }
  static __device__ __forceinline__ float exp2_below_128(float x) { return ptx::ex2(x); }
  static __device__ __forceinline__ float exp2_bounded(float x) { return ptx::ex2(x); }
  static __device__ __forceinline__ float ln(float x) { return logf(x); }

  // 2^x - 1 for x <= 0: the series of e^(x ln 2) - 1 where the difference would cancel.
  static __device__ __forceinline__ float exp2m1(float x) {
    float series = 1.5252734e-5f;  // ln(2)^n / n!, n = 7 .. 1
    series = fmaf(series, x, 1.5403530e-4f), series = fmaf(series, x, 1.3333558e-3f);
    series = fmaf(series, x, 9.6181291e-3f), series = fmaf(series, x, 5.5504109e-2f);
    series = fmaf(series, x, 2.4022651e-1f), series = fmaf(series, x, 6.9314718e-1f);
    return x > -0.5f ? series * x : ptx::ex2(x) - 1.f;
  }
};

// A row's columns at one temperature: exponents b = (y - My) k_b + class bias, d = (z - Mz) k_d, and what makes
// probabilities of them. `c` and `q` are the gradient's (recipe_result.h, TauBasis).
struct alignas(16) TauNumbers {
  float k_b, k_d, over_B0, over_D0;    // 1/B0; 0 where there is no mass
  float log_B0, log_D0, log_ratio, c;  // base 2; log_ratio of B0/D0
  float q;
  float pull;  // S h, of the KL family, where it need not be summed
  float unused[2];

  __device__ __forceinline__ void normalise(float B0, float D0) {
    over_B0 = B0 == 0 ? 0.f : 1 / B0, over_D0 = D0 == 0 ? 0.f : 1 / D0;
    log_B0 = B0 == 0 ? 0.f : log2f(B0), log_D0 = D0 == 0 ? 0.f : log2f(D0);
    log_ratio = B0 == 0 || D0 == 0 ? log_B0 - log_D0 : log2f(B0 / D0);
  }

  // difference: b - d.
  __device__ __forceinline__ Column<float> column(float b, float d, float difference) const {
    return {ptx::ex2(b) * over_B0, ptx::ex2(d) * over_D0, b - log_B0, d - log_D0,
            static_cast<float>(kLn2) * (difference - log_ratio)};
  }
};

// Of both sides over columns that are not -inf: how many, and S (x - centre), S (x - centre)^2.
struct MomentSums {
  float s[kSweepSums] = {};
  float centre_y, centre_z;

  __device__ __forceinline__ MomentSums(float y, float z) : centre_y(y), centre_z(z) {}

  __device__ __forceinline__ void add(float y, float z, int) {
    const float y_step = y - centre_y, z_step = z - centre_z;
    if (y != -INFINITY) s[0] += 1, s[1] += y_step, s[2] = fmaf(y_step, y_step, s[2]);
    if (z != -INFINITY) s[3] += 1, s[4] += z_step, s[5] = fmaf(z_step, z_step, s[5]);
  }
};

// Entropies and cross-entropy: A0, A1, E0, E1, F0, E2 of recipe.h.
struct EntropySums {
  float s[kSweepSums] = {};
  float My, Mz, k_a, k_e;
  bool hard;

  __device__ __forceinline__ EntropySums(float My, float Mz, float k_a, float k_e, bool hard)
      : My(My), Mz(Mz), k_a(k_a), k_e(k_e), hard(hard) {}

  __device__ __forceinline__ void add(float y, float z, int) {
    const float z_step = z - Mz, a = (y - My) * k_a, e = z_step * k_e, ea = ptx::ex2(a), ee = ptx::ex2(e);
    s[0] += ea, s[2] += ee;
    // No mass, no term. NaN is no mass either, and is in the sums.
    if (ea > 0) s[1] = fmaf(ea, a, s[1]);
    if (ee > 0) s[3] = fmaf(ee, e, s[3]), s[5] = fmaf(ee * e, e, s[5]);
    if (hard) s[4] += ptx::ex2(z_step * kLog2Ef);
  }
};

// Exponents of one temperature.
struct Exponents {
  float My, Mz, k_b, k_d;
  const float* class_bias;
  int columns;

  __device__ __forceinline__ Exponents(const RecipeJob& job, const TauNumbers& tau, float My, float Mz)
      : My(My), Mz(Mz), k_b(tau.k_b), k_d(tau.k_d), class_bias(job.class_bias), columns(job.vocab_size) {}

  __device__ __forceinline__ float b(float y) const { return (y - My) * k_b; }
  __device__ __forceinline__ float d(float z) const { return (z - Mz) * k_d; }
  // b - d but for the bias: from the difference of logits, which is exact where both sides have the same temperature.
  __device__ __forceinline__ float difference(float y, float z) const {
    return k_b == k_d ? ((y - My) - (z - Mz)) * k_b : b(y) - d(z);
  }
  __device__ __forceinline__ float bias(int column) const {
    return class_bias == nullptr || column >= columns ? 0.f : kLog2Ef * class_bias[column];
  }
};

// B0, D0, Bd, Dd of recipe.h.
struct TauSweep {
  float s[kSweepSums] = {};
  const Exponents exponents;

  __device__ __forceinline__ explicit TauSweep(const Exponents& exponents) : exponents(exponents) {}

  __device__ __forceinline__ void add(float y, float z, int column) {
    const float b = exponents.b(y) + exponents.bias(column), d = exponents.d(z), eb = ptx::ex2(b), ed = ptx::ex2(d);
    s[0] += eb, s[1] += ed;
    // The other side's exponent may be -inf: an infinite divergence.
    if (eb > 0) s[2] = fmaf(eb, b - d, s[2]);
    if (ed > 0) s[3] = fmaf(ed, d - b, s[3]);
  }
};

// f, h, hd, fb, pb, qd of recipe.h, the last four where pulls are wanted. Of the KL family, whose S h is known, not hd
// but S (h - q S h) d, in which less cancels.
struct ValueSweep {
  float s[kSweepSums] = {};
  const RecipeJob& job;
  const Exponents exponents;
  const TauNumbers& tau;
  bool pulls;

  __device__ __forceinline__ ValueSweep(const RecipeJob& job, const Exponents& exponents, const TauNumbers& tau,
                                        bool pulls)
      : job(job), exponents(exponents), tau(tau), pulls(pulls) {}

  __device__ __forceinline__ void add(float y, float z, int column) {
    if (y == -INFINITY && z == -INFINITY) return;
    const float b = exponents.b(y), d = exponents.d(z), bias = exponents.bias(column);
    const Column<float> c = tau.column(b + bias, d, exponents.difference(y, z) + bias);
    Terms<float> t;
    with_kind(job.recipe.divergence,
              [&](auto kind) { t = terms<decltype(kind)::value, DeviceMath>(c, job.first, job.second); });
    s[0] += t.f, s[1] += t.h;
    if (!pulls) return;
    const float moved = job.recipe.is_kl() ? t.h - tau.pull * c.q : t.h;
    // A masked logit does not move, whatever hangs on it.
    if (d != -INFINITY) s[2] = fmaf(moved, d, s[2]), s[5] = fmaf(c.q, d, s[5]);
    if (b != -INFINITY) s[3] = fmaf(job.degree * t.f - t.h, b, s[3]), s[4] = fmaf(c.p, b, s[4]);
  }
};

}  // namespace
}  // namespace cuda
}  // namespace eakd
