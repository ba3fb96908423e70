// The set of threads that can run, as one word of lanes for each warp and a bit for each word that is not empty.
#pragma once

#include <array>
#include <cstdint>

namespace emulator {

class RunQueue {
 public:
  static constexpr unsigned kMaxWarps = 16 * 32;  // of a cluster

  struct Position {
    unsigned warp, lane;
  };

  bool empty() const {
    for (const std::uint64_t group : groups_) {
      if (group) return false;
    }
    return true;
  }

  void add(unsigned warp, std::uint32_t lanes) {
    lanes_[warp] |= lanes;
    if (lanes_[warp]) groups_[warp / 64] |= std::uint64_t{1} << warp % 64;
  }

  void clear() {
    lanes_.fill(0);
    groups_.fill(0);
  }

  // Each of these needs a queue that is not empty.
  Position take_first() {
    unsigned group = 0;
    while (!groups_[group])
      ++group;
    const unsigned warp = group * 64 + lowest(groups_[group]);
    return take(warp, lowest(lanes_[warp]));
  }

  Position take_last() {
    unsigned group = kGroups - 1;
    while (!groups_[group])
      --group;
    const unsigned warp = group * 64 + 63 - static_cast<unsigned>(__builtin_clzll(groups_[group]));
    return take(warp, 31 - static_cast<unsigned>(__builtin_clz(lanes_[warp])));
  }

  // The first thread at or after a random place, round the end: not uniform, but any thread can come before any other.
  Position take_random(std::uint64_t random, unsigned warps) {
    const unsigned start = static_cast<unsigned>(random >> 32) % warps;
    unsigned group = start / 64;
    std::uint64_t candidates = groups_[group] & ~std::uint64_t{0} << start % 64;
    while (!candidates) {
      group = (group + 1) % kGroups;
      candidates = groups_[group];
    }
    const unsigned warp = group * 64 + lowest(candidates);
    const std::uint32_t from = lanes_[warp] & ~std::uint32_t{0} << (random & 31);
    return take(warp, lowest(from ? from : lanes_[warp]));
  }

 private:
  static constexpr unsigned kGroups = kMaxWarps / 64;

  static unsigned lowest(std::uint64_t bits) { return static_cast<unsigned>(__builtin_ctzll(bits)); }

  Position take(unsigned warp, unsigned lane) {
    lanes_[warp] &= ~(std::uint32_t{1} << lane);
    if (!lanes_[warp]) groups_[warp / 64] &= ~(std::uint64_t{1} << warp % 64);
    return {warp, lane};
  }

  std::array<std::uint32_t, kMaxWarps> lanes_{};
  std::array<std::uint64_t, kGroups> groups_{};
};

}  // namespace emulator
