// Where threads meet: __syncthreads, warp operations and the cluster's barrier.
#include <algorithm>

#include "machine.h"

namespace emulator {

void sync_block() {
  TsanIgnore ignore;
  Machine& m = machine();
  Cta& cta = *self().cta;
  // By the parity of the phase: a thread that is late to acquire must not get what others release for the next one.
  char* const sync = &cta.sync[cta.phase & 1];
  tsan_release(sync);
  if (++cta.arrived < m.threads_per_cta) {
    suspend(Wait::block_barrier);
  } else {
    cta.arrived = 0;
    ++cta.phase;
    const Thread& thread = self();
    for (unsigned w = 0; w < cta.warps; ++w) {
      const Warp& warp = m.warp_of(cta, w);
      m.runnable.add(warp.index, &warp == thread.warp ? warp.present & ~thread.lane_bit() : warp.present);
    }
    if (m.adversarial()) yield();
  }
  tsan_acquire(sync);
}

void cluster_arrive() {
  TsanIgnore ignore;
  require_capability(9, "the barrier of a cluster");
  Machine& m = machine();
  Thread& thread = self();
  if (thread.arrived_at_cluster) fail("cluster_arrive twice without a cluster_wait in between");
  thread.arrived_at_cluster = true;
  ++thread.cluster_arrivals;
  thread.cluster_phase = m.cluster_phase;
  tsan_release(&m.cluster_sync[m.cluster_phase & 1]);
  if (++m.cluster_arrived < m.threads_per_cta * m.ctas_per_cluster) return;
  m.cluster_arrived = 0;
  ++m.cluster_phase;
  for (unsigned w = 0; w < m.warps; ++w)
    m.runnable.add(w, std::exchange(m.warp_pool[w].at_cluster, 0));
}

void cluster_wait() {
  TsanIgnore ignore;
  Machine& m = machine();
  Thread& thread = self();
  if (!thread.arrived_at_cluster) fail("cluster_wait without a cluster_arrive before it");
  if (m.cluster_phase == thread.cluster_phase) {
    thread.warp->at_cluster |= thread.lane_bit();
    suspend(Wait::cluster_barrier);
  } else if (m.adversarial()) {
    yield();
  }
  thread.arrived_at_cluster = false;
  thread.cta->cluster_waits = std::max(thread.cta->cluster_waits, thread.cluster_arrivals);
  tsan_acquire(&m.cluster_sync[thread.cluster_phase & 1]);
}

namespace {

void check_lanes(const Thread& thread, std::uint32_t lanes) {
  const Warp& warp = *thread.warp;
  if (!(lanes & thread.lane_bit())) fail("a lane that is not in the mask of its own warp operation");
  if (lanes & ~warp.present) fail("the mask of a warp operation names lanes that the block does not have");
  if (lanes & warp.returned) {
    const Thread& returned = warp.threads[static_cast<unsigned>(__builtin_ctz(lanes & warp.returned))];
    fail("the mask of a warp operation names a lane that has returned, " + name(returned));
  }
}

void shuffle_values(Warp& warp, std::uint32_t lanes) {
  std::array<std::uint64_t, kWarpSize> given;
  for (unsigned lane = 0; lane < kWarpSize; ++lane)
    given[lane] = warp.threads[lane].request.bits;
  for (std::uint32_t left = lanes; left; left &= left - 1) {
    Thread& thread = warp.threads[static_cast<unsigned>(__builtin_ctz(left))];
    const unsigned source = thread.request.source;
    if (!(lanes >> source & 1)) {
      fail_at(thread, "a shuffle reads lane " + std::to_string(source) + ", which is not in its mask");
    }
    thread.request.bits = given[source];
  }
}

void reduce_values(Warp& warp, std::uint32_t lanes, WarpOperation operation) {
  std::uint64_t votes = 0;
  int largest = INT32_MIN;
  for (std::uint32_t left = lanes; left; left &= left - 1) {
    const auto lane = static_cast<unsigned>(__builtin_ctz(left));
    const std::uint64_t bits = warp.threads[lane].request.bits;
    votes |= static_cast<std::uint64_t>(bits != 0) << lane;
    largest = std::max(largest, static_cast<int>(static_cast<unsigned>(bits)));
  }
  const std::uint64_t result = operation == WarpOperation::reduce_max ? static_cast<unsigned>(largest) : votes;
  for (std::uint32_t left = lanes; left; left &= left - 1) {
    warp.threads[static_cast<unsigned>(__builtin_ctz(left))].request.bits = result;
  }
}

// The last lane to come does the work of all, so that none can be overtaken before it has read the others' values.
void complete(Thread& last, std::uint32_t lanes) {
  Warp& warp = *last.warp;
  const WarpRequest& request = last.request;
  for (std::uint32_t left = lanes; left; left &= left - 1) {
    const Thread& other = warp.threads[static_cast<unsigned>(__builtin_ctz(left))];
    if (other.request.operation != request.operation || other.request.mask != request.mask) {
      fail("a warp operation whose other lanes are in another operation, or have another mask, as has " + name(other));
    }
  }
  switch (request.operation) {
    case WarpOperation::sync: break;
    case WarpOperation::shuffle:
    case WarpOperation::shuffle_up:
    case WarpOperation::shuffle_down:
    case WarpOperation::shuffle_xor: shuffle_values(warp, lanes); break;
    default: reduce_values(warp, lanes, request.operation);
  }
}

}  // namespace

unsigned lanes_of(unsigned mask) { return mask == ~0u ? self().warp->present : mask; }

std::uint64_t meet_warp(WarpOperation operation, unsigned mask, std::uint64_t bits, unsigned source) {
  TsanIgnore ignore;
  Machine& m = machine();
  Thread& thread = self();
  Warp& warp = *thread.warp;
  const std::uint32_t lanes = lanes_of(mask);
  check_lanes(thread, lanes);
  thread.request = {operation, mask, source, bits};

  // Clocks belong to the lowest lane of the mask: masks that are in use at the same time have no lane in common.
  const auto lowest = static_cast<unsigned>(__builtin_ctz(lanes));
  char* const sync = &warp.sync[lowest][warp.turn[lowest] & 1];
  const bool orders_memory = operation == WarpOperation::sync;
  if (orders_memory) tsan_release(sync);

  warp.meeting |= thread.lane_bit();
  if ((warp.meeting & lanes) != lanes) {
    suspend(Wait::warp_operation);
  } else {
    complete(thread, lanes);
    warp.meeting &= ~lanes;
    ++warp.turn[lowest];
    m.runnable.add(warp.index, lanes & ~thread.lane_bit());
    if (m.adversarial()) yield();
  }
  if (orders_memory) tsan_acquire(sync);
  return thread.request.bits;
}

}  // namespace emulator
