// Barriers in shared memory, and the bulk copies that complete on them.
#include <cstring>

#include "machine.h"

namespace emulator {
namespace {

constexpr std::uint64_t kHandle = 0x6d62617272000000;  // "mbarr", then its number
constexpr std::uint64_t kMaxCount = (1u << 20) - 1;    // of arrivals and of bytes, in one phase

bool overlap(const unsigned char* a, std::size_t a_bytes, const unsigned char* b, std::size_t b_bytes) {
  return a < b + b_bytes && b < a + a_bytes;
}

void check_address(const std::uint64_t* barrier) {
  if (reinterpret_cast<std::uintptr_t>(barrier) % 8) fail("a barrier at an address that is no multiple of 8");
  if (!self().cta->shared.contains(barrier, 8)) fail("a barrier outside of the block's dynamic shared memory");
}

// Reads the handle as the kernel's own access: TSan reports a barrier that is used without waiting for its set-up.
CopyBarrier& find(const std::uint64_t* address) {
  check_address(address);
  const std::uint64_t number = *address - kHandle;
  std::deque<CopyBarrier>& barriers = self().cta->barriers;
  if (number >= barriers.size() || barriers[number].address != address) {
    fail("a barrier that is not initialised, or was overwritten");
  }
  return barriers[number];
}

void deliver(Copy& copy) {
  if (copy.delivered) return;
  std::memcpy(copy.destination, copy.source, copy.bytes);
  copy.delivered = true;
}

// Ends the phase if all has come. Copies that have yet to be delivered end none before some thread waits.
void try_complete(CopyBarrier& barrier) {
  if (barrier.pending || barrier.expected != barrier.issued) return;
  bool delivered = true, awaited = false;
  for (const Copy& copy : barrier.copies)
    delivered &= copy.delivered;
  for (const std::uint32_t lanes : barrier.waiting)
    awaited |= lanes != 0;
  if (!delivered && !awaited) return;

  for (Copy& copy : barrier.copies) {
    asan_unpoison(copy.destination, copy.bytes);
    deliver(copy);
  }
  barrier.copies.clear();
  barrier.pending = barrier.count;
  barrier.expected = barrier.issued = 0;
  ++barrier.phase;
  const Cta& cta = *self().cta;
  for (unsigned w = 0; w < cta.warps; ++w) {
    machine().runnable.add(cta.first_warp + w, std::exchange(barrier.waiting[w], 0));
  }
}

void arrive(CopyBarrier& barrier) {
  if (!barrier.pending) {
    fail("more arrivals at a barrier than its count of " + std::to_string(barrier.count) +
         ": nothing has waited for "
         "the copies of its phase");
  }
  tsan_release(&barrier.sync[barrier.phase & 1]);
  --barrier.pending;
  try_complete(barrier);
}

void check_copy(const CopyBarrier& barrier, const unsigned char* destination, const void* source, unsigned bytes) {
  const Cta& cta = *self().cta;
  const auto misaligned = [](const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 != 0; };
  if (misaligned(destination)) fail("bulk_copy to an address that is no multiple of 16");
  if (misaligned(source)) fail("bulk_copy from an address that is no multiple of 16");
  if (bytes == 0 || bytes % 16) fail("bulk_copy of " + std::to_string(bytes) + " bytes, no positive multiple of 16");
  if (!cta.shared.contains(destination, bytes)) fail("bulk_copy to outside of the block's dynamic shared memory");
  if (!barrier.fenced) fail("bulk_copy on a barrier whose initialising thread ran no barrier_init_fence");
  if (barrier.issued + bytes > kMaxCount) fail("bulk_copy of more than 2^20 - 1 bytes in one phase of a barrier");
  for (const CopyBarrier& other : cta.barriers) {
    if (overlap(destination, bytes, reinterpret_cast<const unsigned char*>(other.address), 8)) {
      fail("bulk_copy onto a barrier");
    }
    for (const Copy& copy : other.copies) {
      if (overlap(destination, bytes, copy.destination, copy.bytes)) {
        fail("bulk_copy to where another copy is still on its way");
      }
    }
  }
}

}  // namespace

void barrier_init(std::uint64_t* address, unsigned count) {
  check_address(address);
  if (count == 0 || count > kMaxCount) fail("barrier_init with a count outside of 1 ... 2^20 - 1");
  std::deque<CopyBarrier>& barriers = self().cta->barriers;
  *address = kHandle + barriers.size();
  TsanIgnore ignore;
  for (const CopyBarrier& other : barriers) {
    if (overlap(reinterpret_cast<unsigned char*>(address), 8, reinterpret_cast<unsigned char*>(other.address), 8)) {
      fail("barrier_init of a barrier that is already initialised");
    }
  }
  CopyBarrier& barrier = barriers.emplace_back();
  barrier.address = address;
  barrier.initialised_by = &self();
  barrier.count = barrier.pending = count;
}

void barrier_init_fence() {
  TsanIgnore ignore;
  for (CopyBarrier& barrier : self().cta->barriers)
    barrier.fenced |= barrier.initialised_by == &self();
}

void barrier_expect_bytes(std::uint64_t* address, unsigned bytes) {
  CopyBarrier& barrier = find(address);
  TsanIgnore ignore;
  require_capability(9, "a barrier that counts bytes");
  if (barrier.expected + bytes > kMaxCount) fail("a barrier that expects more than 2^20 - 1 bytes in one phase");
  barrier.expected += bytes;
  arrive(barrier);
}

void barrier_arrive(std::uint64_t* address) {
  CopyBarrier& barrier = find(address);
  TsanIgnore ignore;
  arrive(barrier);
  preemption_point();
}

void barrier_wait(std::uint64_t* address, unsigned parity) {
  CopyBarrier& barrier = find(address);
  TsanIgnore ignore;
  if (parity > 1) fail("barrier_wait for a parity that is neither 0 nor 1");
  Thread& thread = self();
  if ((barrier.phase & 1) == parity) {
    barrier.waiting[thread.warp->index - thread.cta->first_warp] |= thread.lane_bit();
    thread.copy_barrier = &barrier;
    try_complete(barrier);  // which may well make this very thread runnable
    suspend(Wait::copy_barrier);
  } else if (machine().adversarial()) {
    yield();
  }
  tsan_acquire(&barrier.sync[parity]);
}

void bulk_copy(void* shared, const void* global, unsigned bytes, std::uint64_t* address) {
  CopyBarrier& barrier = find(address);
  require_capability(9, "bulk_copy");
  auto* const destination = static_cast<unsigned char*>(shared);
  check_copy(barrier, destination, global, bytes);
  // On behalf of the kernel, for sanitizers: from here on the target is written, and the source read, at any time.
  asan_check(global, bytes);
  tsan_read(global, bytes);
  std::memset(destination, kPoison, bytes);

  TsanIgnore ignore;
  Machine& m = machine();
  tsan_release(&barrier.sync[barrier.phase & 1]);
  Copy copy{destination, global, bytes, false};
  if (m.randomised() && m.random() >> 63) deliver(copy);
  asan_poison(destination, bytes);
  barrier.copies.push_back(copy);
  barrier.issued += bytes;
  try_complete(barrier);
  preemption_point();
}

}  // namespace emulator
