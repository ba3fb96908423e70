// eakd_kernels._C_cuda: importing it registers torch.ops.eakd_cuda; what it exports is for reports.
#include <pybind11/pybind11.h>
#include <torch/version.h>

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
}
