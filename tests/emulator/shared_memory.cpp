// Dynamic shared memory, how CTAs reach each other's, and what a CTA leaves behind.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "machine.h"

namespace emulator {
namespace {

constexpr unsigned char kRedZoneByte = 0xa5;

}  // namespace

void SharedMemory::Free::operator()(unsigned char* storage) const { std::free(storage); }

void SharedMemory::prepare(std::size_t bytes) {
  const std::size_t needed = (bytes + 2 * kRedZone + 255) / 256 * 256;
  if (needed > capacity_) {
    storage_.reset(static_cast<unsigned char*>(std::aligned_alloc(256, needed)));
    if (!storage_) throw std::bad_alloc();
    capacity_ = needed;
  }
  bytes_ = bytes;
  asan_unpoison(storage_.get(), capacity_);
  std::memset(storage_.get(), kRedZoneByte, kRedZone);
  std::memset(base(), kPoison, bytes);
  std::memset(base() + bytes, kRedZoneByte, kRedZone);
  asan_poison(storage_.get(), kRedZone);
  asan_poison(base() + bytes, capacity_ - kRedZone - bytes);
}

void SharedMemory::poison() {
  asan_unpoison(base(), bytes_);  // of copies still on their way
  std::memset(base(), kPoison, bytes_);
}

bool SharedMemory::red_zones_intact() const {
#ifdef EAKD_EMULATOR_ASAN
  return true;  // poisoned: nothing got there unreported, and neither may this
#else
  const auto intact = [](const unsigned char* zone) {
    return std::all_of(zone, zone + kRedZone, [](unsigned char byte) { return byte == kRedZoneByte; });
  };
  return intact(storage_.get()) && intact(base() + bytes_);
#endif
}

bool SharedMemory::contains(const void* address, std::size_t bytes) const {
  const std::size_t offset = reinterpret_cast<std::uintptr_t>(address) - reinterpret_cast<std::uintptr_t>(base());
  return offset <= bytes_ && bytes <= bytes_ - offset;  // below the base, the offset wraps round
}

const void* remote_address(const void* shared, unsigned rank, std::size_t bytes) {
  TsanIgnore ignore;
  const Thread& thread = self();
  const Cta& own = *thread.cta;
  require_capability(9, "shared memory of another block");
  if (!own.shared.contains(shared, bytes)) fail("a remote access to an address outside of dynamic shared memory");
  Machine& m = machine();
  if (rank >= m.ctas_per_cluster) fail("a remote access to CTA " + std::to_string(rank) + ", which there is not");
  Cta& target = m.cta_pool[rank];
  if (&target == &own) return shared;
  // A CTA of the cluster may start after this one, even where the schedule has started it before.
  if (thread.cluster_arrivals == unsigned{thread.arrived_at_cluster}) {
    fail("a remote access by a thread that has not waited for its cluster before");
  }
  if (target.live == 0) fail("a remote access: CTA " + std::to_string(rank) + " of the cluster has exited");
  target.cluster_waits_needed = std::max(target.cluster_waits_needed, thread.cluster_arrivals + 1);
  return target.shared.base() + (static_cast<const unsigned char*>(shared) - own.shared.base());
}

void finish_cta(Cta& cta) {
  for (const CopyBarrier& barrier : cta.barriers) {
    if (!barrier.copies.empty()) fail("a block exits while a bulk_copy that nothing has waited for is on its way");
  }
  if (!cta.shared.red_zones_intact()) fail("the block wrote just outside of its dynamic shared memory");
  cta.shared.poison();
}

// A CTA that did not exit too early under this schedule may do so under another.
void finish_cluster() {
  const Machine& m = machine();
  for (unsigned rank = 0; rank < m.ctas_per_cluster; ++rank) {
    const Cta& cta = m.cta_pool[rank];
    if (cta.cluster_waits < cta.cluster_waits_needed) {
      throw Error("CUDA emulator: CTA " + std::to_string(rank) +
                  " of a cluster may exit before a remote access to its "
                  "shared memory: it waits at no cluster barrier after that");
    }
  }
}

}  // namespace emulator
