// eakd_kernels._C_cuda: importing it registers torch.ops.eakd_cuda; what it exports is for reports.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "launch.h"

PYBIND11_MODULE(_C_cuda, m) {
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = TORCH_VERSION;
#if defined(EAKD_EMULATED)
        info["architectures"] = "emulated";
#else
        info["architectures"] = EAKD_CUDA_ARCHITECTURES;
#endif
        return info;
      },
      "What this shared object was compiled with.");
  m.def(
      "device_error",
      []() -> pybind11::object {
        eakd::cuda::Device device;
        const int error = eakd_query_device(&device);
        return error == 0 ? pybind11::none() : pybind11::object(pybind11::str(eakd_error_name(error)));
      },
      "Why the kernels cannot run on the current device, or None.");
}
