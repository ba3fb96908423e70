#include "row_kernels.h"

#if defined(__x86_64__)
// The standard headers come first: compiled under the target below, their inline functions could be the copies that
// the linker keeps for everybody.
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#define EAKD_VECTOR_BYTES 64
#include "kernel_tables.h"

namespace eakd {
EAKD_KERNEL_TABLES(avx512)
}  // namespace eakd

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace eakd {
KernelTables kernels_avx512() { return {}; }
}  // namespace eakd
#endif
