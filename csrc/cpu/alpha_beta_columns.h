// AlphaBeta term by term (../recipe.h, AlphaBetaTerms), of logits alone: three exponentials a column.
#pragma once

#include "blocks.h"
#include "recipe_kernels.h"

namespace eakd {
namespace {

template <typename T, int N>
struct AlphaBetaColumns {
  using Vectors = Strip<T, N>;
  Vectors x_p, x_q, q_s, p_s, both, step, pull;

  // Exponents deep enough that a share of a floor is one, too.
  AlphaBetaColumns(const RecipeBlock<T>& block, const AlphaBetaTerms<T>& by, int64_t i)
      : x_p([&](int u) { return raise_to((load(block.y + i + u * kLanes) - block.my) * by.k, kDeepExp2Floor<T>); }),
        x_q([&](int u) { return raise_to((load(block.z + i + u * kLanes) - block.mz) * by.k, kDeepExp2Floor<T>); }),
        q_s([&](int u) { return exp2_from_floor(x_q[u]); }),
        p_s([&](int u) { return exp2_from_floor(x_p[u]); }),
        both([&](int u) { return exp2_from_floor(x_q[u] + by.share * (x_p[u] - x_q[u])); }),
        step([&](int u) { return by.p_ratio * p_s[u] - q_s[u]; }),
        pull([&](int u) { return q_s[u] - by.both_ratio * both[u]; }) {}
};

// Keeps the pulls. By value: a loop that stores would ask for every field again.
template <typename T>
void alpha_beta_values(TauSums<double>& s, RecipeBlock<T> block, AlphaBetaTerms<T> by, T* keep) {
  Vec<T> steps{}, pulls{};
  each_strip<T>(block.n, [&](auto width, int64_t first) {
    const AlphaBetaColumns<T, decltype(width)::value> c(block, by, first);
    c.step.each(first, [&](int u, int64_t i) {
      steps += c.step[u], pulls += c.pull[u];
      if (keep != nullptr) store(keep + i, c.pull[u]);
    });
  });
  const double pull = sum<T>(pulls);
  s.f += by.f_step * sum<T>(steps) + by.f_pull * pull, s.h += by.h * pull;
}

}  // namespace
}  // namespace eakd
