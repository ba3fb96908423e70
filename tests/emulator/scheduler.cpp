// Runs a grid cluster by cluster, each thread of a cluster as a fiber.
#include <algorithm>
#include <atomic>
#include <mutex>
#include <numeric>
#include <random>
#include <utility>

#include <cuda_runtime.h>

#include "machine.h"

dim3 blockDim, gridDim;

namespace emulator {

ThreadContext* current_thread = nullptr;
LaunchShape launch_shape;

namespace {

std::atomic<std::uint64_t> next_schedule{0};
std::atomic<std::uint64_t> launches{0};

// Unwinds a thread whose launch has failed, so that its fiber can serve the next one.
struct Cancelled {};

Thread& take_next() {
  Machine& m = machine();
  const RunQueue::Position next = m.schedule == 0  ? m.runnable.take_first()
                                  : m.randomised() ? m.runnable.take_random(m.random(), m.warps)
                                                   : m.runnable.take_last();
  return m.warp_pool[next.warp].threads[next.lane];
}

void run(Fiber& from, Thread& thread) {
  current_thread = &thread;
  if (&from != &thread.fiber) Fiber::switch_to(from, thread.fiber);
}

// To the scheduler when no thread can run, which knows whether that is the end or a deadlock.
void run_another(Fiber& from) {
  Machine& m = machine();
  if (m.cancelled || m.runnable.empty()) {
    Fiber::switch_to(from, m.scheduler);
  } else {
    run(from, take_next());
  }
}

void run_body(Thread& thread) {
  Machine& m = machine();
  thread.started = true;
  tsan_acquire(&m.start_sync);
  try {
    m.body.run(m.body.call);
    TsanIgnore ignore;
    thread.warp->returned |= thread.lane_bit();
    if (--thread.cta->live == 0) finish_cta(*thread.cta);
  } catch (const Cancelled&) {
  } catch (...) {
    TsanIgnore ignore;
    if (!m.error) m.error = std::current_exception();
  }
  tsan_release(&m.end_sync);
}

void fiber_entry() {
  Fiber::entered();
  for (;;) {
    Thread& thread = self();
    run_body(thread);
    // Switches only here, never inside of a handler: the C++ runtime keeps caught exceptions by OS thread.
    TsanIgnore ignore;
    Machine& m = machine();
    thread.returned = true;
    --m.live;
    m.cancelled |= m.error != nullptr;
    run_another(thread.fiber);
  }
}

void reset_thread(Thread& thread, Warp& warp, Cta& cta, unsigned index) {
  const dim3& block = launch_shape.block;
  if (!thread.fiber.created()) thread.fiber.create(fiber_entry);
  thread.thread_index = {index % block.x, index / block.x % block.y, index / block.x / block.y};
  thread.block_index = cta.index;
  thread.lane = index % kWarpSize;
  thread.cluster_rank = cta.rank;
  thread.shared = cta.shared.base();
  thread.warp = &warp;
  thread.cta = &cta;
  thread.waits_for = Wait::nothing;
  thread.started = thread.returned = thread.arrived_at_cluster = false;
  thread.cluster_arrivals = 0;
  thread.copy_barrier = nullptr;
}

uint3 block_index(unsigned cluster, unsigned rank) {
  const dim3 &grid = launch_shape.grid, &shape = launch_shape.cluster;
  const unsigned columns = grid.x / shape.x, rows = grid.y / shape.y;
  return {cluster % columns * shape.x + rank % shape.x, cluster / columns % rows * shape.y + rank / shape.x % shape.y,
          cluster / columns / rows * shape.z + rank / shape.x / shape.y};
}

void reset_cta(unsigned cluster, unsigned rank) {
  Machine& m = machine();
  Cta& cta = m.cta_pool[rank];
  cta.rank = rank;
  cta.index = block_index(cluster, rank);
  cta.warps = m.warps / m.ctas_per_cluster;
  cta.first_warp = rank * cta.warps;
  cta.live = m.threads_per_cta;
  cta.arrived = cta.cluster_waits = cta.cluster_waits_needed = 0;
  cta.barriers.clear();
  cta.shared.prepare(launch_shape.shared_bytes);
  for (unsigned w = 0; w < cta.warps; ++w) {
    Warp& warp = m.warp_of(cta, w);
    const unsigned lanes = std::min(kWarpSize, m.threads_per_cta - w * kWarpSize);
    warp.index = cta.first_warp + w;
    warp.present = ~std::uint32_t{0} >> (kWarpSize - lanes);
    warp.returned = warp.meeting = warp.at_cluster = 0;
    for (unsigned lane = 0; lane < lanes; ++lane)
      reset_thread(warp.threads[lane], warp, cta, w * kWarpSize + lane);
    m.runnable.add(warp.index, warp.present);
  }
}

// Blocked threads are resumed once more to be unwound; those that never ran have nothing to unwind.
void cancel_threads() {
  Machine& m = machine();
  m.cancelled = true;
  for (unsigned w = 0; w < m.warps; ++w) {
    Warp& warp = m.warp_pool[w];
    for (unsigned lane = 0; lane < kWarpSize && warp.present >> lane & 1; ++lane) {
      Thread& thread = warp.threads[lane];
      if (thread.started && !thread.returned) run(m.scheduler, thread);
    }
  }
}

void run_cluster(unsigned cluster) {
  Machine& m = machine();
  m.live = m.threads_per_cta * m.ctas_per_cluster;
  m.cluster_arrived = 0;
  m.cancelled = false;
  m.runnable.clear();
  for (unsigned rank = 0; rank < m.ctas_per_cluster; ++rank)
    reset_cta(cluster, rank);

  tsan_release(&m.start_sync);
  run(m.scheduler, take_next());
  if (!m.error && m.live) m.error = std::make_exception_ptr(Error(describe_deadlock()));
  if (m.error) cancel_threads();
  tsan_acquire(&m.end_sync);
  current_thread = nullptr;
  if (!m.error) finish_cluster();
}

std::vector<unsigned> cluster_order(unsigned clusters) {
  std::vector<unsigned> order(clusters);
  std::iota(order.begin(), order.end(), 0);
  if (machine().randomised()) {
    std::shuffle(order.begin(), order.end(), std::mt19937_64(machine().schedule));
  } else if (machine().adversarial()) {
    std::reverse(order.begin(), order.end());
  }
  return order;
}

}  // namespace

Machine& machine() {
  static Machine* const instance = new Machine;  // never destroyed: fibers stay suspended in it
  return *instance;
}

std::uint64_t Machine::random() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545f4914f6cdd1d;
}

