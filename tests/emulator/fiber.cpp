#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#ifndef EAKD_EMULATOR_UCONTEXT
// Saves what the ABI has a function preserve, changes stacks, and returns on the other one. The modes of the SSE and
// x87 units are not saved: no kernel changes them.
extern "C" void eakd_emulator_switch(void** save_stack_pointer, void* stack_pointer)
    __attribute__((visibility("hidden")));
asm(R"(
.pushsection .text
.globl eakd_emulator_switch
.hidden eakd_emulator_switch
.type eakd_emulator_switch, @function
eakd_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size eakd_emulator_switch, . - eakd_emulator_switch
.popsection
)");
#endif

namespace emulator {
namespace {

#if defined(EAKD_EMULATOR_ASAN) || defined(EAKD_EMULATOR_TSAN)
constexpr std::size_t kStackBytes = 256 << 10;  // redzones make frames larger
#else
constexpr std::size_t kStackBytes = 128 << 10;
#endif
constexpr std::size_t kStacksPerSlab = 64;

Fiber* switching_from = nullptr;

// Stacks are never returned. Only pages that are touched take memory, and the page below each stack faults.
unsigned char* new_stack() {
  static unsigned char* next = nullptr;
  static std::size_t left = 0;
  const auto guard = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  if (left == 0) {
    void* slab = mmap(nullptr, kStacksPerSlab * (guard + kStackBytes), PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) throw std::bad_alloc();
    next = static_cast<unsigned char*>(slab);
    left = kStacksPerSlab;
  }
  unsigned char* stack = next + guard;
  if (mprotect(stack, kStackBytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  next += guard + kStackBytes;
  --left;
  return stack;
}

}  // namespace

void Fiber::create(void (*entry)()) {
  unsigned char* stack = new_stack();
#ifdef EAKD_EMULATOR_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = kStackBytes;
  makecontext(&context_, entry, 0);
#else
  // Stacks that start at the same offset in their page would compete for the same few cache sets.
  static unsigned color = 0;
  unsigned char* top = stack + kStackBytes - (color++ % 32) * 128;
  void** frame = reinterpret_cast<void**>(top);
  *--frame = nullptr;  // the return address of `entry`: unwinders stop here
  *--frame = reinterpret_cast<void*>(entry);
  for (int preserved = 0; preserved < 6; ++preserved)
    *--frame = nullptr;
  stack_pointer_ = frame;
#endif
#ifdef EAKD_EMULATOR_TSAN
  tsan_fiber_ = __tsan_create_fiber(0);
#endif
  bottom_ = stack;
  size_ = kStackBytes;
}

void Fiber::adopt_os_thread() {
#ifdef EAKD_EMULATOR_TSAN
  tsan_fiber_ = __tsan_get_current_fiber();
#endif
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
  switching_from = &from;
#ifdef EAKD_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&from.asan_stack_, to.bottom_, to.size_);
#endif
#ifdef EAKD_EMULATOR_TSAN
  __tsan_switch_to_fiber(to.tsan_fiber_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EAKD_EMULATOR_UCONTEXT
  swapcontext(&from.context_, &to.context_);
#else
  eakd_emulator_switch(&from.stack_pointer_, to.stack_pointer_);
#endif
#ifdef EAKD_EMULATOR_ASAN
  // ASan alone knows where the stack of an OS thread is, and tells only now.
  __sanitizer_finish_switch_fiber(from.asan_stack_, &switching_from->bottom_, &switching_from->size_);
#endif
}

void Fiber::entered() {
#ifdef EAKD_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &switching_from->bottom_, &switching_from->size_);
#endif
}

}  // namespace emulator
