// All kernels of one instruction set: what row_kernels_<name>.cpp compiles.
#pragma once

#include "recipe_kernels_impl.h"
#include "row_kernels_impl.h"

#define EAKD_KERNEL_TABLES(NAME) \
  KernelTables kernels_##NAME() { \
    static constexpr RowKernels<float> fp32 = {segment_state<float>, segment_gradient<float>}; \
    static constexpr RowKernels<double> fp64 = {segment_state<double>, segment_gradient<double>}; \
    return {#NAME, &fp32, &fp64, &recipe_kernels<float>, &recipe_kernels<double>}; \
  }
