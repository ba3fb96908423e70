// What a thread sums over its columns: the RowState of row_state.h, in two ways.
//
// Fast: exponents are fma(logit, k, c) with c = -centre k rounded, one instruction; all terms of a thread share the
// rounding of c, which is taken out at the end (`about`). Where P tau = t for a small integer P, the exponential at tau
// is the one at t to the power of P, and all exponents and first moments are in units of those at t.
// Its centre may lie a few octaves below the maximum, and moves only when that is too many.
//
// Guarded: exponents are (logit - maximum) k and no infinity meets a zero. It takes everything: -inf, NaN, logits so
// large that c is off by whole exponents, and it has the slopes. A thread that finds that the fast way was not for its
// columns goes through them again, from memory.
#pragma once

#include "columns.cuh"

namespace eakd {
namespace cuda {
namespace {

constexpr float kLog2Ef = static_cast<float>(kLog2E);
// The fast way takes logits up to this size, and centres of so many octaves: the rounding of c, half an octave at that
// size, must not carry exponentials out of range before it is taken out.
constexpr float kLargest = 1e6f, kLargestExponent = 0x1p23f;
// Octaves, at the coldest temperature that is summed at, that a logit may lie above the centre.
constexpr float kHeadroom = 8.f;

__device__ __forceinline__ Temperatures<float> row_temperatures(const RowJob& job, int row) {
  if (job.temperatures.data == nullptr) return {job.tau, job.t, job.k_tau, job.k_t};
  const float tau = job.temperatures.at(row, 1);
  return {tau, job.t, kLog2Ef / tau, job.k_t};
}

__device__ __forceinline__ float centre(float m) { return m == -INFINITY ? 0.f : m; }

template <int N>
__device__ __forceinline__ float power(float u) {
  float result = u;
#pragma unroll
  for (int i = 1; i < N; ++i)
    result *= u;
  return result;
}

// Where a temperature is 1, the sum for the cross-entropy is there already.
__device__ __forceinline__ void place_hard_sum(RowState<float>& s, HardSum hard) {
  if (hard == kHardSumAtTau) s.F0 = s.D0;
  if (hard == kHardSumAtT) s.F0 = s.E0;
}

template <int P>
struct FastSums {
  static constexpr bool kShared = P > 0;
  RowState<float> s;   // My, Mz: the largest logits so far, of this thread or of the first of its warp
  float top_y, top_z;  // what raises the centres
  float cb, cd, ca, ce, ch;
  float k_b, k_a, coldest;

  __device__ __forceinline__ FastSums(const Temperatures<float>& k, HardSum hard)
      : top_y(-INFINITY),
        top_z(-INFINITY),
        cb(0),
        cd(0),
        ca(0),
        ce(0),
        ch(0),
        k_b(kShared ? k.k_t : k.k_tau),
        k_a(k.k_t),
        coldest(fmaxf(fmaxf(k.k_tau, k.k_t), hard == kOwnHardSum ? kLog2Ef : 0.f)) {}

  // Before the first column, and where centres move. They start the same in every thread of a warp, so as to move
  // seldom.
  __device__ __forceinline__ void start(float my, float mz) {
    s.My = my, s.Mz = mz;
    const float y = centre(my), z = centre(mz), headroom = kHeadroom / coldest;
    cb = -y * k_b, cd = -z * k_b, ch = -z * kLog2Ef;
    if (!kShared) ca = -y * k_a, ce = -z * k_a;
    top_y = y + headroom, top_z = z + headroom;
  }

  // Moves the centres to logits (my, mz) where these have outgrown them.
  __device__ __forceinline__ void follow(float my, float mz) {
    s.My = fmaxf(s.My, my), s.Mz = fmaxf(s.Mz, mz);
    if (s.My > top_y || s.Mz > top_z) {
      const PerExponent<float> old = {ca, ce, cb, cd, ch};
      start(s.My, s.Mz);
      shift({ca - old.a, ce - old.e, cb - old.b, cd - old.d, ch - old.hard});
    }
  }

  __device__ __forceinline__ void shift(PerExponent<float> by) {
    PerExponent<float> factor;
    if (kShared) {
      const float u = ptx::ex2(by.b), v = ptx::ex2(by.d);
      by.a = by.b, by.e = by.d;
      factor.b = power<P>(u), factor.d = power<P>(v), factor.a = u, factor.e = v;
      if (P == 1) s.A0 = s.B0, s.E0 = s.D0;
    } else {
      factor.b = ptx::ex2(by.b), factor.d = ptx::ex2(by.d), factor.a = ptx::ex2(by.a), factor.e = ptx::ex2(by.e);
    }
    factor.hard = ptx::ex2(by.hard);
    s.rescale(by, factor);
  }

  __device__ __forceinline__ void add(float y, float z) {
    const float b = fmaf(y, k_b, cb), d = fmaf(z, k_b, cd), u = ptx::ex2(b), v = ptx::ex2(d);
    if (kShared) {
      const float eb = power<P>(u), ed = power<P>(v);
      s.B0 += eb, s.D0 += ed, s.Bd = fmaf(eb, b - d, s.Bd);
      s.A1 = fmaf(u, b, s.A1), s.E1 = fmaf(v, d, s.E1);
      if (P != 1) s.A0 += u, s.E0 += v;
    } else {
      const float a = fmaf(y, k_a, ca), e = fmaf(z, k_a, ce), ea = ptx::ex2(a), ee = ptx::ex2(e);
      s.B0 += u, s.D0 += v, s.Bd = fmaf(u, b - d, s.Bd);
      s.A0 += ea, s.A1 = fmaf(ea, a, s.A1), s.E0 += ee, s.E1 = fmaf(ee, e, s.E1);
    }
  }

