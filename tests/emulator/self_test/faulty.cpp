// One small kernel for each fault that the emulator detects by itself.
#include <vector>

#include "cases.h"

extern "C" void eakd_emulator_device(int capability, int multiprocessors);

namespace self_test {
namespace {

using namespace eakd::ptx;

__global__ void divergent_block_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void return_before_barrier() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}
__global__ void divergent_cluster_barrier() {
  if (cluster_rank() != 1) cluster_sync();
}
__global__ void divergent_warp() {
  if (threadIdx.x % 32 < 16) {
    __shfl_xor_sync(~0u, 1.0f, 1);
  } else {
    __syncthreads();
  }
}
__global__ void mixed_warp_operations() {
  if (threadIdx.x % 2) {
    __syncwarp();
  } else {
    __shfl_xor_sync(~0u, 1.0f, 1);
  }
}
__global__ void lane_outside_its_mask() { __shfl_xor_sync(0xffffu, 1.0f, 1); }
__global__ void shuffle_from_outside_the_mask() {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1.0f, 20);
}
__global__ void shuffle_from_absent_lane() { __shfl_xor_sync(~0u, 1.0f, 16); }
__global__ void mask_of_absent_lanes() { __syncwarp(0xffffffu); }
__global__ void shuffle_with_returned_lane() {
  if (threadIdx.x == 31) return;
  __syncthreads();
}
__global__ void vote_with_returned_lane() {
  if (threadIdx.x == 0) return;
  __any_sync(~0u, 1);
}
__global__ void odd_width() { __shfl_sync(~0u, 1, 0, 12); }

__global__ void arrive_twice() {
  cluster_arrive();
  cluster_arrive();
}
__global__ void wait_without_arriving() { cluster_wait(); }
__global__ void remote_to_local_variable() {
  int local = 0;
  cluster_sync();
  load_remote(&local, 0);
}
__global__ void remote_past_the_end() {
  cluster_sync();
  load_remote(shared_as<uint4>(64 - 8), 0);
}
__global__ void remote_to_absent_cta() {
  cluster_sync();
  store_remote(shared_as<int>(), 2, 1);
}
__global__ void remote_before_start() { store_remote(shared_as<int>(), cluster_rank() ^ 1, 1); }
__global__ void remote_after_exit() {
  cluster_sync();
  if (cluster_rank() == 0) load_remote(shared_as<int>(), 1);
}
__global__ void wide_load_misaligned(const float* values) { __ldg(reinterpret_cast<const float4*>(values + 1)); }
__global__ void write_past_shared() { shared_as<char>()[64 + threadIdx.x] = 0; }

struct alignas(16) Block {
  float values[64];
};

__device__ void init_barrier(std::uint64_t* barrier, unsigned count = 1) {
  if (threadIdx.x == 0) {
    barrier_init(barrier, count);
    barrier_init_fence();
  }
  __syncthreads();
}

// Copies as the arguments say, from thread 0.
struct CopyPlan {
  unsigned destination = 64, source = 0, bytes = 64, expected = 64;
  unsigned second_destination = 0, second_bytes = 0;
  unsigned count = 1;
  bool waits = true;
};

__global__ void copy(const float* values, CopyPlan plan) {
  auto* const barrier = shared_as<std::uint64_t>();
  const char* const source = reinterpret_cast<const char*>(values) + plan.source;
  init_barrier(barrier, plan.count);
  if (threadIdx.x == 0) {
    barrier_expect_bytes(barrier, plan.expected);
    bulk_copy(dynamic_shared() + plan.destination, source, plan.bytes, barrier);
    if (plan.second_bytes) bulk_copy(dynamic_shared() + plan.second_destination, source, plan.second_bytes, barrier);
  }
  if (plan.waits) barrier_wait(barrier, 0);
}
__global__ void barrier_not_initialised() { barrier_arrive(shared_as<std::uint64_t>()); }
__global__ void barrier_overwritten() {
  auto* const barrier = shared_as<std::uint64_t>();
  init_barrier(barrier);
  if (threadIdx.x == 0) *barrier = 1;
  __syncthreads();
  barrier_wait(barrier, 0);
}
__global__ void barrier_initialised_twice() {
  init_barrier(shared_as<std::uint64_t>());
  init_barrier(shared_as<std::uint64_t>());
}
__global__ void barrier_without_fence(const float* values) {
  auto* const barrier = shared_as<std::uint64_t>();
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_expect_bytes(barrier, 64);
    bulk_copy(dynamic_shared() + 64, values, 64, barrier);
  }
  __syncthreads();
  barrier_wait(barrier, 0);
}
__global__ void barrier_outside_of_shared() {
  std::uint64_t local;
  barrier_init(&local, 1);
}
__global__ void too_many_arrivals(const float* values) {
  auto* const barrier = shared_as<std::uint64_t>();
  init_barrier(barrier);
  if (threadIdx.x == 0) {
    barrier_expect_bytes(barrier, 128);
    bulk_copy(dynamic_shared() + 64, values, 64, barrier);
    barrier_expect_bytes(barrier, 128);
  }
}
__global__ void too_many_bytes() {
  auto* const barrier = shared_as<std::uint64_t>();
  init_barrier(barrier);
  if (threadIdx.x == 0) barrier_expect_bytes(barrier, 1u << 20);
}

