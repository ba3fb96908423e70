// What the kernel for recipes (../recipe.h) gets: a RowJob, of which it leaves tau, k_tau, P and hard alone, and the
// recipe, with what every column needs of it in fp32.
#pragma once

#include "../recipe_result.h"
#include "job.h"
#include "plan.h"

namespace eakd {
namespace cuda {

// Logits are scale * logit, then cap * tanh(it / cap); cap 0: none.
struct Side {
  float scale = 1, cap = 0;
};

struct RecipeJob : RowJob {
  Operation operation = Operation::kOnePass;
  Recipe recipe;
  float first = 1, second = 0, degree = 1;  // of the divergence of columns
  Side student_side, teacher_side;
  const float* class_bias = nullptr;  // [vocab_size], nats

  RecipeJob(const RowJob& job, Operation operation, const Recipe& recipe, const float* class_bias)
      : RowJob(job),
        operation(operation),
        recipe(recipe),
        first(static_cast<float>(recipe.first_of_columns())),
        second(static_cast<float>(recipe.second_of_columns())),
        degree(static_cast<float>(eakd::degree(recipe.divergence, recipe.first, recipe.second))),
        student_side{static_cast<float>(recipe.student_scale), static_cast<float>(recipe.student_cap)},
        teacher_side{static_cast<float>(recipe.teacher_scale), static_cast<float>(recipe.teacher_cap)},
        class_bias(class_bias) {}
};

}  // namespace cuda
}  // namespace eakd
