// The state of the emulated machine: one cluster of CTAs at a time, of one launch at a time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "eakd_emulator/runtime_api.h"
#include "eakd_emulator/thread.h"
#include "fiber.h"
#include "run_queue.h"

namespace emulator {

inline constexpr unsigned kWarpSize = 32;
inline constexpr unsigned kMaxWarpsPerCta = 32;
inline constexpr unsigned char kPoison = 0xff;  // NaN in every format

struct Cta;
struct Warp;
struct CopyBarrier;

enum class Wait : std::uint8_t { nothing, block_barrier, warp_operation, cluster_barrier, copy_barrier };

struct WarpRequest {
  WarpOperation operation{};
  unsigned mask = 0;
  unsigned source = 0;
  std::uint64_t bits = 0;  // what this lane gives; once all have met, what it gets
};

struct Thread : ThreadContext {
  Fiber fiber;
  Warp* warp = nullptr;
  Cta* cta = nullptr;
  Wait waits_for = Wait::nothing;
  bool started = false, returned = false;
  bool arrived_at_cluster = false;  // and has yet to wait
  std::uint64_t cluster_phase = 0;  // in which it arrived
  unsigned cluster_arrivals = 0;
  WarpRequest request;
  const CopyBarrier* copy_barrier = nullptr;  // that it waits for

  std::uint32_t lane_bit() const { return std::uint32_t{1} << lane; }
};

struct Warp {
  unsigned index = 0;         // in the cluster
  std::uint32_t present = 0;  // all lanes but in a last, partial warp
  std::uint32_t returned = 0;
  std::uint32_t meeting = 0;                          // lanes that wait in a warp operation
  std::uint32_t at_cluster = 0;                       // lanes that wait at the cluster's barrier
  std::array<std::array<char, 2>, kWarpSize> sync{};  // addresses that TSan keeps clocks for, by lowest lane and turn
  std::array<std::uint8_t, kWarpSize> turn{};
  std::array<Thread, kWarpSize> threads;
};

// Dynamic shared memory between two red zones.
class SharedMemory {
 public:
  void prepare(std::size_t bytes);
  void poison();
  bool red_zones_intact() const;
  unsigned char* base() const { return storage_.get() + kRedZone; }
  bool contains(const void* address, std::size_t bytes) const;

 private:
  // Leaves the base aligned to 128 bytes and no more, for kernels not to rely on more.
  static constexpr std::size_t kRedZone = 128;
  struct Free {
    void operator()(unsigned char* storage) const;
  };

  std::unique_ptr<unsigned char, Free> storage_;
  std::size_t capacity_ = 0, bytes_ = 0;
};

struct Copy {
  unsigned char* destination;
  const void* source;
  unsigned bytes;
  bool delivered;
};

// An mbarrier. Shared memory holds only a handle of it, by which overwritten and uninitialised ones are told.
struct CopyBarrier {
  std::uint64_t* address = nullptr;
  const Thread* initialised_by = nullptr;
  bool fenced = false;
  unsigned count = 0, pending = 0;  // arrivals of a phase, and those still to come
  std::uint64_t phase = 0;
  std::uint64_t expected = 0, issued = 0;  // bytes of this phase
  std::vector<Copy> copies;                // of this phase
  std::array<std::uint32_t, kMaxWarpsPerCta> waiting{};
  std::array<char, 2> sync{};  // addresses that TSan keeps clocks for, by parity
};

struct Cta {
  unsigned rank = 0;
  uint3 index{};
  unsigned first_warp = 0, warps = 0;
  unsigned live = 0, arrived = 0;
  std::uint64_t phase = 0;
  std::array<char, 2> sync{};         // as above
  unsigned cluster_waits = 0;         // that its threads have come through
  unsigned cluster_waits_needed = 0;  // before it may exit, for others to have done with its shared memory
  SharedMemory shared;
  std::deque<CopyBarrier> barriers;
};

struct Machine {
  Body body{};
  std::uint64_t schedule = 0, random_state = 0;
  unsigned ctas_per_cluster = 1, threads_per_cta = 1, warps = 1;
  std::deque<Warp> warp_pool;  // deques: threads and barriers must not move
  std::deque<Cta> cta_pool;

  RunQueue runnable;
  unsigned live = 0;
  unsigned cluster_arrived = 0;
  std::uint64_t cluster_phase = 0;
  std::array<char, 2> cluster_sync{};
  char start_sync = 0, end_sync = 0;  // apart: threads that start late get no order from those that have ended

  Fiber scheduler;
  bool cancelled = false;
  std::exception_ptr error;

  bool adversarial() const { return schedule != 0; }
  bool randomised() const { return schedule != 0 && schedule != ~std::uint64_t{0}; }
  std::uint64_t random();
  Warp& warp_of(const Cta& cta, unsigned index) { return warp_pool[cta.first_warp + index]; }
};

Machine& machine();

// Throws what the kernel did wrong. The shape must be one that the device takes.
void run_grid(const LaunchShape& shape, Body body);

inline Thread& self() { return *static_cast<Thread*>(current_thread); }

// Runs other threads until something has made this one runnable.
void suspend(Wait reason);
// Runs another thread first, if there is one.
void yield();

// Faults that show only from outside: after the last thread of a CTA, and when no thread can run.
void finish_cta(Cta& cta);
void finish_cluster();
std::string describe_deadlock();
std::string name(const Thread& thread);
[[noreturn]] void fail_at(const Thread& thread, const std::string& message);
void require_capability(int major, const char* what);

}  // namespace emulator
