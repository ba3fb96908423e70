// From a plan to a launch, and from run-time types and ratios to template parameters.
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <type_traits>

#include "launch.h"
#include "ptx.cuh"
#include "shapes.h"

namespace eakd {
namespace cuda {
namespace {

// A launch that fails must not be what the next check in PyTorch finds.
inline cudaError_t forgotten(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

struct Launch {
  cudaLaunchAttribute cluster = {};
  cudaLaunchConfig_t config = {};

  Launch(const Plan& plan, int64_t shared_bytes, void* stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = plan.cluster, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(plan.blocks)), config.blockDim = dim3(plan.threads);
    config.dynamicSmemBytes = shared_bytes, config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster, config.numAttrs = plan.cluster > 1 ? 1 : 0;
  }
  Launch(const Launch&) = delete;
};

template <typename Kernel, typename... Arguments>
cudaError_t launch(Kernel* kernel, const Plan& plan, int64_t shared_bytes, void* stream, Arguments... arguments) {
  if (plan.blocks == 0) return cudaSuccess;
  const Launch launch(plan, shared_bytes, stream);
  return forgotten(cudaLaunchKernelEx(&launch.config, kernel, arguments...));
}

// How many clusters (or single blocks) of this shape run at once; 0 where none can. Allows the kernel what it needs.
template <typename Kernel>
cudaError_t ask_clusters_at_once(Kernel* kernel, const Plan& plan, int64_t shared_bytes, int device, int* found) {
  constexpr int kPortable = 8;
  int most_shared = 0, processors = 0, blocks = 0;
  cudaError_t error = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  // The same whoever asks, so that threads of the host do not get into each other's way.
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared);
  if (error == cudaSuccess && plan.cluster > kPortable)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  const Launch launch(plan, shared_bytes, nullptr);
  if (plan.cluster > 1) {
    if (cudaOccupancyMaxActiveClusters(found, kernel, &launch.config) != cudaSuccess) *found = 0, cudaGetLastError();
    return cudaSuccess;
  }
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, plan.threads, shared_bytes);
  *found = blocks * processors;
  return error;
}

// The same, asked once.
template <typename Kernel>
cudaError_t clusters_at_once(Kernel* kernel, const Plan& plan, int64_t shared_bytes, int* found) {
  static std::mutex mutex;
  static std::map<std::array<int64_t, 6>, int> known;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int64_t address = reinterpret_cast<int64_t>(kernel);
  // Processors too: the emulated device changes.
  const std::array<int64_t, 6> key = {device, processors, address, plan.cluster, plan.threads, shared_bytes};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto entry = known.find(key);
  if (entry != known.end()) return *found = entry->second, cudaSuccess;
  error = ask_clusters_at_once(kernel, plan, shared_bytes, device, found);
  if (error == cudaSuccess) known[key] = *found;
  return error;
}

// Kernels that walk along rows: one cluster more than run at once would begin when the others end.
template <typename Kernel, typename... Arguments>
int launch_persistent(Kernel* kernel, Plan plan, int64_t shared_bytes, void* stream, Arguments... arguments) {
  if (plan.blocks == 0) return cudaSuccess;
  int at_once = 0;
  const cudaError_t error = clusters_at_once(kernel, plan, shared_bytes, &at_once);
  if (error != cudaSuccess) return forgotten(error);
  if (at_once == 0) return kNothingFits;
  plan.blocks = std::min<int64_t>(plan.blocks / plan.cluster, at_once) * plan.cluster;
  return launch(kernel, plan, shared_bytes, stream, arguments...);
}

template <typename S, typename T>
struct Pair {
  using Student = S;
  using Teacher = T;
  static constexpr int kVector = 16 / (sizeof(S) > sizeof(T) ? sizeof(S) : sizeof(T));
};

template <typename Visit>
int with_equal_dtypes(Dtypes dtypes, Visit&& visit) {
  switch (dtypes) {
    case Dtypes::kFloat: return visit(Pair<float, float>());
    case Dtypes::kBFloat16: return visit(Pair<__nv_bfloat16, __nv_bfloat16>());
    case Dtypes::kHalf: return visit(Pair<__half, __half>());
    default: return cudaErrorInvalidValue;
  }
}

template <typename Visit>
int with_dtypes(Dtypes dtypes, Visit&& visit) {
  switch (dtypes) {
    case Dtypes::kFloatBFloat16: return visit(Pair<float, __nv_bfloat16>());
    case Dtypes::kFloatHalf: return visit(Pair<float, __half>());
    default: return with_equal_dtypes(dtypes, visit);
  }
}

template <int P>
using Multiple = std::integral_constant<int, P>;

template <typename Visit>
int with_multiple(const RowJob& job, Visit&& visit) {
  switch (job.P) {
    case 1: return visit(Multiple<1>());
    case 3: return visit(Multiple<3>());
    default: return visit(Multiple<0>());
  }
}

}  // namespace
}  // namespace cuda
}  // namespace eakd
