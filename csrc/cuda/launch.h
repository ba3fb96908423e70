// The launchers, one a kernel, plain C between the operators and nvcc's world. Each returns a cudaError_t or
// kNothingFits.
#pragma once

#include "job.h"
#include "plan.h"
#include "recipe_job.h"

namespace eakd {
namespace cuda {

// Storage of the student's and the teacher's logits. Mixed pairs have the student in fp32.
enum class Dtypes { kFloat, kBFloat16, kHalf, kFloatBFloat16, kFloatHalf };

constexpr int kNothingFits = -1;  // of this shape, on this device

struct Total {
  const float* values;
  int64_t count;
  float scale;
  const float* denominator;
  float* total;
};

}  // namespace cuda
}  // namespace eakd

extern "C" {
int eakd_launch_small(const eakd::cuda::RowJob*, const eakd::cuda::Plan*, eakd::cuda::Dtypes, bool one_pass,
                      void* stream);
int eakd_launch_resident(const eakd::cuda::RowJob*, const eakd::cuda::Plan*, eakd::cuda::Dtypes, void* stream);
int eakd_launch_ring(const eakd::cuda::RowJob*, const eakd::cuda::Plan*, eakd::cuda::Dtypes, void* stream);
int eakd_launch_stream(const eakd::cuda::RowJob*, const eakd::cuda::Plan*, eakd::cuda::Dtypes, bool one_pass,
                       void* stream);
int eakd_launch_gradient(const eakd::cuda::RowJob*, const eakd::cuda::Plan*, eakd::cuda::Dtypes, bool entropy,
                         void* stream);
int eakd_launch_recipe(const eakd::cuda::RecipeJob*, const eakd::cuda::Plan*, eakd::cuda::Dtypes, void* stream);
// out = factor * gradient, as job.gradient and job.student.
int eakd_launch_scale(const eakd::cuda::RowJob*, const eakd::cuda::Plan*, eakd::cuda::Dtypes, const float* factor,
                      bool in_place, void* stream);
int eakd_launch_total(const eakd::cuda::Total*, void* stream);
// The current device, as what this was compiled for can use it; an error where it cannot.
int eakd_query_device(eakd::cuda::Device*);
const char* eakd_error_name(int error);
}
