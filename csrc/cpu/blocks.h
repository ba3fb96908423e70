// Rows go through the kernels in blocks of the arithmetic type: fp32, or fp64 where a side is fp64. A block fits the
// first-level cache beside its twin, and is padded with -inf to whole vectors.
#pragma once

#include "row_kernels.h"
#include "simd.h"

namespace eakd {
namespace {

// No lane adds more terms than this before they go on in double, and both rows' blocks fit the first-level cache.
constexpr int64_t kBlock = kTermsPerLane * kLanes;
static_assert(kBlock >= kSmallestBlock && kSegment % kBlock == 0, "blocks divide segments");

// With room for the padding behind a last partial vector.
template <typename T>
struct Block {
  alignas(64) T values[kBlock + kLanes];
};

// ---- loops over columns ----------------------------------------------------------------------------------------

// How many vectors a loop takes at a time, stage by stage, as far as registers go. One after the other, an
// exponential's chain of operations is longer than what a core's scheduler sees of the loop, and units have nothing to
// do.
template <typename T>
constexpr int kStrip = sizeof(T) == 8 ? 1 : EAKD_VECTOR_BYTES / 16;

// One stage: f(u) of the strip's vectors u = 0 ... N - 1.
template <typename T, int N>
struct Strip {
  Vec<T> vectors[N];

  template <typename F>
  explicit Strip(const F& f) {
    each(0, [&](int u, int64_t) { vectors[u] = f(u); });
  }
  Vec<T> operator[](int u) const { return vectors[u]; }

  // f(u, its column), of the strip that begins at column `first`
  template <typename F>
  static void each(int64_t first, const F& f) {
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u)
      f(u, first + u * kLanes);
  }
};

// body(Width<N>(), first) for every strip of N vectors from column `first` on, n columns in all.
template <int N>
using Width = std::integral_constant<int, N>;
template <typename T, typename Body>
inline void each_strip(int64_t n, const Body& body) {
  constexpr int N = kStrip<T>;
  int64_t first = 0;
  for (; first + N * kLanes <= n; first += N * kLanes)
    body(Width<N>(), first);
  for (; first < n; first += kLanes)
    body(Width<1>(), first);
}

// ---- storage <-> blocks ----------------------------------------------------------------------------------------

// n columns as T, padded with -inf; returns their maximum, which drops NaN (the sums keep it).
template <typename T, typename S>
T load_columns(const S* from, int64_t stride, int64_t n, T* to) {
  Vec<T> m = splat(-T(INFINITY));
  const auto convert = [&](const S* lanes, int64_t i) {
    const Vec<T> v = load_as<T>(lanes);
    m = larger(v, m);
    store(to + i, v);
  };
  if (stride == 1 && n >= kLanes) {
    for (int64_t i = 0; i + kLanes <= n; i += kLanes)
      convert(from + i, i);
    if (n % kLanes != 0) convert(from + n - kLanes, n - kLanes);  // overlaps the last whole vector
    store(to + n, splat(-T(INFINITY)));
    return max<T>(m);
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    S lanes[kLanes];
    for (int l = 0; l < kLanes; ++l)
      lanes[l] = from[(i + l < n ? i + l : n - 1) * stride];
    convert(lanes, i);
  }
  store(to + n, splat(-T(INFINITY)));
  return max<T>(m);
}

template <typename T, typename S>
void store_columns(const T* from, int64_t stride, int64_t n, S* to, bool past_caches) {
  if (past_caches && stride == 1 && n % kLanes == 0 && (uintptr_t)to % (kLanes * sizeof(S)) == 0) {
    for (int64_t i = 0; i < n; i += kLanes)
      store_as<T, true>(to + i, load(from + i));
    return;
  }
  if (stride == 1 && n >= kLanes) {
    for (int64_t i = 0; i + kLanes <= n; i += kLanes)
      store_as<T>(to + i, load(from + i));
    if (n % kLanes != 0) store_as<T>(to + n - kLanes, load(from + n - kLanes));
    return;
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    S lanes[kLanes];
    store_as<T>(lanes, load(from + i));
    for (int l = 0; l < kLanes && i + l < n; ++l)
      to[(i + l) * stride] = lanes[l];
  }
}

template <typename T>
constexpr Storage native = sizeof(T) == 8 ? Storage::kDouble : Storage::kFloat;

// Of whole vectors. Four lines of maxima: one would wait for itself, every time.
template <typename T>
T largest(const T* x, int64_t n) {
  Vec<T> m[4];
  for (Vec<T>& each : m)
    each = splat(-T(INFINITY));
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int line = 0; line < 4; ++line)
      m[line] = larger(load(x + i + line * kLanes), m[line]);
  for (; i < n; i += kLanes)
    m[0] = larger(load(x + i), m[0]);
  return max<T>(larger(larger(m[0], m[1]), larger(m[2], m[3])));
}

template <typename T>
struct Columns {
  const T* values;
  T max;
};

// n columns as T and their maximum: where they lie if they can be read there, else converted into `scratch`.
template <typename T>
Columns<T> load_block(const LogitsView& v, const char* row, int64_t column, int64_t n, T* scratch, bool copy) {
  const char* p = row + column * v.vocab_stride * v.item_bytes;
  if (v.storage == native<T> && v.vocab_stride == 1 && n % kLanes == 0 && !copy) {
    const T* x = reinterpret_cast<const T*>(p);
    return {x, largest(x, n)};
  }
  switch (v.storage) {
    case Storage::kFloat: return {scratch, load_columns<T>((const float*)p, v.vocab_stride, n, scratch)};
    case Storage::kBFloat16: return {scratch, load_columns<T>((const BFloat16*)p, v.vocab_stride, n, scratch)};
    case Storage::kHalf: return {scratch, load_columns<T>((const Half*)p, v.vocab_stride, n, scratch)};
    case Storage::kDouble:
      if constexpr (sizeof(T) == 8) return {scratch, load_columns<T>((const double*)p, v.vocab_stride, n, scratch)};
  }
  return {};
}

template <typename T>
void store_block(const LogitsView& v, char* row, int64_t column, int64_t n, const T* from, bool past_caches) {
  char* p = row + column * v.vocab_stride * v.item_bytes;
  switch (v.storage) {
    case Storage::kFloat: store_columns<T>(from, v.vocab_stride, n, (float*)p, past_caches); break;
    case Storage::kDouble: store_columns<T>(from, v.vocab_stride, n, (double*)p, past_caches); break;
    case Storage::kBFloat16: store_columns<T>(from, v.vocab_stride, n, (BFloat16*)p, past_caches); break;
    case Storage::kHalf: store_columns<T>(from, v.vocab_stride, n, (Half*)p, past_caches); break;
  }
}

template <typename T>
T centre(double m) {
  return m == -INFINITY ? T(0) : T(m);
}

}  // namespace
}  // namespace eakd
