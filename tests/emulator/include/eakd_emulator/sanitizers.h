// Which sanitizer this is compiled for, and the annotations that keep it informed. Without one, all of it is empty.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define EAKD_EMULATOR_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#define EAKD_EMULATOR_TSAN 1
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
void __tsan_read_range(void* address, unsigned long size);
}
#endif

namespace emulator {

// Fibers share the emulator's own state without any synchronisation that TSan knows of: it must not record those
// accesses. Scopes may span a switch, since TSan keeps the state by fiber.
class TsanIgnore {
 public:
#ifdef EAKD_EMULATOR_TSAN
  TsanIgnore() { __tsan_ignore_thread_begin(); }
  ~TsanIgnore() { __tsan_ignore_thread_end(); }
#else
  TsanIgnore() {}
#endif
  TsanIgnore(const TsanIgnore&) = delete;
  TsanIgnore& operator=(const TsanIgnore&) = delete;
};

inline void tsan_release([[maybe_unused]] void* sync) {
#ifdef EAKD_EMULATOR_TSAN
  __tsan_release(sync);
#endif
}

inline void tsan_acquire([[maybe_unused]] void* sync) {
#ifdef EAKD_EMULATOR_TSAN
  __tsan_acquire(sync);
#endif
}

inline void tsan_read([[maybe_unused]] const void* data, [[maybe_unused]] std::size_t bytes) {
#ifdef EAKD_EMULATOR_TSAN
  __tsan_read_range(const_cast<void*>(data), bytes);
#endif
}

inline void asan_poison([[maybe_unused]] const void* data, [[maybe_unused]] std::size_t bytes) {
#ifdef EAKD_EMULATOR_ASAN
  __asan_poison_memory_region(data, bytes);
#endif
}

inline void asan_unpoison([[maybe_unused]] const void* data, [[maybe_unused]] std::size_t bytes) {
#ifdef EAKD_EMULATOR_ASAN
  __asan_unpoison_memory_region(data, bytes);
#endif
}

// Reports an out-of-bounds or poisoned byte of a range at this call, where the kernel is still on the stack.
inline void asan_check([[maybe_unused]] const void* data, [[maybe_unused]] std::size_t bytes) {
#ifdef EAKD_EMULATOR_ASAN
  if (void* bad = __asan_region_is_poisoned(const_cast<void*>(data), bytes)) (void)*static_cast<volatile char*>(bad);
#endif
}

}  // namespace emulator
