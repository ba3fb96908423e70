// Warp operations against their definition, and the 16-bit formats over all of their values.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <vector>

#include "cases.h"

namespace self_test {
namespace {

struct Lane {
  int index[6], up[6], down[6], exclusive_or[6];  // by log2 of the width
  unsigned ballot;
  int any, none, all, largest, half_sum;
  double wide;
};

__global__ void warp_operations(Lane* lanes) {
  const int lane = static_cast<int>(threadIdx.x);
  Lane& out = lanes[lane];
  for (int log = 0; log < 6; ++log) {
    const int width = 1 << log;
    out.index[log] = __shfl_sync(~0u, lane, 3, width);
    out.up[log] = __shfl_up_sync(~0u, lane, 2, width);
    out.down[log] = __shfl_down_sync(~0u, lane, 2, width);
    out.exclusive_or[log] = __shfl_xor_sync(~0u, lane, 6, width);
  }
  out.ballot = __ballot_sync(~0u, lane % 3 == 0);
  out.any = __any_sync(~0u, lane == 17);
  out.none = __any_sync(~0u, lane == 99);
  out.all = __all_sync(~0u, lane < 32);
  out.largest = __reduce_max_sync(~0u, lane == 9 ? -1 : -lane - 2);
  // The halves of a warp go their own ways.
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  out.half_sum = lane;
  for (int i = 0; i <= lane / 16; ++i) {
    out.half_sum = lane;
    for (int offset = 8; offset; offset /= 2)
      out.half_sum += __shfl_xor_sync(half, out.half_sum, offset);
  }
  out.wide = __shfl_sync(~0u, lane + 0.5, 31);
}

void shuffles_and_votes() {
  std::vector<Lane> lanes(32);
  launch({}, warp_operations, lanes.data());
  for (int lane = 0; lane < 32; ++lane) {
    const Lane& out = lanes[static_cast<std::size_t>(lane)];
    for (int log = 0; log < 6; ++log) {
      const int width = 1 << log, first = lane & ~(width - 1), end = first + width;
      require(out.index[log] == first + (3 & (width - 1)), "__shfl_sync");
      require(out.up[log] == (lane - 2 >= first ? lane - 2 : lane), "__shfl_up_sync");
      require(out.down[log] == (lane + 2 < end ? lane + 2 : lane), "__shfl_down_sync");
      require(out.exclusive_or[log] == ((lane ^ 6) < end ? lane ^ 6 : lane), "__shfl_xor_sync");
    }
    require(out.ballot == 0x49249249u && out.any == 1 && out.none == 0 && out.all == 1, "votes");
    require(out.largest == -1, "__reduce_max_sync");
    require(out.half_sum == (lane < 16 ? 120 : 376), "sum over half a warp");
    require(out.wide == 31.5, "a shuffle of 8 bytes");
  }
}

__global__ void partial_warp(int* results) {
  const int lane = static_cast<int>(threadIdx.x);
  results[lane] = __shfl_down_sync(~0u, lane, 1, 4) + 100 * __all_sync(~0u, 1);
}

void partial_warps() {
  std::vector<int> results(40);
  launch({1, 40}, partial_warp, results.data());
  for (int lane = 0; lane < 40; ++lane) {
    require(results[static_cast<std::size_t>(lane)] == 100 + (lane % 4 < 3 ? lane + 1 : lane), "a warp of 8 lanes");
  }
}

// Between two neighbours of a format, the nearer one; half way, the one that ends in 0.
template <class Format, class ToFloat, class FromFloat, class Bits>
void check_rounding(Format (*from_bits)(unsigned short), ToFloat to_float, FromFloat from_float, Bits bits,
                    unsigned short infinity) {
  for (unsigned short low = 0; low < infinity; ++low) {
    const auto high = static_cast<unsigned short>(low + 1);
    const double a = to_float(from_bits(low));
    // As if the format went on: infinity is rounded to like the number that would be next.
    const double b = high == infinity ? 2 * a - to_float(from_bits(static_cast<unsigned short>(low - 1)))
                                      : to_float(from_bits(high));
    const float middle = static_cast<float>((a + b) / 2);
    const auto rounded = [&](float x) { return bits(from_float(x)); };
    require(b > a && rounded(static_cast<float>(a)) == low, "a value of the format itself");
    require(rounded(middle) == (low % 2 ? high : low), "a tie");
    require(rounded(std::nextafter(middle, 0.0f)) == low, "below the middle");
    require(rounded(std::nextafter(middle, INFINITY)) == high, "above the middle");
    require(rounded(-middle) == ((low % 2 ? high : low) | 0x8000), "the sign");
  }
  require(std::isinf(to_float(from_bits(infinity))) && bits(from_float(INFINITY)) == infinity, "infinity");
  require(std::isnan(to_float(from_bits(infinity + 1))) && std::isnan(to_float(from_float(NAN))), "NaN");
}

void formats() {
  check_rounding(__ushort_as_half, __half2float, __float2half_rn, __half_as_ushort, 0x7c00);
  check_rounding(__ushort_as_bfloat16, __bfloat162float, __float2bfloat16_rn, __bfloat16_as_ushort, 0x7f80);
  require(__half_as_ushort(__float2half(1e6f)) == 0x7c00, "overflow");

  const __half2 numbers = __hmax2(__floats2half2_rn(-1, NAN), __floats2half2_rn(2, 3));
  require(__low2float(numbers) == 2 && __high2float(numbers) == 3, "__hmax2");
  const float2 nan = __half22float2(__hmax2_nan(__floats2half2_rn(0, NAN), __floats2half2_rn(-0.0f, 3)));
  require(nan.x == 0 && !std::signbit(nan.x) && std::isnan(nan.y), "__hmax2_nan");
  const float2 brain = __bfloat1622float2(__hmax2(__floats2bfloat162_rn(-0.0f, 5), __floats2bfloat162_rn(0, NAN)));
  require(!std::signbit(brain.x) && brain.y == 5, "__hmax2 of bfloat16");
}

}  // namespace

Cases warp_operations_and_formats() {
  return {{"shuffles_and_votes", shuffles_and_votes}, {"partial_warps", partial_warps}, {"formats", formats}};
}

}  // namespace self_test
