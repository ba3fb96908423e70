// The messages of faults.
#include <map>

#include "machine.h"

namespace emulator {
namespace {

std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string hex(std::uint32_t mask) {
  static const char digits[] = "0123456789abcdef";
  std::string result = "0x";
  for (int shift = 28; shift >= 0; shift -= 4)
    result += digits[mask >> shift & 15];
  return result;
}

const char* name(WarpOperation operation) {
  switch (operation) {
    case WarpOperation::sync: return "__syncwarp";
    case WarpOperation::shuffle: return "__shfl_sync";
    case WarpOperation::shuffle_up: return "__shfl_up_sync";
    case WarpOperation::shuffle_down: return "__shfl_down_sync";
    case WarpOperation::shuffle_xor: return "__shfl_xor_sync";
    case WarpOperation::ballot: return "__ballot_sync";
    case WarpOperation::any: return "__any_sync";
    case WarpOperation::all: return "__all_sync";
    case WarpOperation::reduce_max: return "__reduce_max_sync";
  }
  return "a warp operation";
}

std::string describe(const CopyBarrier& barrier, const Cta& cta) {
  const auto offset = reinterpret_cast<unsigned char*>(barrier.address) - cta.shared.base();
  return "barrier_wait (the barrier at byte " + std::to_string(offset) + " of shared memory, phase " +
         std::to_string(barrier.phase) + ", lacks " + std::to_string(barrier.pending) + " of " +
         std::to_string(barrier.count) + " arrivals, expects " + std::to_string(barrier.expected) +
         " bytes, was given copies of " + std::to_string(barrier.issued) + ")";
}

// What a thread does, in words that are the same for all threads that do the same.
std::string describe(const Thread& thread) {
  if (thread.returned) return "returned";
  switch (thread.waits_for) {
    case Wait::block_barrier: return "waits at __syncthreads";
    case Wait::cluster_barrier: return "waits at cluster_wait";
    case Wait::copy_barrier: return "waits at " + describe(*thread.copy_barrier, *thread.cta);
    case Wait::warp_operation:
      return std::string("waits at ") + name(thread.request.operation) + " with mask " + hex(thread.request.mask);
    case Wait::nothing: break;
  }
  return "runs";
}

struct Group {
  const Thread* first;
  unsigned count = 0;
};

}  // namespace

std::string name(const Thread& thread) {
  return "thread " + text(thread.thread_index) + " of block " + text(thread.block_index);
}

void fail_at(const Thread& thread, const std::string& message) {
  throw Error("CUDA emulator: " + message + " [" + name(thread) + "]");
}

void fail(const std::string& message) { fail_at(self(), message); }

void require_capability(int major, const char* what) {
  if (device().capability_major < major) {
    fail(std::string(what) + " needs compute capability " + std::to_string(major) + ".0");
  }
}

std::string describe_deadlock() {
  Machine& m = machine();
  std::string message = "CUDA emulator: deadlock, some threads wait for what others never come to:";
  for (unsigned rank = 0; rank < m.ctas_per_cluster; ++rank) {
    const Cta& cta = m.cta_pool[rank];
    std::map<std::string, Group> groups;
    for (unsigned index = 0; index < m.threads_per_cta; ++index) {
      const Thread& thread = m.warp_of(cta, index / kWarpSize).threads[index % kWarpSize];
      Group& group = groups.try_emplace(describe(thread), Group{&thread}).first->second;
      ++group.count;
    }
    for (const auto& [what, group] : groups) {
      message += "\n  " + name(*group.first) + " " + what;
      if (group.count > 1) message += ", and so for " + std::to_string(group.count - 1) + " more of the block";
    }
  }
  return message;
}

}  // namespace emulator
