// Where and on which stream kernels run. The emulator has neither: its tensors are the CPU's.
#pragma once

#include <ATen/core/Tensor.h>

#if defined(EAKD_EMULATED)

#define EAKD_CUDA_KEY CPU

namespace eakd {
namespace cuda {
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const at::Tensor&) {}
  void* stream() const { return nullptr; }
  int index() const { return 0; }
};
}  // namespace cuda
}  // namespace eakd

#else

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#define EAKD_CUDA_KEY CUDA

namespace eakd {
namespace cuda {
// The tensor's device, which need not be the current one, and the stream that is current there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const at::Tensor& tensor) : guard_(tensor.device()) {}
  void* stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
  int index() const { return guard_.current_device().index(); }

 private:
  c10::cuda::CUDAGuard guard_;
};
}  // namespace cuda
}  // namespace eakd

#endif
