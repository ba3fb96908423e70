// The device functions of CUDA that kernels here use: barriers, warp operations, cached loads, bit casts, atomics.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "thread.h"

namespace emulator {

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable_v<From>);
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// A misaligned wide access is a fault on a device, but often none on the host.
template <class T>
T* aligned(T* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignof(T)) fail("misaligned address");
  return address;
}

template <class T>
T shuffle(WarpOperation operation, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "shuffles move 4 or 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = meet_warp(operation, mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The first lane of this lane's segment.
inline unsigned segment(int width) {
  if (width < 1 || width > 32 || (width & (width - 1))) fail("the width of a shuffle is no power of two up to 32");
  return current_thread->lane & ~static_cast<unsigned>(width - 1);
}

}  // namespace emulator

inline void __syncthreads() { emulator::sync_block(); }
inline void __syncwarp(unsigned mask = ~0u) { emulator::meet_warp(emulator::WarpOperation::sync, mask); }

// A lane whose source would be outside of its segment gets its own value back.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned lane = emulator::segment(width) | (static_cast<unsigned>(source) & static_cast<unsigned>(width - 1));
  return emulator::shuffle(emulator::WarpOperation::shuffle, mask, value, lane);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emulator::current_thread->lane, first = emulator::segment(width);
  const unsigned source = lane - first >= delta ? lane - delta : lane;
  return emulator::shuffle(emulator::WarpOperation::shuffle_up, mask, value, source);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emulator::current_thread->lane, end = emulator::segment(width) + static_cast<unsigned>(width);
  const unsigned source = end - lane > delta ? lane + delta : lane;
  return emulator::shuffle(emulator::WarpOperation::shuffle_down, mask, value, source);
}

// Unlike the others, this one does reach into earlier segments.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const unsigned lane = emulator::current_thread->lane, end = emulator::segment(width) + static_cast<unsigned>(width);
  const unsigned source = lane ^ static_cast<unsigned>(lane_mask);
  return emulator::shuffle(emulator::WarpOperation::shuffle_xor, mask, value, source < end ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(emulator::meet_warp(emulator::WarpOperation::ballot, mask, predicate != 0));
}
inline int __any_sync(unsigned mask, int predicate) {
  return emulator::meet_warp(emulator::WarpOperation::any, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return emulator::meet_warp(emulator::WarpOperation::all, mask, predicate != 0) == emulator::lanes_of(mask);
}
inline int __reduce_max_sync(unsigned mask, int value) {
  const auto bits = emulator::meet_warp(emulator::WarpOperation::reduce_max, mask, static_cast<unsigned>(value));
  return static_cast<int>(static_cast<unsigned>(bits));
}

// Memory is sequentially consistent here. TSan takes no order from a fence.
inline void __threadfence() { emulator::preemption_point(); }
inline void __threadfence_block() { emulator::preemption_point(); }

template <class T>
T __ldg(const T* address) {
  return *emulator::aligned(address);
}
template <class T>
T __ldcs(const T* address) {
  return *emulator::aligned(address);
}
template <class T>
T __ldcg(const T* address) {
  return *emulator::aligned(address);
}
template <class T>
void __stcs(T* address, T value) {
  *emulator::aligned(address) = value;
}
template <class T>
void __stcg(T* address, T value) {
  *emulator::aligned(address) = value;
}

// No templates, which would be ambiguous beside those of a `using namespace std`.
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a < b ? b : a; }
inline unsigned long min(unsigned long a, unsigned long b) { return a < b ? a : b; }
inline unsigned long max(unsigned long a, unsigned long b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a < b ? b : a; }

[[noreturn]] inline void __trap() { emulator::fail("__trap"); }

inline float __int_as_float(int x) { return emulator::bit_cast<float>(x); }
inline int __float_as_int(float x) { return emulator::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return emulator::bit_cast<unsigned>(x); }

inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fdividef(float x, float y) {
  // Documented: a divisor above 2^126 gives 0, or NaN below an infinite dividend.
  return std::fabs(y) > 0x1p126f && std::isfinite(y) ? x * 0.0f : x / y;
}

// Relaxed, as on a device: they order nothing but themselves.
template <class T>
T atomicCAS(T* address, T expected, T desired) {
  static_assert(std::is_integral_v<T>);
  __atomic_compare_exchange_n(address, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  emulator::preemption_point();
  return expected;
}

namespace emulator {

template <class T, class Update>
T atomic_update(T* address, Update update) {
  T old, desired;
  __atomic_load(aligned(address), &old, __ATOMIC_RELAXED);
  do {
    desired = update(old);
  } while (!__atomic_compare_exchange(address, &old, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  preemption_point();
  return old;
}

template <class T>
struct Same {
  using type = T;
};

}  // namespace emulator

// As on a device, the address alone tells the type.
template <class T>
T atomicAdd(T* address, typename emulator::Same<T>::type value) {
  return emulator::atomic_update(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* address, typename emulator::Same<T>::type value) {
  static_assert(std::is_integral_v<T>, "CUDA has atomicMax for integers only");
  return emulator::atomic_update(address, [=](T old) { return value > old ? value : old; });
}
