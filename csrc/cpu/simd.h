// Vectors of the instruction set that the including file is compiled for: GCC/Clang vector extensions, so that one
// source serves AVX-512, AVX2, SSE2 and NEON. EAKD_VECTOR_BYTES says how wide.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace eakd {
namespace {

template <typename T>
struct VectorOf;
#define EAKD_VECTOR(T, NAME) \
  typedef T NAME __attribute__((vector_size(EAKD_VECTOR_BYTES / 4 * sizeof(T)))); \
  template <> \
  struct VectorOf<T> { \
    using type = NAME; \
  };
// Every type has as many lanes as fit floats into one register; doubles take two registers.
EAKD_VECTOR(float, VecF)
EAKD_VECTOR(double, VecD)
EAKD_VECTOR(int32_t, VecI)
EAKD_VECTOR(uint32_t, VecU)
EAKD_VECTOR(uint16_t, VecH)
#undef EAKD_VECTOR
template <typename T>
using Vec = typename VectorOf<T>::type;

constexpr int kLanes = EAKD_VECTOR_BYTES / 4;
constexpr int64_t round_up_to_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <typename T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
template <typename To, typename From>
inline To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To out;
  std::memcpy(&out, &v, sizeof out);
  return out;
}
template <typename T>
inline Vec<T> splat(T x) {
  return Vec<T>{} + x;
}

// a > b ? a : b, which is b where either is NaN. One instruction that compilers do not make of the comparison.
template <typename V>
inline V larger(V a, V b) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<V, VecF>) {
#if EAKD_VECTOR_BYTES == 64
    return (VecF)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);  // GCC 12 warns of the header's plain one
#elif EAKD_VECTOR_BYTES == 32
    return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return (VecF)_mm_max_ps((__m128)a, (__m128)b);
#endif
  }
#endif
  return a > b ? a : b;
}

// Halves are combined until one lane is left.
template <typename V, int N>
struct HalfOf {
  typedef std::remove_cv_t<std::remove_reference_t<decltype(V{}[0])>> T;
  typedef T Half __attribute__((vector_size(N / 2 * sizeof(T))));
  Half low, high;
  explicit HalfOf(const V& v) {
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  }
};
template <int N = kLanes, typename V>
inline double sum_lanes(V v) {
  const HalfOf<V, N> halves(v);
  if constexpr (N == 2)
    return halves.low[0] + halves.high[0];
  else
    return sum_lanes<N / 2>(halves.low + halves.high);
}
// In double: a block's sum is then as good as its lanes. Not inlined, nor is max: taking the halves takes the vector's
// address, and a loop that accumulates into a vector with an address keeps it in memory (GCC 12).
template <typename T>
__attribute__((noinline)) double sum(Vec<T> v) {
  const HalfOf<Vec<T>, kLanes> halves(v);
  typedef double Doubles __attribute__((vector_size(kLanes / 2 * sizeof(double))));
  return sum_lanes<kLanes / 2>(__builtin_convertvector(halves.low, Doubles) +
                               __builtin_convertvector(halves.high, Doubles));
}
template <int N = kLanes, typename V>
inline auto max_lanes(V v) {
  const HalfOf<V, N> halves(v);
  const auto larger_half = halves.low > halves.high ? halves.low : halves.high;
  if constexpr (N == 2)
    return larger_half[0];
  else
    return max_lanes<N / 2>(larger_half);
}
template <typename T>
__attribute__((noinline)) T max(Vec<T> v) {
  return max_lanes(v);
}

// The exponent below which 2^x counts as 0. Also the floor to which x is raised before a product 2^x * x, so that
// x = -inf gives 0 * floor and not 0 * (-inf).
#if defined(__x86_64__) && EAKD_VECTOR_BYTES == 64
#define EAKD_HAS_SCALEF 1
template <typename T>
constexpr T kExp2Floor = T(-200);  // vscalefps goes below the smallest subnormal by itself
#else
#define EAKD_HAS_SCALEF 0
template <typename T>
constexpr T kExp2Floor = T(-126);
#endif
template <>
constexpr double kExp2Floor<double> = -1100;
// For an exponent that others are made of: a tenth of it is below every floor, and exp2_from_floor takes it.
template <typename T>
constexpr T kDeepExp2Floor = T(-16384);

template <typename V, typename T>
inline V raise_to(V x, T floor) {
  return larger(V{} + floor, x);
}  // keeps NaN

