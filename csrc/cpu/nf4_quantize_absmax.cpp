// The second level of nf4_quantize on a CPU: the scales of the blocks, double-quantised.
//
//   offset = mean(absmax), summed in double in index order, rounded to fp32
//   v = absmax[b] - offset;  nested = max|v| over 256 scales;  code = #{k : v > midpoint[k] * nested}
//
// midpoint[k], between neighbours of the dynamic map, and its product with `nested` are exact in double, so
// this is the true nearest entry and a tie is a tie (it goes down).
//
//   threads  whole second-level blocks each
//   bytes    4 read twice and 1 written per scale, of which there is one for 32 or more weights
//   work     no search: the leading bits of v / nested tell the code to within two comparisons (kBins). The
//   loop
//            is branchless, its look-ups gathers.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../api.h"
#include "../nf4.h"
#include "half.h"
#include "isa.h"
#include "parallel.h"

namespace lk::cpu {
namespace {

constexpr uint32_t kInfinity = 0x7f800000u;

// A bin is what the sign, the exponent and the 6 leading bits of the fraction of r = v / nested name: 64 to a
// power of two, from 2^-24 (which is below every midpoint but the one at 0) up to 1.
constexpr int kFractionBits = 6;
constexpr int kDrop = 23 - kFractionBits;
constexpr int32_t kFirst = (127 - 24) << kFractionBits,
                  kLast = 127 << kFractionBits;  // bins of 2^-24 and of 1
constexpr int32_t kHalf = kLast - kFirst + 1;    // bins of one sign

struct Bins {
  int32_t below[2 * kHalf];  // midpoints below the bin: positive r, then negative
  double midpoint[257];      // 255, and infinities
};

// The value with which bin `i` of positive r begins; the first one reaches down to 0, the last up to all
// above 1.
constexpr double bin_begin(int32_t i) {
  if (i == 0) return 0;
  if (i == kHalf) return 2;
  const int32_t bits = kFirst + i;
  double value = 1 + static_cast<double>(bits & ((1 << kFractionBits) - 1)) / (1 << kFractionBits);
  for (int e = bits >> kFractionBits; e < 127; ++e) value /= 2;
  return value;
}

constexpr Bins make_bins() {
  Bins bins{};
  for (int k = 0; k < 255; ++k) {
    bins.midpoint[k] = (static_cast<double>(nf4::kDynamicMap[k]) + nf4::kDynamicMap[k + 1]) / 2;
  }
  bins.midpoint[255] = bins.midpoint[256] = std::numeric_limits<double>::infinity();
  const double slack = 1 + 1e-6;  // r is rounded to fp32, and may have changed its bin
  int positive = 0, negative = 255;
  for (int32_t i = 0; i < kHalf; ++i) {
    const double least = bin_begin(i) / slack, most = -bin_begin(i + 1) * slack;
    while (bins.midpoint[positive] < least) ++positive;
    while (negative > 0 && bins.midpoint[negative - 1] >= most) --negative;
    bins.below[i] = positive;
    bins.below[kHalf + i] = negative;
  }
  return bins;
}
constexpr Bins kBins = make_bins();

// No bin, with the slack at both ends, has more than two midpoints in it.
constexpr bool two_comparisons_suffice() {
  for (int32_t i = 0; i < kHalf; ++i) {
    if (kBins.midpoint[kBins.below[i] + 2 > 256 ? 256 : kBins.below[i] + 2] <=
        bin_begin(i + 1) * (1 + 1e-6)) {
      return false;
    }
    const int above = kBins.below[kHalf + i] + 2;
    if (above < 255 && kBins.midpoint[above] <= -bin_begin(i) / (1 + 1e-6)) return false;
  }
  return true;
}
static_assert(two_comparisons_suffice());

// The scales of one second-level block.
LK_INLINE void quantize_block(const float* absmax, int64_t n, float mean, uint8_t* codes,
                              float* nested_absmax) {
  uint32_t most = 0;  // of the bits of |v|, whose order is that of the values: an integer maximum vectorises
  for (int64_t b = 0; b < n; ++b) most = std::max(most, bits_of(absmax[b] - mean) & 0x7fffffffu);
  const float nested = float_of(most);
  *nested_absmax = nested;
  if (nested == 0) {
    std::fill_n(codes, n, uint8_t{0});  // v > midpoint * 0 never holds
    return;
  }
  // Loops of one look-up each, into arrays of their own: so the compiler turns them into gathers.
  alignas(64) int32_t below[nf4::kNestedBlock];
  for (int64_t b = 0; b < n; ++b) {
    const uint32_t bits = bits_of((absmax[b] - mean) / nested);
    const int32_t place = static_cast<int32_t>((bits & 0x7fffffffu) >> kDrop) - kFirst;
    const int32_t bin = std::min(std::max(place, 0), kHalf - 1) + static_cast<int32_t>(bits >> 31) * kHalf;
    below[b] = kBins.below[bin];
  }
  alignas(64) int32_t above[nf4::kNestedBlock];
  const double unit = nested;
  for (int64_t b = 0; b < n; ++b) {
    const double v = absmax[b] - mean;
    above[b] =
        (v > kBins.midpoint[below[b]] * unit ? 1 : 0) + (v > kBins.midpoint[below[b] + 1] * unit ? 1 : 0);
  }
  for (int64_t b = 0; b < n; ++b) codes[b] = static_cast<uint8_t>(below[b] + above[b]);
}

LK_INLINE void quantize_blocks(const float* absmax, int64_t blocks, float mean, int64_t begin, int64_t end,
                               uint8_t* codes, float* nested_absmax) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * nf4::kNestedBlock, n = std::min<int64_t>(nf4::kNestedBlock, blocks - first);
    quantize_block(absmax + first, n, mean, codes + first, nested_absmax + i);
  }
}

