// The kernels for the compiler's baseline: SSE2 on x86-64, NEON on aarch64.
#define EAKD_VECTOR_BYTES 16
#include "kernel_tables.h"

namespace eakd {
EAKD_KERNEL_TABLES(default)
}  // namespace eakd
