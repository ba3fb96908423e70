// What driver.cpp launches, compiled apart from it and for each of the types in an object of its own: of a mutant,
// test_mutations.py compiles one of these and nothing else. That for recipes is one more.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda/launch.h"

namespace driver {

// Logits in T, and temperatures with P tau = t, or (P = 0) any.
template <typename T, int P>
struct Kernels {
  static constexpr int kVector = 16 / sizeof(T);

  // By plan.kernel.
  static cudaError_t sums(const eakd::cuda::RowJob& job, const eakd::cuda::Plan& plan, bool one_pass);
  static cudaError_t row_gradient(const eakd::cuda::RowJob& job, const eakd::cuda::Plan& plan);
  static cudaError_t scale(const eakd::cuda::RowJob& job, const eakd::cuda::Plan& plan, const float* factor,
                           bool in_place);
  static cudaError_t total(const eakd::cuda::Total& total, int threads);
};

// As plan.width has it; plan.slice vectors of a thread are kept.
template <typename T>
cudaError_t launch_recipe(const eakd::cuda::RecipeJob& job, const eakd::cuda::Plan& plan);

}  // namespace driver
