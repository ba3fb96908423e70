// What all rows of a recipe (../recipe.h) have in common on the CPU: the job, its kernels, shared exponentials.
#pragma once

#include <cmath>

#include "recipe_kernels.h"
#include "rows.h"

namespace eakd {
namespace {

// Temperatures as integer fractions of few: 2^(x/tau) is a power of 2^(x/base), base = power tau. One exponential
// serves 2, 3, 4 and 6 (base 12). A power of 6 multiplies rounding errors by 6, which sums average out.
struct SharedBases {
  int count = 0;
  double base[kMostTemperatures + 1];
  int of[kMostTemperatures + 1], power[kMostTemperatures + 1];

  SharedBases() = default;
  SharedBases(const double* temperatures, int n) {
    bool found[kMostTemperatures + 1] = {};
    for (int left = n; left > 0; ++count) {
      int most = 0;
      for (int factor = 1; factor <= 4; ++factor)
        for (int i = 0; i < n; ++i) {
          if (found[i]) continue;
          int served = 0;
          for (int j = 0; j < n; ++j)
            served += !found[j] && power_of(factor * temperatures[i], temperatures[j]) > 0;
          if (served > most) most = served, base[count] = factor * temperatures[i];
        }
      for (int j = 0; j < n; ++j) {
        const int p = power_of(base[count], temperatures[j]);
        if (!found[j] && p > 0) found[j] = true, of[j] = count, power[j] = p, --left;
      }
    }
  }

 private:
  static int power_of(double base, double temperature) {
    const double ratio = base / temperature, nearest = std::nearbyint(ratio);
    return nearest >= 1 && nearest <= kMostPower && std::abs(ratio - nearest) < 1e-12 ? static_cast<int>(nearest) : 0;
  }
};

template <typename T>
const RecipeKernels<T>& recipe_kernels_of() {
  const KernelTables& tables = cpu_kernels();
  return *static_cast<const RecipeKernels<T>*>(sizeof(T) == 8 ? tables.recipe_fp64 : tables.recipe_fp32);
}

enum Side : int { kTeacher, kStudent };

// What all rows have in common.
struct RecipeJob {
  const RowJob& rows;
  const RowTemperatures& temperatures;
  Recipe recipe;
  double t;
  bool slopes = false;
  bool per_row = false;                // a temperature for every row in the place of the recipe's one
  const double* class_bias = nullptr;  // [vocab_size], nats

  bool pulls() const { return slopes || recipe.standardize != kNoStandardize; }
};

}  // namespace
}  // namespace eakd
