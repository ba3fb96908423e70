// What the kernels compute, in double precision and as one would write it down: no recentring, no merging, no reuse.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "recipe_result.h"

namespace driver {

using Numbers = std::vector<double>;

// 0 where there is no mass at all.
inline double log_sum_exp(const Numbers& x, double temperature) {
  const double largest = *std::max_element(x.begin(), x.end());
  if (largest == -INFINITY) return 0;
  double sum = 0;
  for (const double value : x)
    sum += std::exp((value - largest) / temperature);
  return largest / temperature + std::log(sum);
}

inline Numbers log_softmax(const Numbers& x, double temperature) {
  const double lse = log_sum_exp(x, temperature);
  Numbers result;
  for (const double value : x)
    result.push_back(value / temperature - lse);
  return result;
}

// sum of p (log p - log q); columns without mass have no term.
inline double divergence(const Numbers& log_p, const Numbers& log_q) {
  double sum = 0;
  for (std::size_t i = 0; i < log_p.size(); ++i)
    if (log_p[i] > -INFINITY) sum += std::exp(log_p[i]) * (log_p[i] - log_q[i]);
  return sum;
}

inline double entropy(const Numbers& log_p) { return -divergence(log_p, Numbers(log_p.size(), 0.0)); }

// Gradients of the loss in what of a row depends on the student.
struct Slopes {
  double divergence = 0, student_entropy = 0, student_lse = 0, cross_entropy = 0;
};

struct RowPair {
  Numbers student, teacher;
  double tau, t;
  int label;  // -1: none

  double divergence_at(double temperature) const {
    return divergence(log_softmax(teacher, temperature), log_softmax(student, temperature));
  }
  double teacher_entropy() const { return entropy(log_softmax(teacher, t)); }
  double student_entropy() const { return entropy(log_softmax(student, t)); }
  double cross_entropy() const {
    return label < 0 ? 0 : log_sum_exp(student, 1) - student[static_cast<std::size_t>(label)];
  }
  double weight() const {
    const double bound = std::log(static_cast<double>(student.size()));
    return bound == 0 ? 0 : (teacher_entropy() + teacher_entropy() * student_entropy() / bound) / 2;
  }

  Numbers gradient(const Slopes& g) const {
    const Numbers log_p = log_softmax(teacher, tau), log_q = log_softmax(student, tau);
    const Numbers log_q_t = log_softmax(student, t), log_q_1 = log_softmax(student, 1);
    const double h = student_entropy();
    Numbers result;
    for (std::size_t i = 0; i < student.size(); ++i) {
      const double q = std::exp(log_q[i]), q_t = std::exp(log_q_t[i]), hit = static_cast<int>(i) == label;
      double value = g.divergence * (q - std::exp(log_p[i])) / tau + g.student_lse * q / tau;
      if (q_t > 0) value -= g.student_entropy * q_t * (log_q_t[i] + h) / t;
      if (label >= 0) value += g.cross_entropy * (std::exp(log_q_1[i]) - hit);
      result.push_back(value);
    }
    return result;
  }
};

struct RecipeValue {
  double divergence, student_lse;  // the latter at the last temperature
};

inline Numbers standardized(Numbers x) {
  double count = 0, mean = 0, squares = 0;
  for (const double value : x)
    if (value != -INFINITY) count += 1, mean += value;
  mean /= count;
  for (const double value : x)
    if (value != -INFINITY) squares += (value - mean) * (value - mean);
  for (double& value : x)
    value = (value - mean) / (std::sqrt(squares / (count - 1)) + eakd::kStandardizeEpsilon);
  return x;
}

// JSD, KL(q || p), and DKD.
inline double divergence_of(const eakd::Recipe& recipe, Numbers log_p, Numbers log_q, int label) {
  if (recipe.divergence == eakd::kKL) return divergence(log_q, log_p);
  if (recipe.divergence == eakd::kJSD) {
    Numbers log_m;
    for (std::size_t i = 0; i < log_p.size(); ++i)
      log_m.push_back(std::log(recipe.first * std::exp(log_p[i]) + recipe.second * std::exp(log_q[i])));
    return recipe.first * divergence(log_p, log_m) + recipe.second * divergence(log_q, log_m);
  }
  const double p = std::exp(log_p[label]), q = std::exp(log_q[label]);
  log_p[label] = log_q[label] = -INFINITY;
  const double target = p * std::log(p / q) + (1 - p) * std::log((1 - p) / (1 - q));
  return recipe.first * target + recipe.second * divergence(log_softmax(log_p, 1), log_softmax(log_q, 1));
}

inline RecipeValue recipe_value(const eakd::Recipe& recipe, Numbers teacher, Numbers student, int label,
                                const std::vector<float>& bias) {
  if (recipe.standardize != eakd::kNoStandardize) teacher = standardized(teacher), student = standardized(student);
  RecipeValue value = {};
  for (int k = 0; k < recipe.count; ++k) {
    Numbers y = teacher;
    for (std::size_t i = 0; i < y.size(); ++i)
      y[i] = y[i] / recipe.tau[k] + (bias.empty() ? 0 : bias[i]);
    value.divergence +=
        recipe.factor[k] * divergence_of(recipe, log_softmax(y, 1), log_softmax(student, recipe.tau[k]), label);
    value.student_lse = log_sum_exp(student, recipe.tau[k]);
  }
  return value;
}

// By central differences, whose error is far below what float leaves.
template <typename Function>
double slope(Function&& function, double at) {
  const double step = 1e-4;
  return (function(at + step) - function(at - step)) / (2 * step);
}

}  // namespace driver