using QuantizeBlocks = void (*)(const float* absmax, int64_t blocks, float mean, int64_t begin, int64_t end,
                                uint8_t* codes, float* nested_absmax);
void blocks_portable(const float* absmax, int64_t blocks, float mean, int64_t begin, int64_t end,
                     uint8_t* codes, float* nested_absmax) {
  quantize_blocks(absmax, blocks, mean, begin, end, codes, nested_absmax);
}
LK_AVX2 void blocks_avx2(const float* absmax, int64_t blocks, float mean, int64_t begin, int64_t end,
                         uint8_t* codes, float* nested_absmax) {
  quantize_blocks(absmax, blocks, mean, begin, end, codes, nested_absmax);
}
LK_AVX512 void blocks_avx512(const float* absmax, int64_t blocks, float mean, int64_t begin, int64_t end,
                             uint8_t* codes, float* nested_absmax) {
  quantize_blocks(absmax, blocks, mean, begin, end, codes, nested_absmax);
}

// The sum in index order, of numbers that are not negative. Where all of them are multiples of some unit and
// their sum is below 2^53 units, no addition rounds in any order, and sixteen sums side by side give the same
// bits without waiting for one addition after another.
LK_INLINE double sum_in_order(const float* x, int64_t n) {
  constexpr int64_t kLanes = 16;
  uint32_t least = kInfinity - 1,
           most = 0;  // bits of x, minus 1 in `least`, where 0 becomes the largest number
  for (int64_t i = 0; i < n; ++i) {
    least = std::min(least, bits_of(x[i]) - 1);
    most = std::max(most, bits_of(x[i]));
  }
  const double unit = std::ldexp(1.0, std::max(static_cast<int>((least + 1) >> 23), 1) - 150);
  double sum = 0;
  int64_t i = 0;
  if (static_cast<double>(n) * float_of(most) <= unit * 9007199254740992.0) {
    double lanes[kLanes] = {};
    for (; i + kLanes <= n; i += kLanes) {
      for (int64_t k = 0; k < kLanes; ++k) lanes[k] += x[i + k];
    }
    for (const double lane : lanes) sum += lane;
  }
  for (; i < n; ++i) sum += x[i];
  return sum;
}
double sum_portable(const float* x, int64_t n) { return sum_in_order(x, n); }
LK_AVX2 double sum_avx2(const float* x, int64_t n) { return sum_in_order(x, n); }
LK_AVX512 double sum_avx512(const float* x, int64_t n) { return sum_in_order(x, n); }

struct Kernel {
  QuantizeBlocks blocks;
  double (*sum)(const float* x, int64_t n);
};
Kernel kernel() {
  if (isa() >= Isa::avx512) return {blocks_avx512, sum_avx512};
  if (isa() >= Isa::avx2) return {blocks_avx2, sum_avx2};
  return {blocks_portable, sum_portable};
}

}  // namespace
}  // namespace lk::cpu

extern "C" int lk_cpu_nf4_quantize_absmax(const float* absmax, int64_t blocks, uint8_t* codes,
                                          float* nested_absmax, float* offset) {
  using namespace lk;
  const cpu::Kernel kernel = cpu::kernel();
  const float mean =
      blocks > 0 ? static_cast<float>(kernel.sum(absmax, blocks) / static_cast<double>(blocks)) : 0.0f;
  *offset = mean;
  cpu::parallel_for((blocks + nf4::kNestedBlock - 1) / nf4::kNestedBlock, 8, [&](int64_t begin, int64_t end) {
    kernel.blocks(absmax, blocks, mean, begin, end, codes, nested_absmax);
  });
  return LK_OK;
}
