// The emulated device and the runtime API over it.
#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "machine.h"

namespace emulator {
namespace {

constexpr std::size_t kSharedWithoutAttribute = 48 << 10;
constexpr std::size_t kReservedPerBlock = 1 << 10;  // of shared memory, by the system
constexpr unsigned kThreadsPerMultiprocessor = 2048;
constexpr unsigned kPortableCluster = 8, kLargestCluster = 16;

struct KernelAttributes {
  std::size_t max_shared_bytes = kSharedWithoutAttribute;
  bool large_clusters = false;
};

std::mutex attributes_mutex;
std::map<const void*, KernelAttributes>& all_attributes() {
  static auto* const attributes = new std::map<const void*, KernelAttributes>;
  return *attributes;
}

KernelAttributes attributes_of(const void* kernel) {
  const std::lock_guard<std::mutex> lock(attributes_mutex);
  const auto found = all_attributes().find(kernel);
  return found == all_attributes().end() ? KernelAttributes{} : found->second;
}

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

std::uint64_t volume(const dim3& shape) { return static_cast<std::uint64_t>(shape.x) * shape.y * shape.z; }

bool within(const dim3& shape, unsigned x, unsigned y, unsigned z) {
  return shape.x && shape.y && shape.z && shape.x <= x && shape.y <= y && shape.z <= z;
}

dim3 cluster_shape(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      const auto& shape = attribute.val.clusterDim;
      return dim3(shape.x, shape.y, shape.z);
    }
  }
  return dim3();
}

cudaError_t check_cluster(const cudaLaunchConfig_t& config, const KernelAttributes& attributes) {
  const dim3 cluster = cluster_shape(config), &grid = config.gridDim;
  const unsigned largest = attributes.large_clusters ? kLargestCluster : kPortableCluster;
  if (!within(cluster, largest, largest, largest) || volume(cluster) > largest) return cudaErrorInvalidConfiguration;
  if (volume(cluster) > 1 && device().capability_major < 9) return cudaErrorInvalidConfiguration;
  const bool divides = grid.x % cluster.x == 0 && grid.y % cluster.y == 0 && grid.z % cluster.z == 0;
  return divides ? cudaSuccess : cudaErrorInvalidConfiguration;
}

cudaError_t check(const cudaLaunchConfig_t& config, const KernelAttributes& attributes) {
  if (!within(config.gridDim, 0x7fffffff, 65535, 65535)) return cudaErrorInvalidConfiguration;
  if (!within(config.blockDim, 1024, 1024, 64) || volume(config.blockDim) > 1024) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > attributes.max_shared_bytes) return cudaErrorInvalidValue;
  if (config.dynamicSmemBytes > static_cast<std::size_t>(device().shared_per_block)) return cudaErrorInvalidValue;
  return check_cluster(config, attributes);
}

}  // namespace

Device& device() {
  static Device instance;
  return instance;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, Body body) {
  const cudaError_t error = check(config, attributes_of(kernel));
  if (error != cudaSuccess) return remember(error);
  run_grid({config.gridDim, config.blockDim, cluster_shape(config), config.dynamicSmemBytes}, body);
  return cudaSuccess;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> lock(attributes_mutex);
  KernelAttributes& attributes = all_attributes()[kernel];
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || value > device().shared_per_block) return remember(cudaErrorInvalidValue);
      attributes.max_shared_bytes = static_cast<std::size_t>(value);
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      if (device().capability_major < 9) return remember(cudaErrorInvalidValue);
      attributes.large_clusters = value != 0;
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t max_active_blocks(int* blocks, const void* kernel, int threads, std::size_t shared_bytes) {
  *blocks = 0;
  if (threads < 1 || threads > 1024) return remember(cudaErrorInvalidValue);
  if (shared_bytes > attributes_of(kernel).max_shared_bytes) return cudaSuccess;
  const auto warps = (static_cast<unsigned>(threads) + kWarpSize - 1) / kWarpSize;
  const auto shared = static_cast<std::size_t>(device().shared_per_multiprocessor);
  const std::size_t by_threads = kThreadsPerMultiprocessor / (warps * kWarpSize);
  *blocks = static_cast<int>(std::min(by_threads, shared / (shared_bytes + kReservedPerBlock)));
  return cudaSuccess;
}

// At least one where a launch would be accepted: the emulator runs it, however few its multiprocessors are.
cudaError_t max_active_clusters(int* clusters, const void* kernel, const cudaLaunchConfig_t& config) {
  *clusters = 0;
  const cudaError_t error = check(config, attributes_of(kernel));
  if (error != cudaSuccess) return remember(error);
  int blocks = 0;
  max_active_blocks(&blocks, kernel, static_cast<int>(volume(config.blockDim)), config.dynamicSmemBytes);
  *clusters = std::max(1, blocks * device().multiprocessors / static_cast<int>(volume(cluster_shape(config))));
  return cudaSuccess;
}

}  // namespace emulator

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorNotSupported: return "operation not supported";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return emulator::last_error; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return emulator::remember(cudaErrorInvalidDevice);
  const emulator::Device& emulated = emulator::device();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulated.multiprocessors; return cudaSuccess;
    case cudaDevAttrL2CacheSize: *value = emulated.l2_bytes; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = emulated.capability_major; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = emulated.capability_minor; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = emulated.shared_per_multiprocessor; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulated.shared_per_block; return cudaSuccess;
  }
  return emulator::remember(cudaErrorInvalidValue);
}

// As cudaDeviceGetAttribute tells of an A100, an H100 and a B200, but for the number of multiprocessors.
extern "C" void eakd_emulator_device(int capability, int multiprocessors) {
  emulator::Device& device = emulator::device();
  device = {};
  device.capability_major = capability / 10;
  device.capability_minor = capability % 10;
  device.multiprocessors = multiprocessors;
  if (device.capability_major < 9) {
    device.shared_per_block = 166912;
    device.shared_per_multiprocessor = 167936;
    device.l2_bytes = 40 << 20;
  } else if (device.capability_major > 9) {
    device.l2_bytes = 126 << 20;
  }
}
