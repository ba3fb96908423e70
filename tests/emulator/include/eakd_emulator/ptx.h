// The emulated side of csrc/cuda/ptx.cuh: what kernels there write as inline PTX.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "thread.h"

namespace eakd::ptx {

// ex2.approx.ftz.f32
inline float ex2(float x) {
  const float result = std::exp2(std::fabs(x) < FLT_MIN ? 0.0f : x);
  return result < FLT_MIN ? 0.0f : result;  // NaN compares false, and stays
}

// A number that no optimiser may know.
inline int opaque(int x) { return x; }

inline unsigned char* dynamic_shared() { return emulator::current_thread->shared; }

inline unsigned cluster_rank() { return emulator::current_thread->cluster_rank; }
inline unsigned cluster_size() {
  const dim3& cluster = emulator::launch_shape.cluster;
  return cluster.x * cluster.y * cluster.z;
}
inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }

// The accesses themselves are made here, not in the emulator: sanitizers then name the kernel's line.
template <class T>
T load_remote(const T* shared, unsigned rank) {
  static_assert(std::is_trivially_copyable_v<T>);
  return *static_cast<const T*>(emulator::remote_address(shared, rank, sizeof(T)));
}

template <class T>
void store_remote(T* shared, unsigned rank, T value) {
  static_assert(std::is_trivially_copyable_v<T>);
  *static_cast<T*>(const_cast<void*>(emulator::remote_address(shared, rank, sizeof(T)))) = value;
  emulator::preemption_point();
}

inline void barrier_init(std::uint64_t* barrier, unsigned count) { emulator::barrier_init(barrier, count); }
inline void barrier_init_fence() { emulator::barrier_init_fence(); }
inline void barrier_expect_bytes(std::uint64_t* barrier, unsigned bytes) {
  emulator::barrier_expect_bytes(barrier, bytes);
}
inline void barrier_arrive(std::uint64_t* barrier) { emulator::barrier_arrive(barrier); }
inline void barrier_wait(std::uint64_t* barrier, unsigned parity) { emulator::barrier_wait(barrier, parity); }
inline void bulk_copy(void* shared, const void* global, unsigned bytes, std::uint64_t* barrier) {
  emulator::bulk_copy(shared, global, bytes, barrier);
}

}  // namespace eakd::ptx
