// The part of the CUDA runtime API that launchers use, over an emulated device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "types.h"

using cudaStream_t = struct CUstream_st*;  // all launches are synchronous, on any stream

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};

enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore = 0, cudaLaunchAttributeClusterDimension = 4 };

union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  char pad[64];
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

struct cudaFuncAttributes {
  int ptxVersion;  // of the virtual architecture that the kernel was compiled for
};

namespace emulator {

struct Device {
  int capability_major = 9, capability_minor = 0;
  int multiprocessors = 2;  // few, so that persistent kernels loop
  int shared_per_block = 232448;
  int shared_per_multiprocessor = 233472;
  int l2_bytes = 50 << 20;
};

Device& device();

// Takes effect with the next launch. The same seed gives every launch the same schedule.
void set_schedule(std::uint64_t seed);
std::uint64_t schedule();

// A kernel and its arguments, of which each thread gets its own copy.
struct Body {
  void (*run)(const void* call);
  const void* call;
};

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, Body body);
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t max_active_clusters(int* clusters, const void* kernel, const cudaLaunchConfig_t& config);
cudaError_t max_active_blocks(int* blocks, const void* kernel, int threads, std::size_t shared_bytes);

template <class... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;

  static void run(const void* call) { static_cast<const Call*>(call)->run(std::index_sequence_for<Parameters...>()); }

 private:
  template <std::size_t... I>
  void run(std::index_sequence<I...>) const {
    kernel(std::get<I>(arguments)...);
  }
};

template <class... Parameters>
const void* identity(void (*kernel)(Parameters...)) {
  return reinterpret_cast<const void*>(kernel);
}

inline const void* identity(const void* kernel) { return kernel; }

}  // namespace emulator

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return emulator::set_attribute(emulator::identity(kernel), attribute, value);
}

// Compiled for the emulated device.
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = 10 * emulator::device().capability_major + emulator::device().capability_minor;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel* kernel, const cudaLaunchConfig_t* config) {
  return emulator::max_active_clusters(clusters, emulator::identity(kernel), *config);
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel* kernel, int threads,
                                                          std::size_t shared_bytes) {
  return emulator::max_active_blocks(blocks, emulator::identity(kernel), threads, shared_bytes);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  static_assert((std::is_trivially_copyable_v<Parameters> && ...));
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "more parameters than every device takes");
  using Call = emulator::Call<Parameters...>;
  const Call call{kernel, std::tuple<Parameters...>(static_cast<Parameters>(std::forward<Arguments>(arguments))...)};
  return emulator::launch(*config, emulator::identity(kernel), {Call::run, &call});
}
