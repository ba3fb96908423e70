// Kernels without fault: their results must be right under every schedule and every sanitizer.
#include <cmath>
#include <vector>

#include "cases.h"

namespace self_test {
namespace {

using namespace eakd::ptx;

__device__ float block_sum(float value, float* scratch) {
  for (int offset = 16; offset; offset /= 2)
    value += __shfl_xor_sync(~0u, value, offset);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp)
    sum += scratch[warp];
  __syncthreads();
  return sum;
}

__global__ void sum_rows(const float* __restrict__ rows, float* __restrict__ sums, int n_rows, int columns) {
  for (int row = static_cast<int>(blockIdx.x); row < n_rows; row += static_cast<int>(gridDim.x)) {
    float sum = 0;
    for (int i = static_cast<int>(threadIdx.x); i < columns; i += static_cast<int>(blockDim.x)) {
      sum += __ldg(rows + row * columns + i);
    }
    sum = block_sum(sum, shared_as<float>());
    if (threadIdx.x == 0) sums[row] = sum;
  }
}

void block_reduce() {
  const int n_rows = 5, columns = 333;
  std::vector<float> rows(n_rows * columns), sums(n_rows);
  for (std::size_t i = 0; i < rows.size(); ++i)
    rows[i] = static_cast<float>(i % 7);
  for (const unsigned threads : {32u, 96u, 256u}) {
    launch({2, threads, 1, threads / 32 * sizeof(float)}, sum_rows, rows.data(), sums.data(), n_rows, columns);
    for (int row = 0; row < n_rows; ++row) {
      float sum = 0;
      for (int i = 0; i < columns; ++i)
        sum += rows[static_cast<std::size_t>(row * columns + i)];
      require(sums[static_cast<std::size_t>(row)] == sum, "sum of a row");
    }
  }
}

// Every CTA reads all others' values, then gets one from its left neighbour.
__global__ void exchange(unsigned* results) {
  unsigned* const mine = shared_as<unsigned>();
  if (threadIdx.x == 0) mine[0] = blockIdx.x + 1;
  cluster_sync();
  unsigned sum = 0;
  for (unsigned rank = threadIdx.x; rank < cluster_size(); rank += blockDim.x)
    sum += load_remote(mine, rank);
  atomicAdd(results + blockIdx.x, sum);
  if (threadIdx.x == 0) store_remote(mine + 1, (cluster_rank() + 1) % cluster_size(), blockIdx.x);
  cluster_sync();
  if (threadIdx.x == 1) atomicAdd(results + blockIdx.x, 1000 * mine[1]);
}

void cluster_exchange() {
  for (const unsigned size : {1u, 2u, 4u, 16u}) {
    require(cudaFuncSetAttribute(exchange, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess,
            "attribute");
    std::vector<unsigned> results(2 * size);
    const unsigned threads = size > 8 ? 20 : 48;  // TSan takes a millisecond to create a fiber
    launch({2 * size, threads, size, 8}, exchange, results.data());
    for (unsigned block = 0; block < 2 * size; ++block) {
      const unsigned first = block / size * size, left = first + (block - first + size - 1) % size;
      unsigned sum = 1000 * left;
      for (unsigned other = first; other < first + size; ++other)
        sum += other + 1;
      require(results[block] == sum, "exchange in a cluster of " + std::to_string(size));
    }
  }
}

constexpr unsigned kStages = 3, kTile = 64;

// Thread 0 fills a ring of tiles ahead of the others. A tile is filled anew once all have met after reading it.
__global__ void ring(const float* rows, float* sums, unsigned tiles) {
  auto* const full = shared_as<std::uint64_t>();
  float* const buffer = shared_as<float>(128);
  if (threadIdx.x == 0) {
    for (unsigned stage = 0; stage < kStages; ++stage)
      barrier_init(full + stage, 1);
    barrier_init_fence();
  }
  __syncthreads();
  const auto fill = [&](unsigned tile) {
    const unsigned stage = tile % kStages;
    barrier_expect_bytes(full + stage, kTile * sizeof(float));
    bulk_copy(buffer + stage * kTile, rows + tile * kTile, kTile * sizeof(float), full + stage);
  };
  if (threadIdx.x == 0) {
    for (unsigned tile = 0; tile < kStages && tile < tiles; ++tile)
      fill(tile);
  }
  for (unsigned tile = 0; tile < tiles; ++tile) {
    const unsigned stage = tile % kStages;
    barrier_wait(full + stage, tile / kStages % 2);
    sums[threadIdx.x] += buffer[stage * kTile + threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0 && tile + kStages < tiles) fill(tile + kStages);
  }
}

void copy_ring() {
  for (const unsigned tiles : {1u, 2u, 11u}) {
    struct alignas(16) Tile {
      float values[kTile];
    };
    std::vector<Tile> rows(tiles);
    for (unsigned i = 0; i < tiles * kTile; ++i)
      rows[i / kTile].values[i % kTile] = static_cast<float>(i);
    std::vector<float> sums(kTile);
    launch({1, kTile, 1, 128 + kStages * sizeof(Tile)}, ring, rows[0].values, sums.data(), tiles);
    for (unsigned i = 0; i < kTile; ++i) {
      float sum = 0;
      for (const Tile& tile : rows)
        sum += tile.values[i];
      require(sums[i] == sum, "sum over tiles");
    }
  }
}

// A producer warp and consumer warps that know each other by barriers alone.
__global__ void pipeline(const float* rows, float* sums, unsigned tiles) {
  auto* const full = shared_as<std::uint64_t>();
  std::uint64_t* const empty = full + kStages;
  float* const buffer = shared_as<float>(128);
  const unsigned consumers = blockDim.x - 32;
  if (threadIdx.x == 0) {
    for (unsigned stage = 0; stage < kStages; ++stage) {
      barrier_init(full + stage, 1);
      barrier_init(empty + stage, consumers);
    }
    barrier_init_fence();
  }
  __syncthreads();
  for (unsigned tile = 0; tile < tiles; ++tile) {
    const unsigned stage = tile % kStages, parity = tile / kStages % 2;
    if (threadIdx.x == consumers) {
      barrier_wait(empty + stage, parity ^ 1);  // the phase before the first counts as completed
      barrier_expect_bytes(full + stage, kTile * sizeof(float));
      bulk_copy(buffer + stage * kTile, rows + tile * kTile, kTile * sizeof(float) / 2, full + stage);
      bulk_copy(buffer + stage * kTile + kTile / 2, rows + tile * kTile + kTile / 2, kTile * sizeof(float) / 2,
                full + stage);
    } else if (threadIdx.x < consumers) {
      barrier_wait(full + stage, parity);
      sums[threadIdx.x] += buffer[stage * kTile + threadIdx.x];
      barrier_arrive(empty + stage);
    }
  }
}

void copy_pipeline() {
  const unsigned tiles = 8;
  std::vector<uint4> storage(tiles * kTile / 4, uint4{});
  float* const rows = reinterpret_cast<float*>(storage.data());
  std::vector<float> sums(kTile);
  for (unsigned i = 0; i < tiles * kTile; ++i)
    rows[i] = static_cast<float>(i);
  launch({1, kTile + 32, 1, 128 + kStages * kTile * sizeof(float)}, pipeline, rows, sums.data(), tiles);
  for (unsigned i = 0; i < kTile; ++i) {
    require(sums[i] == static_cast<float>(tiles * i + kTile * tiles * (tiles - 1) / 2), "sum over tiles");
  }
}

struct Big {
  int values[100];
};

// Each thread has its own copy of a parameter, and its place in a grid of three dimensions.
__global__ void places(unsigned* counts, const __grid_constant__ Big constant, Big scratch) {
  scratch.values[7] += constant.values[3];
  __syncwarp();
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  atomicAdd(counts + block * threads + thread, static_cast<unsigned>(scratch.values[7]));
  atomicMax(counts + block * threads + thread, 1u);
}

void indices() {
  const dim3 grid(4, 3, 2), block(5, 3, 2);
  std::vector<unsigned> counts(24 * 30);
  Big constant{}, scratch{};
  constant.values[3] = 5;
  scratch.values[7] = 2;
  launch({grid, block, 2}, places, counts.data(), constant, scratch);
  for (const unsigned count : counts)
    require(count == 7, "one visit of each thread");
}

__global__ void numbers(float* results) {
  results[0] = ex2(-INFINITY);
  results[1] = ex2(-126.5f);
  results[2] = ex2(3);
  results[3] = ex2(NAN);
  results[4] = __fdividef(1, 0x1p127f);
  results[5] = ex2(INFINITY);
}

void arithmetic() {
  float results[6];
  launch({1, 1}, numbers, static_cast<float*>(results));
  require(results[0] == 0 && results[1] == 0 && results[2] == 8 && std::isnan(results[3]), "ex2");
  require(results[4] == 0 && std::isinf(results[5]), "__fdividef and ex2");
}

__global__ void count_lane(unsigned* order) {
  const unsigned place = atomicAdd(order + 64, 1u);
  order[place] = threadIdx.x;
}

// The schedules are what they are said to be, and nothing outlives a launch that failed.
void schedules() {
  const std::uint64_t given = emulator::schedule();
  const auto order_under = [](std::uint64_t seed) {
    std::vector<unsigned> order(65);
    emulator::set_schedule(seed);
    launch({1, 64}, count_lane, order.data());
    return order;
  };
  const auto first = order_under(0), last = order_under(~std::uint64_t{0}), random = order_under(5);
  require(first[0] == 0 && first[63] == 63, "in order");
  require(last[0] == 63, "reversed");
  require(random != first && random != last && random != order_under(6), "random orders differ");
  require(random == order_under(5), "one seed, one order");
  emulator::set_schedule(given);
}

}  // namespace

Cases warp_operations_and_formats();
Cases launch_errors();

Cases correct_kernels() {
  Cases cases{{"block_reduce", block_reduce}, {"cluster_exchange", cluster_exchange},
              {"copy_ring", copy_ring},       {"copy_pipeline", copy_pipeline},
              {"indices", indices},           {"arithmetic", arithmetic},
              {"schedules", schedules}};
  cases.merge(warp_operations_and_formats());
  cases.merge(launch_errors());
  return cases;
}

}  // namespace self_test
