// From the sums of a row to what is stored of it and to the basis of its gradient, by one warp: a lane a temperature,
// each with a recipe of its own temperature alone. What temperatures share, all lanes compute, and the last one stores.
#pragma once

#include "merge.cuh"
#include "recipe_sums.cuh"
#include "row_result.cuh"

namespace eakd {
namespace cuda {
namespace {

constexpr int kMostRecipeSums = kSweepSums * (1 + kMostTemperatures);

// What a CTA has in shared memory beside its part of the row.
struct RecipeSpace {
  float warps[kRecipeThreads / kWarp][kMostRecipeSums];
  float own[2][kMostRecipeSums];  // by turns, for the other CTAs of the cluster
  float maxima[2];                // of the rest
  float moments[kSweepSums];
  float sums[kMostRecipeSums];    // EntropySums, and TauSweep of every temperature
  float values[kMostRecipeSums];  // ValueSweep of every temperature
  TauNumbers tau[kMostTemperatures];
  Moments<float> teacher, student;  // means about the largest of all columns: far from 0 they would be coarse
  RecipeBasis<float> basis;
  float student_max;     // of all columns
  float label_gradient;  // of a decoupled label, before what RecipeBasis adds
};
static_assert(sizeof(RecipeSpace) <= kRecipeSpace && kRecipeSpace % 128 == 0, "the row comes behind it");

// The label's column as recipe_result.h has it; NaN for a label that is no column.
template <typename S, typename T, int W>
__device__ __forceinline__ LabelColumn<float> label_of(const RecipeJob& job, const RowColumns<S, T, W>& row) {
  const int label = row.label();
  if (label < 0) return {NAN, NAN, 0};
  return {logit(job.teacher_side, row.teacher_at(label)), logit(job.student_side, row.student_at(label)),
          job.class_bias == nullptr ? 0.f : job.class_bias[label]};
}

__device__ __forceinline__ double temperature_of(const RecipeJob& job, int row, int k) {
  return job.temperatures.data == nullptr ? job.recipe.tau[k] : job.temperatures.at(row, 1.f);
}

// One temperature of a row, and the lane that has it.
struct Lane {
  Recipe recipe;
  int k;
  bool last;
  double taus[1];

  __device__ __forceinline__ Lane(const RecipeJob& job, int row) : k(threadIdx.x), last(k == job.recipe.count - 1) {
    const Recipe& all = job.recipe;
    if (k >= all.count) k = all.count - 1;
    recipe.divergence = all.divergence, recipe.first = all.first, recipe.second = all.second;
    recipe.standardize = all.standardize, recipe.count = 1;
    recipe.tau[0] = all.tau[k], recipe.factor[0] = all.factor[k];
    taus[0] = temperature_of(job, row, k);
  }

