// Kernels that test the emulator. Each case is run by name, one to a process.
#pragma once

#include <cuda_runtime.h>
#include <eakd_emulator/ptx.h>

#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

namespace self_test {

using Cases = std::map<std::string, std::function<void()>>;

Cases correct_kernels();   // return, under any schedule
Cases faulty_kernels();    // throw
Cases sanitized_faults();  // throw or return, and have a sanitizer report them
Cases measurements();

// A line of a failed check would say little: the case has a name.
inline void require(bool condition, const std::string& what) {
  if (!condition) throw std::logic_error("check failed: " + what);
}

struct Shape {
  dim3 grid = 1, block = 32;
  unsigned cluster = 1;
  std::size_t shared_bytes = 0;
};

template <class... Parameters, class... Arguments>
cudaError_t try_launch(const Shape& shape, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {shape.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... Parameters, class... Arguments>
void launch(const Shape& shape, void (*kernel)(Parameters...), Arguments... arguments) {
  const cudaError_t error = try_launch(shape, kernel, arguments...);
  require(error == cudaSuccess, std::string("launch: ") + cudaGetErrorString(error));
}

template <class T>
T* shared_as(std::size_t byte_offset = 0) {
  return reinterpret_cast<T*>(eakd::ptx::dynamic_shared() + byte_offset);
}

inline void cluster_sync() {
  eakd::ptx::cluster_arrive();
  eakd::ptx::cluster_wait();
}

}  // namespace self_test
