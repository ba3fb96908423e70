// eakd_kernels._C: importing it registers torch.ops.eakd_cpu; what it exports is for reports and tests.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "cpu/dispatch.h"

PYBIND11_MODULE(_C, m) {
  m.def("cpu_isa", [] { return eakd::cpu_kernels().name; }, "Instruction set of the kernels that run.");
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = __VERSION__;
        info["cxx_standard"] = __cplusplus;
        info["torch"] = TORCH_VERSION;
        info["num_statistics"] = int(eakd::kNumStatistics);
        info["num_statistics_with_slopes"] = int(eakd::kNumStatisticsWithSlopes);
        info["num_loss_statistics"] = int(eakd::kNumLossStatistics);
        return info;
      },
      "What this shared object was compiled with.");
}
