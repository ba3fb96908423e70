// The instruction set that runs, chosen once by torch's own capability, which obeys ATEN_CPU_CAPABILITY.
#pragma once

#include "row_kernels.h"

namespace eakd {

const KernelTables& cpu_kernels();

template <typename T>
const RowKernels<T>& row_kernels() {
  const KernelTables& tables = cpu_kernels();
  return *static_cast<const RowKernels<T>*>(sizeof(T) == 8 ? tables.fp64 : tables.fp32);
}

}  // namespace eakd
