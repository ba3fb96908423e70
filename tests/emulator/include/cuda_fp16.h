// float16 as storage and conversions. No arithmetic: kernels here compute in float.
#pragma once

#include <cmath>

#include "eakd_emulator/intrinsics.h"
#include "eakd_emulator/types.h"

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
  const unsigned sign = static_cast<unsigned>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude > 0x7c00) return __uint_as_float(0x7fffffff);
  if (magnitude == 0x7c00) return __uint_as_float(sign | 0x7f800000);
  // Read as a float, the exponent is short by 127 - 15; the product is exact, for subnormals too.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
}

inline __half __float2half_rn(float x) {
  const unsigned sign = __float_as_uint(x) >> 16 & 0x8000;
  if (std::isnan(x)) return {0x7fff};
  const float magnitude = std::fabs(x);
  unsigned bits;
  if (magnitude < 0x1p-14f) {
    // The last place of a float in [0.5, 1) is that of a subnormal half: the sum does the rounding.
    bits = __float_as_uint(magnitude + 0.5f) - __float_as_uint(0.5f);
  } else if (magnitude < 65520.0f) {
    bits = __float_as_uint(magnitude) - (112u << 23);
    bits = (bits + 0xfff + (bits >> 13 & 1)) >> 13;
  } else {
    bits = 0x7c00;
  }
  return {static_cast<unsigned short>(sign | bits)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }
inline float2 __half22float2(__half2 pair) { return {__low2float(pair), __high2float(pair)}; }

// The larger number, where +0 is larger than -0; __hmax prefers a number to NaN, __hmax_nan the other way round.
inline __half __hmax(__half a, __half b) {
  const float x = __half2float(a), y = __half2float(b);
  if (std::isnan(x)) return std::isnan(y) ? __half{0x7fff} : b;
  return x < y || (x == y && std::signbit(x)) ? b : a;
}
inline __half __hmax_nan(__half a, __half b) {
  return std::isnan(__half2float(a)) || std::isnan(__half2float(b)) ? __half{0x7fff} : __hmax(a, b);
}
inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
inline __half2 __hmax2_nan(__half2 a, __half2 b) { return {__hmax_nan(a.x, b.x), __hmax_nan(a.y, b.y)}; }