// Not a fault by itself, but what it reads must be NaN: throws for the test if it is.
__global__ void read_before_wait(const float* values, float* read) {
  auto* const barrier = shared_as<std::uint64_t>();
  init_barrier(barrier);
  if (threadIdx.x == 0) {
    barrier_expect_bytes(barrier, 64);
    bulk_copy(dynamic_shared() + 64, values, 64, barrier);
    *read = *shared_as<float>(64);
    barrier_wait(barrier, 0);
    read[1] = *shared_as<float>(64);
  }
}
__global__ void read_unwritten(float* read) { *read = *shared_as<float>(); }

void stale_values() {
  Block block{};
  float read[2];
  block.values[0] = 5;
  launch({1, 32, 1, 128}, read_unwritten, static_cast<float*>(read));
  require(read[0] != read[0], "shared memory that was not written is NaN");
  launch({1, 32, 1, 128}, read_before_wait, static_cast<const float*>(block.values), static_cast<float*>(read));
  require(read[1] == 5, "what a copy brings");
  if (read[0] != read[0]) throw emulator::Error("read NaN before the wait");
}

template <class Kernel>
std::function<void()> under(const Shape& shape, Kernel* kernel) {
  return [=] { launch(shape, kernel); };
}

template <class Kernel>
std::function<void()> with_values(Kernel* kernel) {
  return [=] {
    Block block{};
    launch({1, 32, 1, 128}, kernel, static_cast<const float*>(block.values));
  };
}

std::function<void()> copying(void (*change)(CopyPlan&)) {
  return [=] {
    Block block[4]{};
    CopyPlan plan;
    change(plan);
    launch({1, 32, 1, 512}, copy, static_cast<const float*>(block[0].values), plan);
  };
}

void no_clusters_on_sm80() {
  eakd_emulator_device(80, 2);
  launch({1, 32}, arrive_twice);
}

Cases copy_faults() {
  return {
      {"copy_to_misaligned", copying([](CopyPlan& plan) { plan.destination = 72; })},
      {"copy_from_misaligned", copying([](CopyPlan& plan) { plan.source = 4; })},
      {"copy_of_odd_size", copying([](CopyPlan& plan) { plan.bytes = 24; })},
      {"copy_of_nothing", copying([](CopyPlan& plan) { plan.bytes = 0; })},
      {"copy_past_shared", copying([](CopyPlan& plan) { plan.destination = 480; })},
      {"copy_onto_barrier", copying([](CopyPlan& plan) { plan.destination = 0; })},
      {"copy_brings_too_much", copying([](CopyPlan& plan) { plan.bytes = 128; })},
      {"copy_brings_too_little", copying([](CopyPlan& plan) { plan.expected = 128; })},
      {"copy_lacks_arrival", copying([](CopyPlan& plan) { plan.count = 2; })},
      {"copy_without_wait", copying([](CopyPlan& plan) { plan.waits = false; })},
      {"copies_overlap", copying([](CopyPlan& plan) {
         plan.second_destination = 112;
         plan.second_bytes = 32;
         plan.expected = 96;
       })},
      {"barrier_not_initialised", under({1, 32, 1, 128}, barrier_not_initialised)},
      {"barrier_overwritten", under({1, 32, 1, 128}, barrier_overwritten)},
      {"barrier_initialised_twice", under({1, 32, 1, 128}, barrier_initialised_twice)},
      {"barrier_without_fence", with_values(barrier_without_fence)},
      {"barrier_outside_of_shared", under({1, 32, 1, 128}, barrier_outside_of_shared)},
      {"too_many_arrivals", with_values(too_many_arrivals)},
      {"too_many_bytes", under({1, 32, 1, 128}, too_many_bytes)},
      {"read_before_wait", stale_values},
  };
}

}  // namespace

Cases faulty_kernels() {
  Cases cases{
      {"divergent_block_barrier", under({1, 64}, divergent_block_barrier)},
      {"return_before_barrier", under({1, 64}, return_before_barrier)},
      {"divergent_cluster_barrier", under({4, 32, 4}, divergent_cluster_barrier)},
      {"divergent_warp", under({1, 64}, divergent_warp)},
      {"mixed_warp_operations", under({1, 64}, mixed_warp_operations)},
      {"lane_outside_its_mask", under({1, 32}, lane_outside_its_mask)},
      {"shuffle_from_outside_the_mask", under({1, 32}, shuffle_from_outside_the_mask)},
      {"shuffle_from_absent_lane", under({1, 48}, shuffle_from_absent_lane)},
      {"mask_of_absent_lanes", under({1, 16}, mask_of_absent_lanes)},
      {"shuffle_with_returned_lane", under({1, 32}, shuffle_with_returned_lane)},
      {"vote_with_returned_lane", under({1, 32}, vote_with_returned_lane)},
      {"odd_width", under({1, 32}, odd_width)},
      {"arrive_twice", under({2, 32, 2}, arrive_twice)},
      {"wait_without_arriving", under({2, 32, 2}, wait_without_arriving)},
      {"remote_to_local_variable", under({2, 32, 2, 64}, remote_to_local_variable)},
      {"remote_past_the_end", under({2, 32, 2, 64}, remote_past_the_end)},
      {"remote_to_absent_cta", under({2, 32, 2, 64}, remote_to_absent_cta)},
      {"remote_before_start", under({2, 32, 2, 64}, remote_before_start)},
      {"remote_after_exit", under({2, 32, 2, 64}, remote_after_exit)},
      {"wide_load_misaligned", with_values(wide_load_misaligned)},
      {"write_past_shared", under({1, 32, 1, 64}, write_past_shared)},
      {"no_clusters_on_sm80", no_clusters_on_sm80},
  };
  cases.merge(copy_faults());
  return cases;
}

}  // namespace self_test
