// An emulator of the CUDA execution model for tests on a machine without a GPU. The kernel sources of csrc/cuda are
// compiled against these headers by a host compiler, as they are; a launch runs the kernel on the calling thread and
// returns when it is done. Clusters of CTAs run one after another. Within a cluster every CUDA thread is a fiber, so
// that threads interleave at barriers, warp operations and waits for copies, and nowhere else.
//
// Building: compile kernels with `g++ -x c++ -DEAKD_EMULATED -Itests/emulator/include`, compile tests/emulator/*.cpp
// (without the self-tests) with the same sanitizers, and link all into one program or library.
//
// What it is for is to find faults:
// - A kernel that misuses the model throws emulator::Error out of cudaLaunchKernelEx: barriers or warp operations that
//   some threads never come to, lanes that are not in a mask, remote accesses outside of shared memory, before the
//   cluster has met or after the other CTA has exited, copies that are misaligned, overlap, do not add up to the bytes
//   expected or are still on their way at exit, bytes changed just outside of dynamic shared memory. It is stricter
//   than a device: a thread that has returned counts at no barrier and in no mask.
// - Shared memory starts as NaN, and so does the target of a copy until a thread waits for it: the copy arrives as late
//   as it can. What is used too early shows in the results.
// - emulator::set_schedule picks which thread runs next: 0 the first that can, ~0 the last, else a random one by this
//   seed. All but 0 also suspend threads at barriers they need not wait at, and random ones let some copies arrive as
//   soon as they are issued. Run tests under several.
// - Under -fsanitize=address out-of-bounds accesses to global and shared memory name the kernel's line, as do reads of
//   what a copy has yet to fill. Under -fsanitize=thread a missing barrier is a data race: barriers order what their
//   threads do, and shuffles, votes, fences and atomics order nothing. TSan knows at most about 8000 threads.
//
// Not modelled: memory that is weaker than sequentially consistent between fibers, other than through TSan; the
// generic and the async proxy as different; warps that diverge; spinning on memory for another thread, which never
// ends; occupancy beyond a rough bound; bank conflicts and time; approximate functions' errors beyond subnormals.
//
// Device functions must not be noexcept: a fault unwinds every thread of the cluster through them.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__  // empty, since the standard library writes __attribute__((__noinline__))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static_assert(false, "static __shared__ is not emulated: use eakd::ptx::dynamic_shared()");

#include "eakd_emulator/intrinsics.h"
#include "eakd_emulator/runtime_api.h"
#include "eakd_emulator/thread.h"
#include "eakd_emulator/types.h"

#define threadIdx (::emulator::current_thread->thread_index)
#define blockIdx (::emulator::current_thread->block_index)
// No macros, since cudaLaunchConfig_t has members of these names.
extern EAKD_EMULATOR_HIDDEN dim3 blockDim;
extern EAKD_EMULATOR_HIDDEN dim3 gridDim;