// 2^f for |f| <= 1/2, by a minimax polynomial of degree 6, 2e-9 before rounding.
inline VecF exp2_polynomial(VecF f, float one = 1.0f) {
  // Estrin's order: half the latency of Horner's, which is what bounds the loops around it.
  const VecF f2 = f * f;
  const VecF high = f2 * 1.53458122e-4f + (f * 1.33999312e-3f + 9.61848896e-3f);
  const VecF middle = f * 5.55032878e-2f + 2.40226469e-1f;
  return f2 * (f2 * high + middle) + (f * 6.93147206e-1f + one);
}
#if EAKD_HAS_SCALEF
// 2^x for -2^18 < x < 128; 0 from the floor down, NaN for NaN. x = n + f with n a multiple of 1/16 and |f| <= 1/32:
// 2^floor(n), which scalef takes from n, times 2^(n - floor(n)) from a register, times 2^f by a minimax polynomial of
// degree 3, 1.6e-9 before rounding.
inline VecF exp2_from_floor(VecF x) {
  const float magic = 786432.0f;  // 1.5 * 2^19: adding it rounds to a multiple of 1/16, left in the low mantissa bits
  const VecF table = {1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                      1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                      1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
  const VecF rounded = x + magic, n = rounded - magic, f = x - n;
  const VecF share = (VecF)_mm512_permutexvar_ps((__m512i)rounded, (__m512)table);
  const VecF slope = f * (f * 5.55021365e-2f + 2.40234288e-1f) + 6.93147183e-1f;
  return (VecF)_mm512_scalef_ps((__m512)(share * f * slope + share), (__m512)n);
}
#else
// The same. x = n + f with an integer n.
inline VecF exp2_from_floor(VecF x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low mantissa bits
  const VecF rounded = x + magic;
  const VecU power = (bits<VecU>(rounded) << 23) + 0x3f800000u;
  // A product, and not an addition to the polynomial's bits, so that NaN survives whatever its payload.
  const VecF y = exp2_polynomial(x - (rounded - magic)) * bits<VecF>(power);
  return x <= kExp2Floor<float> ? VecF{} : y;
}
#endif
inline VecD exp2_from_floor(VecD x) {
  VecD y;
  for (int i = 0; i < kLanes; ++i)
    y[i] = __builtin_exp2(x[i]);
  return y;
}
template <typename T>
inline Vec<T> exp2_any(Vec<T> x) {
  return exp2_from_floor(raise_to(x, kExp2Floor<T>));
}

// For column formulas (../divergence.h), on any argument.
template <typename T>
struct VectorMath;

template <>
struct VectorMath<float> {
  typedef float Scalar;
  static VecF abs(VecF x) { return bits<VecF>(bits<VecU>(x) & 0x7fffffffu); }
  static VecF exp2(VecF x) {
    x = x > 128.0f ? VecF{} + 128.0f : x;  // +inf from there on; NaN stays
    return exp2_any<float>(x);
  }
  static VecF larger(VecF a, VecF b) { return eakd::larger(a, b); }
  // for -150 <= x < 128
  static VecF exp2_bounded(VecF x) { return exp2_from_floor(x); }
  static VecF exp2_below_128(VecF x) { return exp2_any<float>(x); }
  // 2^x - 1 for x <= 0, exact where that is small.
  static VecF exp2m1(VecF x) {
    x = raise_to(x, -126.0f);
#if EAKD_HAS_SCALEF
    const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const VecF f = x - (VecF)n, power = (VecF)_mm512_scalef_ps(_mm512_set1_ps(1.0f), n);
#else
    const float magic = 12582912.0f;  // as in exp2_from_floor
    const VecF rounded = x + magic, f = x - (rounded - magic);
    const VecF power = bits<VecF>((bits<VecU>(rounded) << 23) + 0x3f800000u);
#endif
    return power * exp2_polynomial(f, 0.0f) + (power - 1.0f);
  }
  // For x > 0 that is normal: x = 2^e (1 + f), 1 + f within sqrt(2) of 1, and ln(1 + f) = f - f^2/2 + f^3 Q(f) with a
  // minimax Q, 6e-9 before rounding.
  static VecF ln(VecF x) {
    const VecU raw = bits<VecU>(x) - 0x3f3504f3u;
    const VecF e = __builtin_convertvector(bits<VecI>(raw) >> 23, VecF);
    const VecF f = bits<VecF>((raw & 0x7fffffu) + 0x3f3504f3u) - 1.0f, f2 = f * f, f4 = f2 * f2;
    const VecF high = f2 * (f * -7.63442984e-2f + 1.27615503e-1f) + (f * -1.31601951e-1f + 1.42017625e-1f);
    const VecF low = f2 * (f * -1.66233565e-1f + 2.00012267e-1f) + (f * -2.50008211e-1f + 3.33333317e-1f);
    const VecF value = f2 * f * (f4 * high + low) - 0.5f * f2 + f + e * 6.93147182e-1f;
    return x == x ? value : x;
  }
};

template <>
struct VectorMath<double> {
  typedef double Scalar;
  template <typename F>
  static VecD each(VecD x, F&& f) {
    for (int i = 0; i < kLanes; ++i)
      x[i] = f(x[i]);
    return x;
  }
  static VecD abs(VecD x) { return x < 0 ? -x : x; }
  static VecD exp2(VecD x) {
    return each(x, [](double v) { return __builtin_exp2(v); });
  }
  static VecD larger(VecD a, VecD b) { return a > b ? a : b; }
  static VecD exp2_bounded(VecD x) { return exp2(x); }
  static VecD exp2_below_128(VecD x) { return exp2(x); }
  static VecD exp2m1(VecD x) {
    return each(x, [](double v) { return __builtin_expm1(v * 0.6931471805599453); });
  }
  static VecD ln(VecD x) {
    return each(x, [](double v) { return __builtin_log(v); });
  }
};

// tanh, from the side where nothing cancels; NaN stays.
template <typename T>
inline Vec<T> tanh_any(Vec<T> x) {
  const Vec<T> magnitude = x < T(0) ? -x : x;
  const Vec<T> less = VectorMath<T>::exp2m1(magnitude * T(-2 * 1.4426950408889634));  // e^(-2|x|) - 1
  const Vec<T> value = -less / (less + T(2));
  return x < T(0) ? -value : value;
}

// v^N for the small N of a temperature ratio.
template <int N, typename V>
inline V power(V v) {
  if constexpr (N == 1)
    return v;
  else if constexpr (N % 2 == 0) {
    const V half = power<N / 2>(v);
    return half * half;
  } else
    return power<N - 1>(v) * v;
}

// ---- storage types ---------------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t raw;
};
struct Half {
  uint16_t raw;
};

