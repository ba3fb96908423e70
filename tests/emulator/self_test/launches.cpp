// What the runtime refuses to launch, what it says of the device, and how fast it runs.
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "cases.h"

extern "C" void eakd_emulator_device(int capability, int multiprocessors);
extern "C" std::uint64_t eakd_emulator_launches();

namespace self_test {
namespace {

using namespace eakd::ptx;

__global__ void nothing() {}
__global__ void fail_once() {
  if (threadIdx.x != 3) __syncthreads();
}

void refusals() {
  const auto refused = [](const Shape& shape, cudaError_t expected) {
    const std::uint64_t before = eakd_emulator_launches();
    require(try_launch(shape, nothing) == expected, std::string("refused with ") + cudaGetErrorName(expected));
    require(cudaPeekAtLastError() == expected && cudaGetLastError() == expected, "the last error");
    require(cudaGetLastError() == cudaSuccess, "no error any more");
    require(eakd_emulator_launches() == before, "no launch");
  };
  refused({1, 1025}, cudaErrorInvalidConfiguration);
  refused({1, dim3(64, 64)}, cudaErrorInvalidConfiguration);
  refused({1, 0}, cudaErrorInvalidConfiguration);
  refused({0, 32}, cudaErrorInvalidConfiguration);
  refused({3, 32, 2}, cudaErrorInvalidConfiguration);
  refused({16, 32, 16}, cudaErrorInvalidConfiguration);
  refused({1, 32, 1, (48 << 10) + 1}, cudaErrorInvalidValue);

  const auto attribute = [](cudaFuncAttribute which, int value) { return cudaFuncSetAttribute(nothing, which, value); };
  require(attribute(cudaFuncAttributeMaxDynamicSharedMemorySize, 232449) == cudaErrorInvalidValue, "above the opt-in");
  require(attribute(cudaFuncAttributeMaxDynamicSharedMemorySize, 232448) == cudaSuccess, "the opt-in");
  require(attribute(cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess, "large clusters");
  launch({1, 32, 1, 232448}, nothing);
  launch({16, 32, 16}, nothing);
  cudaGetLastError();
  refused({32, 32, 32}, cudaErrorInvalidConfiguration);
}

void devices() {
  const auto tells = [](cudaDeviceAttr attribute) {
    int device = -1, value = -1;
    require(cudaGetDevice(&device) == cudaSuccess, "a device");
    require(cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess, "an attribute");
    return value;
  };
  require(tells(cudaDevAttrComputeCapabilityMajor) == 9 && tells(cudaDevAttrMultiProcessorCount) == 2, "the default");
  const Shape shape{4, 512, 4, 40000};
  cudaLaunchAttribute cluster{cudaLaunchAttributeClusterDimension, {{4, 1, 1}}};
  const cudaLaunchConfig_t config{4, 512, 40000, nullptr, &cluster, 1};
  int number = 0;
  emulator::device().multiprocessors = 132;
  require(cudaOccupancyMaxActiveClusters(&number, nothing, &config) == cudaSuccess && number == 132, "clusters");
  require(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&number, nothing, 512, 48000) == cudaSuccess, "blocks");
  require(number == 4, "blocks of a multiprocessor");

  eakd_emulator_device(80, 3);
  require(tells(cudaDevAttrComputeCapabilityMajor) == 8 && tells(cudaDevAttrMultiProcessorCount) == 3, "set");
  require(tells(cudaDevAttrMaxSharedMemoryPerBlockOptin) == 166912, "less shared memory");
  require(try_launch(shape, nothing) == cudaErrorInvalidConfiguration, "no clusters");
  require(cudaOccupancyMaxActiveClusters(&number, nothing, &config) != cudaSuccess && number == 0, "no clusters");
}

// A launch that fails leaves fibers suspended anywhere: they must serve the next one.
void recovery() {
  for (int i = 0; i < 3; ++i) {
    bool failed = false;
    try {
      launch({2, 100, 2}, fail_once);
    } catch (const emulator::Error&) { failed = true; }
    require(failed, "the fault");
    launch({6, 100, 3}, nothing);
  }
}

// Fibers are shared by the OS threads that launch, which take turns.
__global__ void add_up(unsigned* sum) {
  __syncthreads();
  atomicAdd(sum, threadIdx.x);
}

void os_threads() {
  constexpr int kLaunches = 50;
  std::vector<unsigned> sums(2);
  const auto launch_often = [](unsigned* sum) {
    for (int i = 0; i < kLaunches; ++i)
      launch({1, 64}, add_up, sum);
  };
  std::thread other(launch_often, &sums[0]);
  launch_often(&sums[1]);
  other.join();
  require(sums[0] == kLaunches * 63 * 32 && sums[1] == sums[0], "sums of two OS threads");
}

__global__ void shuffle_often(int rounds, float* result) {
  float value = static_cast<float>(threadIdx.x);
  for (int i = 0; i < rounds; ++i)
    value = __shfl_xor_sync(~0u, value, 1);
  result[threadIdx.x] = value;
}
__global__ void meet_often(int rounds) {
  for (int i = 0; i < rounds; ++i)
    __syncthreads();
}
__global__ void meet_cluster_often(int rounds) {
  for (int i = 0; i < rounds; ++i)
    cluster_sync();
}

template <class Launch>
void measure(const char* what, double times, Launch launch) {
  launch();  // creates the fibers
  const auto start = std::chrono::steady_clock::now();
  launch();
  const std::chrono::duration<double, std::nano> elapsed = std::chrono::steady_clock::now() - start;
  std::printf("%s: %.1f ns\n", what, elapsed.count() / times);
}

void speed() {
  constexpr int kRounds = 1000;
  std::vector<float> values(1024);
  measure("shuffle, a thread of 256", 256.0 * kRounds,
          [&] { launch({1, 256}, shuffle_often, kRounds, values.data()); });
  measure("shuffle, a thread of 4 x 1024", 4096.0 * kRounds,
          [&] { launch({4, 1024, 4}, shuffle_often, kRounds, values.data()); });
  measure("__syncthreads, a thread of 256", 256.0 * kRounds, [] { launch({1, 256}, meet_often, kRounds); });
  measure("cluster barrier, a thread of 4 x 1024", 4096.0 * 100, [] { launch({4, 1024, 4}, meet_cluster_often, 100); });
  measure("a launch of 256 threads", 1000, [] {
    for (int i = 0; i < 1000; ++i)
      launch({1, 256}, nothing);
  });
}

}  // namespace

Cases launch_errors() {
  return {{"refusals", refusals}, {"devices", devices}, {"recovery", recovery}, {"os_threads", os_threads}};
}

Cases measurements() { return {{"speed", speed}}; }

}  // namespace self_test
