#include "dispatch.h"

#include <ATen/Version.h>

#include <string>

namespace eakd {

static KernelTables choose() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (capability == "AVX512" && avx512) return kernels_avx512();
  if ((capability == "AVX2" || capability == "AVX512") && avx2) return kernels_avx2();
#endif
  return kernels_default();
}

const KernelTables& cpu_kernels() {
  static const KernelTables tables = choose();
  return tables;
}

}  // namespace eakd
