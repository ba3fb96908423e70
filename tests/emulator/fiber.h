// A stack of its own for each CUDA thread, and the switch between two of them.
#pragma once

#include <cstddef>

#include "eakd_emulator/sanitizers.h"

#if !defined(__x86_64__) && !defined(EAKD_EMULATOR_UCONTEXT)
#define EAKD_EMULATOR_UCONTEXT 1  // portable, and some twenty times slower: every switch is a system call
#endif
#ifdef EAKD_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // A fiber is created once and never ends: `entry` calls `entered`, then loops over the work it is given.
  void create(void (*entry)());
  bool created() const { return bottom_ != nullptr; }

  // Makes this the fiber of the calling OS thread itself.
  void adopt_os_thread();

  // Returns when something switches back to `from`.
  static void switch_to(Fiber& from, Fiber& to);
  static void entered();

 private:
#ifdef EAKD_EMULATOR_UCONTEXT
  ucontext_t context_{};
#else
  void* stack_pointer_ = nullptr;
#endif
  const void* bottom_ = nullptr;
  std::size_t size_ = 0;
  void* asan_stack_ = nullptr;
  void* tsan_fiber_ = nullptr;
};

}  // namespace emulator
