// Faults that take a sanitizer to find. The test looks for the lines marked with the name of the case.
#include <memory>

#include "cases.h"

namespace self_test {
namespace {

using namespace eakd::ptx;

__global__ void global_past_the_end(const float* values, float* result) {
  result[threadIdx.x] = values[threadIdx.x];  // global_past_the_end
}

__global__ void shared_past_the_end(float* result) {
  result[threadIdx.x] = shared_as<float>()[threadIdx.x];  // shared_past_the_end
}

__global__ void copy_past_the_end(const float* values) {
  auto* const barrier = shared_as<std::uint64_t>();
  barrier_init(barrier, 1);
  barrier_init_fence();
  barrier_expect_bytes(barrier, 128);
  bulk_copy(shared_as<float>(64), values, 128, barrier);  // copy_past_the_end
  barrier_wait(barrier, 0);
}

__global__ void read_of_pending_copy(const float* values, float* result) {
  auto* const barrier = shared_as<std::uint64_t>();
  barrier_init(barrier, 1);
  barrier_init_fence();
  barrier_expect_bytes(barrier, 64);
  bulk_copy(shared_as<float>(64), values, 64, barrier);
  *result = *shared_as<float>(64);  // read_of_pending_copy
  barrier_wait(barrier, 0);
}

__global__ void missing_block_barrier(float* result) {
  shared_as<float>()[threadIdx.x] = 1;  // missing_block_barrier
  __syncwarp();
  result[threadIdx.x] = shared_as<float>()[threadIdx.x ^ 32];
}

__global__ void shuffle_as_barrier(float* result) {
  shared_as<float>()[threadIdx.x] = 1;  // shuffle_as_barrier
  __shfl_xor_sync(~0u, 1, 1);
  result[threadIdx.x] = shared_as<float>()[threadIdx.x ^ 1];
}

__global__ void other_half_of_warp(float* result) {
  shared_as<float>()[threadIdx.x] = 1;  // other_half_of_warp
  __syncwarp(threadIdx.x < 16 ? 0xffffu : 0xffff0000u);
  result[threadIdx.x] = shared_as<float>()[threadIdx.x ^ 16];
}

__global__ void missing_cluster_barrier(float* result) {
  cluster_sync();
  store_remote(shared_as<float>() + threadIdx.x, cluster_rank() ^ 1, 1.0f);  // missing_cluster_barrier
  __syncthreads();
  result[blockIdx.x * blockDim.x + threadIdx.x] = shared_as<float>()[threadIdx.x];
  cluster_sync();
}

// Fills a buffer again that others may still read.
__global__ void refill_while_read(const float* values, float* result) {
  auto* const barrier = shared_as<std::uint64_t>();
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
  }
  __syncthreads();
  for (unsigned phase = 0; phase < 2; ++phase) {
    if (threadIdx.x == 0) {
      barrier_expect_bytes(barrier, 64);
      bulk_copy(shared_as<float>(64), values, 64, barrier);
    }
    barrier_wait(barrier, phase);
    if (threadIdx.x < 16) result[threadIdx.x] += shared_as<float>(64)[threadIdx.x];  // refill_while_read
  }
}

struct alignas(16) Aligned {
  float values[16];
};

// On the heap, where ASan knows every end.
struct Data {
  std::unique_ptr<Aligned> values = std::make_unique<Aligned>();
  std::unique_ptr<float[]> results = std::make_unique<float[]>(256);
};

template <class... Parameters>
std::function<void()> under(const Shape& shape, void (*kernel)(Parameters...)) {
  return [=] {
    const Data data;
    if constexpr (sizeof...(Parameters) == 2) {
      launch(shape, kernel, static_cast<const float*>(data.values->values), data.results.get());
    } else {
      launch(shape, kernel, data.results.get());
    }
  };
}

void copy_too_much() {
  const Data data;
  launch({1, 1, 1, 256}, copy_past_the_end, static_cast<const float*>(data.values->values));
}

}  // namespace

Cases sanitized_faults() {
  return {
      {"global_past_the_end", under({1, 32}, global_past_the_end)},
      {"shared_past_the_end", under({1, 32, 1, 124}, shared_past_the_end)},
      {"copy_past_the_end", copy_too_much},
      {"read_of_pending_copy", under({1, 1, 1, 256}, read_of_pending_copy)},
      {"missing_block_barrier", under({1, 64, 1, 256}, missing_block_barrier)},
      {"shuffle_as_barrier", under({1, 32, 1, 128}, shuffle_as_barrier)},
      {"other_half_of_warp", under({1, 32, 1, 128}, other_half_of_warp)},
      {"missing_cluster_barrier", under({2, 32, 2, 128}, missing_cluster_barrier)},
      {"refill_while_read", under({1, 32, 1, 128}, refill_while_read)},
  };
}

}  // namespace self_test
