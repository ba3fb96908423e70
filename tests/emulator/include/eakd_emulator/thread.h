// What a running kernel reaches of the emulator: the thread that runs now, and the operations that may suspend it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "types.h"

namespace emulator {

// A fault of the kernel. The message names the block and the thread.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct ThreadContext {
  uint3 thread_index{};
  uint3 block_index{};
  unsigned lane = 0;
  unsigned cluster_rank = 0;
  unsigned char* shared = nullptr;
};

struct LaunchShape {
  dim3 grid, block, cluster;
  std::size_t shared_bytes = 0;
};

// Hidden, so that two extensions of one process, each with its own emulator, cannot run into each other's state.
#define EAKD_EMULATOR_HIDDEN __attribute__((visibility("hidden")))
extern EAKD_EMULATOR_HIDDEN ThreadContext* current_thread;
extern EAKD_EMULATOR_HIDDEN LaunchShape launch_shape;

// Throws an Error that names the running thread.
[[noreturn]] void fail(const std::string& message);

// A place where another thread may run first, if the schedule wants to be difficult.
void preemption_point();

void sync_block();
void cluster_arrive();
void cluster_wait();

enum class WarpOperation : std::uint8_t {
  sync,
  shuffle,
  shuffle_up,
  shuffle_down,
  shuffle_xor,
  ballot,
  any,
  all,
  reduce_max
};

// Meets the other lanes of the mask. A shuffle returns the bits given by lane `source`, a vote the mask of the lanes
// whose bits are not 0, reduce_max the largest of the bits taken as int.
std::uint64_t meet_warp(WarpOperation operation, unsigned mask, std::uint64_t bits = 0, unsigned source = 0);

// The lanes that `mask` stands for: a full mask is taken as all lanes that a last, partial warp has.
unsigned lanes_of(unsigned mask);

// Where CTA `rank` of the cluster has the shared object that is at `shared` in this one.
const void* remote_address(const void* shared, unsigned rank, std::size_t bytes);

void barrier_init(std::uint64_t* barrier, unsigned count);
void barrier_init_fence();
void barrier_expect_bytes(std::uint64_t* barrier, unsigned bytes);
void barrier_arrive(std::uint64_t* barrier);
void barrier_wait(std::uint64_t* barrier, unsigned parity);
void bulk_copy(void* shared, const void* global, unsigned bytes, std::uint64_t* barrier);

}  // namespace emulator