inline VecU widen(const void* p) {
  VecH raw;
  std::memcpy(&raw, p, sizeof raw);
  return __builtin_convertvector(raw, VecU);
}
inline VecH narrow(VecU v) { return __builtin_convertvector(v, VecH); }

inline VecF load_as_float(const float* p) { return load(p); }
inline VecF load_as_float(const BFloat16* p) { return bits<VecF>(widen(p) << 16); }
inline VecF load_as_float(const Half* p) {
  const VecU raw = widen(p), sign = (raw & 0x8000u) << 16, magnitude = (raw & 0x7fffu) << 13;
  const VecU normal = magnitude + (112u << 23), special = magnitude + (224u << 23);
  // Subnormals by way of an integer: a float that held their bits would be flushed to zero.
  const VecF subnormal = __builtin_convertvector(bits<VecI>(raw & 0x3ffu), VecF) * 0x1p-24f;
  const VecU exponent = raw & 0x7c00u;
  const VecU value = exponent == 0u ? bits<VecU>(subnormal) : exponent == 0x7c00u ? special : normal;
  return bits<VecF>(value | sign);
}

// Round to nearest, ties to even.
inline VecH to_bfloat16(VecF v) {
  const VecU u = bits<VecU>(v);
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return narrow(v != v ? VecU{} + 0x7fc0u : rounded);
}
inline VecH to_half(VecF v) {
  const VecU u = bits<VecU>(v), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const VecU normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the result is subnormal: 0.5 has an ulp of 2^-24 there, so the addition does the rounding.
  const VecU subnormal = bits<VecU>(bits<VecF>(magnitude) + 0.5f) - 0x3f000000u;
  const VecU finite = magnitude < 0x38800000u ? subnormal : normal;
  const VecU value = magnitude > 0x7f800000u ? VecU{} + 0x7e00u : magnitude >= 0x477ff000u ? VecU{} + 0x7c00u : finite;
  return narrow(value | sign);
}

// Past the caches: a large gradient would first be read into them to be overwritten, and push out what is in use.
// `p` is aligned to the bytes written; stream_fence() before another thread may look.
template <typename T>
inline void stream(T* p, Vec<T> v) {
#if EAKD_VECTOR_BYTES == 64
  if constexpr (sizeof v == 64) {
    _mm512_stream_si512((__m512i*)p, bits<__m512i>(v));
    return;
  }
  if constexpr (sizeof v == 32) {
    _mm256_stream_si256((__m256i*)p, bits<__m256i>(v));
    return;
  }
#elif EAKD_VECTOR_BYTES == 32
  if constexpr (sizeof v == 32) {
    _mm256_stream_si256((__m256i*)p, bits<__m256i>(v));
    return;
  }
  if constexpr (sizeof v == 16) {
    _mm_stream_si128((__m128i*)p, bits<__m128i>(v));
    return;
  }
#endif
  store(p, v);
}
inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Storage type S to and from arithmetic type T.
template <typename T, typename S>
inline Vec<T> load_as(const S* p) {
  if constexpr (std::is_same_v<S, double>) {
    static_assert(std::is_same_v<T, double>, "fp64 logits are computed in fp64");
    return load(p);
  } else {
    return __builtin_convertvector(load_as_float(p), Vec<T>);
  }
}
template <typename T, bool kStream = false, typename S>
inline void store_as(S* p, Vec<T> v) {
  const auto put = [](auto* to, auto value) {
    if constexpr (kStream)
      stream(to, value);
    else
      store(to, value);
  };
  if constexpr (std::is_same_v<S, double>)
    put(p, __builtin_convertvector(v, VecD));
  else if constexpr (std::is_same_v<S, float>)
    put(p, __builtin_convertvector(v, VecF));
  else if constexpr (std::is_same_v<S, BFloat16>)
    put(&p->raw, to_bfloat16(__builtin_convertvector(v, VecF)));
  else
    put(&p->raw, to_half(__builtin_convertvector(v, VecF)));
}

}  // namespace
}  // namespace eakd
