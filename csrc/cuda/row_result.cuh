// From the state of a row to what is stored of it: statistics, loss, and the gradient of its columns.
#pragma once

#include "row_sums.cuh"

namespace eakd {
namespace cuda {
namespace {

__device__ __forceinline__ void store_fields(const RowJob& job, int row, const RowResult<float>& r) {
  const auto store = [&](int field, float value) { job.out[job.at(field, row)] = value; };
  store(kDivergence, r.divergence);
  store(kTeacherEntropy, r.teacher_entropy), store(kStudentEntropy, r.student_entropy);
  store(kTeacherLse, r.teacher_lse), store(kStudentLse, r.student_lse);
  store(kCrossEntropy, job.hard == kNoHardSum ? 0.f : r.cross_entropy);
}

// Rows left out read 0 in every field.
__device__ __forceinline__ void store_no_fields(const RowJob& job, int row, int fields) {
  for (int i = 0; i < fields; ++i)
    job.out[job.at(i, row)] = 0.f;
}

__device__ __forceinline__ int fields_of_statistics(const RowJob& job) {
  return job.slopes ? kNumStatisticsWithSlopes : kNumStatistics;
}

// Row statistics: what people read, and what the gradient needs.
__device__ __forceinline__ void store_statistics(const RowJob& job, int row, const RowState<float>& s,
                                                 const Temperatures<float>& k, float label_logit) {
  const RowResult<float> r = finish(s, k, label_logit);
  store_fields(job, row, r);
  const auto store = [&](int field, float value) { job.out[job.at(field, row)] = value; };
  store(kTeacherMax, s.My), store(kStudentMax, s.Mz);
  store(kTeacherSum, s.B0), store(kStudentSum, s.D0);
  store(kStudentEntropySum, s.E0), store(kStudentHardSum, s.F0);
  store(kTeacherEntropySum, s.A0);
  if (!job.slopes) return;
  store(kDivergenceSlope, r.divergence_slope), store(kStudentLseSlope, r.student_lse_slope);
}

// What a basis has to be for GradientOfRow: finite centres, and one term where tau is 1.
__device__ __forceinline__ GradientBasis<float> prepared(GradientBasis<float> c, HardSum hard) {
  c.My = centre(c.My), c.Mz = centre(c.Mz);
  if (hard == kHardSumAtTau) c.q += c.hard;
  return c;
}

// One pass: statistics, weight and loss, stored if `storing`; the basis of the gradient.
__device__ __forceinline__ GradientBasis<float> finish_row(const RowJob& job, int row, const RowState<float>& s,
                                                           const Temperatures<float>& k, float label_logit,
                                                           bool storing) {
  const RowResult<float> r = finish(s, k, label_logit);
  const RowLoss<float> loss = row_loss(r, k, job.rule, job.weights.at(row, 1.f));
  if (storing) {
    store_fields(job, row, r);
    job.out[job.at(kWeight, row)] = loss.weight, job.out[job.at(kLoss, row)] = loss.loss;
  }
  const float scale = job.denominator == nullptr ? job.scale : job.scale / *job.denominator;
  const float hard = static_cast<float>(job.rule.ce_weight) * scale;
  return prepared(gradient_basis(s.My, s.Mz, s.B0, s.D0, s.E0, s.F0, r.student_entropy, k,
                                 loss.divergence_factor * scale, 0.f, 0.f, hard),
                  job.hard);
}

// The gradient of a row's columns. Factors come after the exponentials: folded into the exponents they would cost its
// last bits. What every column needs is in registers; the rest of the basis stays where it is.
template <bool VECTORS, bool ENTROPY, typename S, typename T, int W>
struct GradientOfRow {
  const RowColumns<S, T, W>& row;
  const GradientColumns<VECTORS, S, T, W> out;
  const GradientBasis<float>& basis;
  float My, Mz, q, p, k_tau, k_t;
  int label;
  bool hard;

  __device__ __forceinline__ GradientOfRow(const RowColumns<S, T, W>& row, const GradientBasis<float>& basis,
                                           const Temperatures<float>& k)
      : row(row),
        out(row),
        basis(basis),
        My(basis.My),
        Mz(basis.Mz),
        q(basis.q),
        p(basis.p),
        k_tau(k.k_tau),
        k_t(k.k_t),
        label(row.label()),
        hard(row.job.hard > kHardSumAtTau) {}

  // But for the label's. Not a fused multiply-add, whose product is exact: where student and teacher agree, the two
  // products must too, so that the gradient is 0.
  __device__ __forceinline__ float of(float y, float z) const {
    return __fadd_rn(__fmul_rn(q, ptx::ex2((z - Mz) * k_tau)), __fmul_rn(p, ptx::ex2((y - My) * k_tau)));
  }

  __device__ __forceinline__ float rarer_terms(float z) const {
    const float z_step = z - Mz;
    float g = hard ? basis.hard * ptx::ex2(z_step * kLog2Ef) : 0.f;
    if (ENTROPY) {
      const float e = z_step * k_t, ee = ptx::ex2(e);
      if (ee > 0) g = fmaf(basis.entropy * ee, fmaf(static_cast<float>(kLn2), e, basis.entropy_shift), g);
    }
    return g;
  }

  __device__ __forceinline__ void vector(int vector, const Packed<T, W>& y, const Packed<S, W>& z) const {
    float g[W];
#pragma unroll
    for (int i = 0; i < W; ++i)
      g[i] = of(y[i], z[i]);
    if (ENTROPY || hard) {
#pragma unroll
      for (int i = 0; i < W; ++i)
        g[i] += rarer_terms(z[i]);
    }
    const int at = label - row.column(vector);
    if (label >= 0 && at >= 0 && at < W) {
#pragma unroll
      for (int i = 0; i < W; ++i)
        if (i == at) g[i] += basis.label;
    }
    out.store_vector(vector, g);
  }

  // A column outside of all vectors.
  __device__ __forceinline__ void column(int i) const {
    if (i < 0) return;
    const float z = row.student_at(i), g = of(row.teacher_at(i), z) + (ENTROPY || hard ? rarer_terms(z) : 0.f);
    out.store_column(i, i == label ? g + basis.label : g);
  }
};

}  // namespace
}  // namespace cuda
}  // namespace eakd
