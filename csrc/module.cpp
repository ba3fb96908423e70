// eakd_kernels._C: importing it registers torch.ops.eakd_cpu; what it exports is for reports, tests and planning.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "cpu/dispatch.h"
#include "cuda/plan.h"
#include "row_state.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cxx_standard"] = __cplusplus;
  info["torch"] = TORCH_VERSION;
  info["num_statistics"] = int(eakd::kNumStatistics);
  info["num_statistics_with_slopes"] = int(eakd::kNumStatisticsWithSlopes);
  info["num_loss_statistics"] = int(eakd::kNumLossStatistics);
  return info;
}

// Problem and Device as Python gives them; see eakd_kernels.backends.cuda.launch_plan.
py::dict cuda_plan(bool one_pass, int student_bytes, int teacher_bytes, int64_t rows, int vocab_size, bool aligned,
                   const std::string& wanted, const py::kwargs& device_fields) {
  eakd::cuda::Problem problem;
  problem.operation = one_pass ? eakd::cuda::Operation::kOnePass : eakd::cuda::Operation::kRowStatistics;
  problem.student_bytes = student_bytes, problem.teacher_bytes = teacher_bytes;
  problem.rows = rows, problem.vocab_size = problem.gradient_columns = vocab_size;
  problem.alike = problem.gradient_alike = aligned;
  problem.whole = aligned && vocab_size % problem.vector() == 0;
  eakd::cuda::Device device;
  device.capability = device_fields["capability"].cast<int>();
  device.processors = device_fields["processors"].cast<int>();
  device.shared_bytes = device_fields["shared_bytes"].cast<int64_t>();
  device.l2_bytes = device_fields["l2_bytes"].cast<int64_t>();
  device.largest_cluster = device_fields["largest_cluster"].cast<int>();
  const eakd::cuda::Plan plan = eakd::cuda::make_plan(problem, device, wanted);
  py::dict result;
  result["kernel"] = eakd::cuda::name_of(plan.kernel);
  result["width"] = plan.width;
  result["cluster"] = plan.cluster, result["threads"] = plan.threads, result["blocks"] = plan.blocks;
  result["lanes"] = plan.lanes, result["stages"] = plan.stages, result["slice"] = plan.slice;
  result["shared_bytes"] = plan.shared_bytes;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("cpu_isa", [] { return eakd::cpu_kernels().name; }, "Instruction set of the kernels that run.");
  m.def("build_info", &build_info, "What this shared object was compiled with.");
  m.def("cuda_plan", &cuda_plan, "Which CUDA kernel would run, and in what shape.");
}
