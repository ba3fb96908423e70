// From a plan to a launch, and from run-time types and ratios to template parameters.
#pragma once

#include <type_traits>

#include "launch.h"
#include "ptx.cuh"
#include "shapes.h"

namespace eakd {
namespace cuda {
namespace {

template <typename Kernel, typename... Arguments>
cudaError_t launch(Kernel* kernel, const Plan& plan, int64_t shared_bytes, void* stream, Arguments... arguments) {
  if (plan.blocks == 0) return cudaSuccess;
  constexpr int64_t kWithoutAsking = 48 << 10;
  constexpr int kPortable = 8;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kWithoutAsking)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess && plan.cluster > kPortable)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = plan.cluster, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks)), config.blockDim = dim3(plan.threads);
  config.dynamicSmemBytes = shared_bytes, config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster, config.numAttrs = plan.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename S, typename T>
struct Pair {
  using Student = S;
  using Teacher = T;
  static constexpr int kVector = 16 / (sizeof(S) > sizeof(T) ? sizeof(S) : sizeof(T));
};

template <typename Visit>
cudaError_t with_equal_dtypes(Dtypes dtypes, Visit&& visit) {
  switch (dtypes) {
    case Dtypes::kFloat: return visit(Pair<float, float>());
    case Dtypes::kBFloat16: return visit(Pair<__nv_bfloat16, __nv_bfloat16>());
    case Dtypes::kHalf: return visit(Pair<__half, __half>());
    default: return cudaErrorInvalidValue;
  }
}

template <typename Visit>
cudaError_t with_dtypes(Dtypes dtypes, Visit&& visit) {
  switch (dtypes) {
    case Dtypes::kFloatBFloat16: return visit(Pair<float, __nv_bfloat16>());
    case Dtypes::kFloatHalf: return visit(Pair<float, __half>());
    default: return with_equal_dtypes(dtypes, visit);
  }
}

template <int P>
using Multiple = std::integral_constant<int, P>;

template <typename Visit>
cudaError_t with_multiple(const RowJob& job, Visit&& visit) {
  switch (job.P) {
    case 1: return visit(Multiple<1>());
    case 3: return visit(Multiple<3>());
    default: return visit(Multiple<0>());
  }
}

}  // namespace
}  // namespace cuda
}  // namespace eakd