void set_schedule(std::uint64_t seed) { next_schedule = seed; }
std::uint64_t schedule() { return next_schedule; }

void suspend(Wait reason) {
  Thread& thread = self();
  thread.waits_for = reason;
  run_another(thread.fiber);
  thread.waits_for = Wait::nothing;
  if (machine().cancelled) throw Cancelled();
}

void yield() {
  Machine& m = machine();
  if (m.runnable.empty()) return;
  Thread& thread = self();
  Thread& next = take_next();  // before this one is back in the queue, so that it is another
  m.runnable.add(thread.warp->index, thread.lane_bit());
  run(thread.fiber, next);
  if (m.cancelled) throw Cancelled();
}

void preemption_point() {
  TsanIgnore ignore;
  Machine& m = machine();
  if (m.adversarial() && (!m.randomised() || m.random() >> 63)) yield();
}

void run_grid(const LaunchShape& shape, Body body) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  TsanIgnore ignore;
  ++launches;
  Machine& m = machine();
  launch_shape = shape;
  blockDim = shape.block;
  gridDim = shape.grid;
  const dim3 &grid = launch_shape.grid, &block = launch_shape.block, &cluster = launch_shape.cluster;
  m.body = body;
  m.error = nullptr;
  m.schedule = next_schedule;
  m.random_state = m.schedule * 0x9e3779b97f4a7c15;  // an odd factor: only schedule 0, which draws none, gives 0
  m.ctas_per_cluster = cluster.x * cluster.y * cluster.z;
  m.threads_per_cta = block.x * block.y * block.z;
  m.warps = m.ctas_per_cluster * ((m.threads_per_cta + kWarpSize - 1) / kWarpSize);
  if (m.warp_pool.size() < m.warps) m.warp_pool.resize(m.warps);
  if (m.cta_pool.size() < m.ctas_per_cluster) m.cta_pool.resize(m.ctas_per_cluster);
  m.scheduler.adopt_os_thread();

  for (const unsigned index : cluster_order(grid.x * grid.y * grid.z / m.ctas_per_cluster)) {
    run_cluster(index);
    if (m.error) std::rethrow_exception(std::exchange(m.error, nullptr));
  }
}

}  // namespace emulator

extern "C" {
void eakd_emulator_schedule(std::uint64_t seed) { emulator::set_schedule(seed); }
std::uint64_t eakd_emulator_launches() { return emulator::launches; }
}