  __device__ __forceinline__ void add_hard(float z) { s.F0 += ptx::ex2(fmaf(z, kLog2Ef, ch)); }

  __device__ __forceinline__ void add_column(float y, float z) { add(y, z), add_hard(z); }

  template <typename S, typename T, int W>
  __device__ __forceinline__ void add(const Packed<T, W>& y, const Packed<S, W>& z, bool own_hard_sum) {
#pragma unroll
    for (int i = 0; i < W; ++i)
      add(y[i], z[i]);
    if (own_hard_sum) {
#pragma unroll
      for (int i = 0; i < W; ++i)
        add_hard(z[i]);
    }
  }

  // The sums of a thread that met -inf or NaN are no numbers: one of the factors of a first moment was 0 or NaN.
  __device__ __forceinline__ bool was_too_fast() const {
    const float found = s.A1 + s.E1 + s.Bd + s.D0 + s.F0;
    const bool large = (fabsf(s.My) > kLargest && s.My != -INFINITY) || (fabsf(s.Mz) > kLargest && s.Mz != -INFINITY);
    const float centres = fmaxf(fmaxf(fabsf(cb), fabsf(cd)) * (kShared ? P : 1), fmaxf(fabsf(ca), fabsf(ce)));
    return !(fabsf(found) < INFINITY) || large || centres > kLargestExponent;
  }

  // As row_state.h has it, about maxima that are at least its own. Only where it was not too fast.
  __device__ __forceinline__ RowState<float> about(float my, float mz, HardSum hard) {
    const float y = centre(my), z = centre(mz);
    shift({-fmaf(y, k_a, ca), -fmaf(z, k_a, ce), -fmaf(y, k_b, cb), -fmaf(z, k_b, cd), -fmaf(z, kLog2Ef, ch)});
    RowState<float> r = s;
    if (kShared) r.Bd *= P;
    if (P == 1) r.A0 = r.B0, r.E0 = r.D0;
    place_hard_sum(r, hard);
    r.B1 = r.D1 = r.Bbd = 0;
    r.My = my, r.Mz = mz;
    return r;
  }
};

struct GuardedSums {
  RowState<float> s;
  bool slopes, own_hard_sum;

  __device__ __forceinline__ GuardedSums(const RowJob& job, float my, float mz)
      : slopes(job.slopes), own_hard_sum(job.hard == kOwnHardSum) {
    s.My = my, s.Mz = mz;
  }

  __device__ __forceinline__ void add(float y, float z, const Temperatures<float>& k) {
    const float y_step = y - centre(s.My), z_step = z - centre(s.Mz);
    const float b = y_step * k.k_tau, d = z_step * k.k_tau, a = y_step * k.k_t, e = z_step * k.k_t;
    const float eb = ptx::ex2(b), ed = ptx::ex2(d), ea = ptx::ex2(a), ee = ptx::ex2(e);
    s.A0 += ea, s.E0 += ee, s.B0 += eb, s.D0 += ed;
    // No mass, no term; NaN is no mass either, and is in the sums. The student's exponent may be -inf in the cross
    // term: under teacher mass that is an infinite divergence.
    if (ea > 0) s.A1 = fmaf(ea, a, s.A1);
    if (ee > 0) s.E1 = fmaf(ee, e, s.E1);
    if (eb > 0) s.Bd = fmaf(eb, b - d, s.Bd);
    if (own_hard_sum) s.F0 += ptx::ex2(z_step * kLog2Ef);
    if (!slopes) return;
    if (eb > 0) s.B1 = fmaf(eb, b, s.B1), s.Bbd = fmaf(eb, b * (b - d), s.Bbd);
    if (ed > 0) s.D1 = fmaf(ed, d, s.D1);
  }
};

// The columns of a share, and a loose one, the slow and certain way.
template <typename S, typename T, int W>
__device__ RowState<float> guarded_sums(const RowJob& job, const RowColumns<S, T, W>& row, const Share& share,
                                        int loose, const Temperatures<float>& k) {
  const auto each = [&](auto&& visit) {
#pragma unroll 1
    for (int v = share.first; v < share.end; v += share.step)
#pragma unroll 1
      for (int i = row.column(v); i < row.column(v) + W; ++i)
        visit(row.teacher_at(i), row.student_at(i));
    if (loose >= 0) visit(row.teacher_at(loose), row.student_at(loose));
  };
  float my = -INFINITY, mz = -INFINITY;
  each([&](float y, float z) { my = fmaxf(my, y), mz = fmaxf(mz, z); });
  GuardedSums sums(job, my, mz);
  each([&](float y, float z) { sums.add(y, z, k); });
  place_hard_sum(sums.s, job.hard);
  return sums.s;
}

}  // namespace
}  // namespace cuda
}  // namespace eakd
