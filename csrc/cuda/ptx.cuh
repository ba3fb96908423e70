// Instructions that C++ has no words for. The emulator in tests/emulator has the same functions, and nothing else in
// csrc/cuda knows which of the two it is compiled for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#if defined(EAKD_EMULATED)
#include <eakd_emulator/ptx.h>
#else

namespace eakd {
namespace ptx {

// One instruction. exp2f, without ftz, would be three more; subnormal exponentials are below every tolerance.
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The same number, which the compiler does not know: what follows from it is computed again, not kept in registers.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char shared[];
  return shared;
}

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Clusters, mbarriers and bulk copies are Hopper's. Kernels that use them are not launched on anything older, but are
// compiled for it.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define EAKD_HOPPER(...) __VA_ARGS__
#else
#define EAKD_HOPPER(...) __trap()
#endif

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
  EAKD_HOPPER(asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
  return rank;
}

// Everything before the arrival of any thread of the cluster is visible to every thread after its wait.
__device__ __forceinline__ void cluster_arrive() {
  EAKD_HOPPER(asm volatile("barrier.cluster.arrive.release.aligned;" :: : "memory"));
}

__device__ __forceinline__ void cluster_wait() {
  EAKD_HOPPER(asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory"));
}

// The number at the same place in the shared memory of another CTA of the cluster.
__device__ __forceinline__ float load_remote(const float* own, unsigned rank) {
  float value = 0;
  EAKD_HOPPER(unsigned remote;
              asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(own)), "r"(rank));
              asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory"));
  return value;
}

// An mbarrier counts arrivals and bytes; a phase of it is complete when both are there. Phases have parity 0, 1, 0 ...
__device__ __forceinline__ void barrier_init(uint64_t* barrier, unsigned count) {
  EAKD_HOPPER(
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory"));
}

// Makes initialised barriers known to the engine that copies.
__device__ __forceinline__ void barrier_init_fence() {
  EAKD_HOPPER(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
}

// An arrival that announces bytes. Before the copies, or the phase could complete without them.
__device__ __forceinline__ void barrier_expect_bytes(uint64_t* barrier, unsigned bytes) {
  EAKD_HOPPER(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                           "r"(bytes) : "memory"));
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, unsigned parity) {
  EAKD_HOPPER(unsigned done = 0; while (done == 0) asm volatile(
                  "{\n .reg .pred done;\n mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n selp.u32 %0, 1, "
                  "0, done;\n}" : "=r"(done) : "r"(shared_address(barrier)),
                  "r"(parity) : "memory"));
}

// Global to shared memory, by the copy engine; all three multiples of 16. Streamed: read once.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  EAKD_HOPPER(uint64_t policy; asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy)); asm volatile(
                  "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
                  "[%3], %4;" ::"r"(shared_address(shared)),
                  "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy) : "memory"));
}

}  // namespace ptx
}  // namespace eakd

#endif