  // Over temperatures, in their order.
  __device__ __forceinline__ float sum(const RecipeJob& job, float x) const {
    float total = 0;
    for (int i = 0; i < job.recipe.count; ++i)
      total += __shfl_sync(kWholeWarp, x, i);
    return total;
  }
};

// Statistics of one temperature; divergence and slope are those of all. values: whether that sweep ran.
__device__ __forceinline__ RecipeNumbers<float> finish_lane(const RecipeJob& job, const RecipeSpace& space,
                                                            const Lane& lane, LabelColumn<float> label, bool values) {
  RecipeSums<float> s;
  const float *common = space.sums, *sums = common + kSweepSums * (1 + lane.k), *v = space.values + kSweepSums * lane.k;
  s.rest_My = space.maxima[0], s.rest_Mz = space.maxima[1];
  const bool apart = lane.recipe.decoupled();
  s.My = apart ? fmaxf(s.rest_My, label.teacher) : s.rest_My;
  s.Mz = apart ? fmaxf(s.rest_Mz, label.student) : s.rest_Mz;
  // Where logits are standardised only their distances matter: from the largest.
  const bool plain = lane.recipe.standardize == kNoStandardize;
  const float My = plain ? 0.f : about(s.My), Mz = plain ? 0.f : about(s.Mz);
  s.rest_My -= My, s.rest_Mz -= Mz, s.My -= My, s.Mz -= Mz, label.teacher -= My, label.student -= Mz;
  s.A0 = common[0], s.A1 = common[1], s.E0 = common[2], s.E1 = common[3], s.F0 = common[4], s.E2 = common[5];
  s.teacher = space.teacher, s.student = space.student;
  TauSums<float>& tau = s.tau[0];
  tau.B0 = sums[0], tau.D0 = sums[1], tau.Bd = sums[2], tau.Dd = sums[3];
  if (values) tau.f = v[0], tau.h = v[1], tau.hd = v[2], tau.fb = v[3], tau.pb = v[4], tau.qd = v[5];
  const bool known = values && lane.recipe.is_kl();
  if (known) tau.h = space.tau[lane.k].pull, tau.hd = tau.h * tau.qd;
  SideScales<float> teacher, student;
  teacher.tau[0] = space.tau[lane.k].k_b, student.tau[0] = space.tau[lane.k].k_d;
  RecipeNumbers<float> numbers =
      recipe_numbers(lane.recipe, lane.taus, static_cast<double>(job.t), teacher, student, s, &label, values);
  if (job.labels.data == nullptr) numbers.common[kCrossEntropy] = 0;
  numbers.common[kRestTeacherMax] += My, numbers.common[kRestStudentMax] += Mz, numbers.common[kRecipeStudentMax] += Mz;
  if (known) {
    const float pull = static_cast<float>(kLn2) * v[2] * (apart ? static_cast<float>(lane.recipe.second) : 1.f);
    numbers.tau[0][kStudentPull] += pull;
    numbers.divergence_slope -= static_cast<float>(lane.recipe.factor[0]) * pull / static_cast<float>(lane.taus[0]);
  }
  numbers.common[kDivergence] = lane.sum(job, numbers.common[kDivergence]);
  numbers.divergence_slope = lane.sum(job, numbers.divergence_slope);
  return numbers;
}

// Of the statistics, what merging shards needs besides: ahead of the others, beside which there are no registers left.
__device__ __forceinline__ void store_for_merging(const RecipeJob& job, const RecipeSpace& space, int row,
                                                  bool values) {
  const auto store = [&](int field, float value) { job.out[job.at(field, row)] = value; };
  const int k = threadIdx.x;
  if (k == 0) store(kRecipeTeacherEntropySum, space.sums[0]);
  if (k >= job.recipe.count) return;
  const float *sums = space.sums + kSweepSums * (1 + k), B0 = sums[0], D0 = sums[1];
  const bool forward = !values && job.recipe.first_of_columns() != 0;
  const bool reverse = !values && job.recipe.second_of_columns() != 0;
  const int first = kNumRecipeFields + k * kNumTauFields;
  store(first + kForwardKL, forward ? kl_of_sums(B0, sums[2], D0) : 0.f);
  store(first + kReverseKL, reverse ? kl_of_sums(D0, sums[3], B0) : 0.f);
}

__device__ __forceinline__ void store_statistics(const RecipeJob& job, int row, const Lane& lane,
                                                 const RecipeNumbers<float>& numbers) {
  const auto store = [&](int field, float value) { job.out[job.at(field, row)] = value; };
  if (threadIdx.x < job.recipe.count) {
#pragma unroll
    for (int i = 0; i < kForwardKL; ++i)
      store(kNumRecipeFields + lane.k * kNumTauFields + i, numbers.tau[0][i]);
  }
  if (!lane.last) return;
#pragma unroll
  for (int i = 0; i < kRecipeTeacherEntropySum; ++i)
    store(i, numbers.common[i]);
  if (!job.slopes) return;
  store(job.recipe.fields(false), numbers.divergence_slope);
  store(job.recipe.fields(false) + 1, numbers.student_lse_slope);
}

// What the statistics operator left.
__device__ __forceinline__ RecipeNumbers<float> saved_numbers(const RecipeJob& job, int row, const Lane& lane) {
  RecipeNumbers<float> numbers;
#pragma unroll
  for (int i = 0; i < kNumRecipeFields; ++i)
    numbers.common[i] = job.statistics[job.at(i, row)];
#pragma unroll
  for (int i = 0; i < kNumTauFields; ++i)
    numbers.tau[0][i] = job.statistics[job.at(kNumRecipeFields + lane.k * kNumTauFields + i, row)];
  return numbers;
}

__device__ __forceinline__ RowUpstream<float> given_upstream(const RowJob& job, int row) {
  const Upstream& g = job.upstream;
  return {g.divergence.at(row, 0), g.student_entropy.at(row, 0), g.student_lse.at(row, 0), g.cross_entropy.at(row, 0)};
}

// Weight and loss of one pass, stored with the public statistics, and their gradients.
__device__ __forceinline__ RowUpstream<float> finish_loss(const RecipeJob& job, int row, const Lane& lane,
                                                          const RecipeNumbers<float>& numbers, bool storing) {
  const float* common = numbers.common;
  RowResult<float> r{};
  r.divergence = common[kDivergence], r.teacher_entropy = common[kTeacherEntropy];
  r.student_entropy = common[kStudentEntropy], r.cross_entropy = common[kCrossEntropy];
  const float tau = static_cast<float>(lane.taus[0]);
  const RowLoss<float> loss =
      row_loss(r, Temperatures<float>(tau, job.t, 0.f, 0.f), job.rule, job.weights.at(row, 1.f));
  if (storing && lane.last) {
#pragma unroll
    for (int i = 0; i < kWeight; ++i)
      job.out[job.at(i, row)] = common[i];
    job.out[job.at(kWeight, row)] = loss.weight, job.out[job.at(kLoss, row)] = loss.loss;
  }
  const float scale = job.denominator == nullptr ? job.scale : job.scale / *job.denominator;
  return {loss.divergence_factor * scale, 0, 0, static_cast<float>(job.rule.ce_weight) * scale};
}

// The basis of the gradient, and the exponents' factors with it, into shared memory.
__device__ __forceinline__ void store_basis(const RecipeJob& job, RecipeSpace& space, const Lane& lane,
                                            const RecipeNumbers<float>& numbers, const LabelColumn<float>& label,
                                            RowUpstream<float> upstream) {
  const float *common = numbers.common, *own = numbers.tau[0];
  TauNumbers tau = space.tau[lane.k];
  tau.normalise(own[kRestTeacherSum], own[kRestStudentSum]);
  LabelOdds<float> odds{};
  if (lane.recipe.decoupled()) {
    const float b = (label.teacher - about(common[kRestTeacherMax])) * tau.k_b + label.bias * kLog2Ef;
    const float d = (label.student - about(common[kRestStudentMax])) * tau.k_d;
    odds = label_odds(b, d, own[kRestTeacherSum], own[kRestStudentSum]);
  }
  // The student's lse is that of the last temperature, and entropies have one of their own.
  if (!lane.last) upstream.student_lse = upstream.student_entropy = 0;
  const TauBasis<float> t = tau_basis(lane.recipe, 0, static_cast<float>(lane.taus[0]), own, odds, upstream);
  tau.c = t.c, tau.q = t.q;
  RecipeBasis<float> basis =
      recipe_basis(lane.recipe, common, numbers.tau, lane.taus, static_cast<double>(job.t), upstream);
  basis.linear = lane.sum(job, basis.linear);
  const float label_gradient = lane.sum(job, t.label);
  __syncwarp();  // all lanes have read what is written here
  if (threadIdx.x < job.recipe.count) space.tau[lane.k] = tau;
  if (!lane.last) return;
  space.maxima[0] = common[kRestTeacherMax], space.maxima[1] = common[kRestStudentMax];
  space.student_max = common[kRecipeStudentMax];
  space.basis = basis, space.label_gradient = label_gradient;
}

}  // namespace
}  // namespace cuda
}  // namespace eakd
