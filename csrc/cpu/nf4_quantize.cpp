// nf4_quantize on a CPU.
//
//   block b of W: m = max|w|;  s = clamp(w * (1 / max(m, 1e-38)), -1, 1);  code = #{k : s > midpoint[k]}
//   A short last block divides by max(m, 1e-38) instead of multiplying by the reciprocal, and stores that
//   clamped m (bitsandbytes does so, and the bytes must agree).
//
// One task owns whole blocks: 2 bytes (bf16) read and 0.5 written per weight, 15 compares per weight; the
// compares bound it, vectorised 16 weights at a time.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "../api.h"
#include "../nf4.h"
#include "half.h"
#include "isa.h"
#include "parallel.h"

namespace lk::cpu {
namespace {

constexpr int64_t kMaxBlock = 4096;

// The largest bit pattern of |x|: for finite floats the order of the bits is the order of the values, and a
// result of 0x7f800000 or more says that an infinity or NaN is among them. An integer maximum vectorises; a
// float one does not.
LK_INLINE uint32_t max_magnitude_bits(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, bits_of(x[i]) & 0x7fffffffu);
  return most;
}

LK_INLINE void encode(const float* scaled, int64_t n, uint8_t* codes) {
  for (int64_t i = 0; i < n; ++i) {
    int code = 0;
    for (const float mid : nf4::kMidpoints) code += scaled[i] > mid;
    codes[i] = static_cast<uint8_t>(code);
  }
}

// Returns false where the block holds a NaN or an infinity.
template <class T>
LK_INLINE bool quantize_block(const T* w, int64_t n, bool full, uint8_t* packed, float* absmax) {
  alignas(64) float scaled[kMaxBlock];
  alignas(64) uint8_t codes[kMaxBlock + 1];
  for (int64_t i = 0; i < n; ++i) scaled[i] = to_float(w[i]);
  const uint32_t most = max_magnitude_bits(scaled, n);
  if (most >= 0x7f800000u) return false;
  const float largest = float_of(most), divisor = std::max(largest, nf4::kMinAbsmax);
  if (full) {
    const float inverse = 1.0f / divisor;
    for (int64_t i = 0; i < n; ++i) scaled[i] = std::min(std::max(scaled[i] * inverse, -1.0f), 1.0f);
  } else {
    for (int64_t i = 0; i < n; ++i) scaled[i] = std::min(std::max(scaled[i] / divisor, -1.0f), 1.0f);
  }
  *absmax = full ? largest : divisor;
  encode(scaled, n, codes);
  codes[n] = nf4::kPadCode;
  for (int64_t i = 0; i < (n + 1) / 2; ++i)
    packed[i] = static_cast<uint8_t>(codes[2 * i] << 4 | codes[2 * i + 1]);
  return true;
}

template <class T>
LK_INLINE bool quantize_blocks(const T* w, int64_t n, int64_t blocksize, int64_t begin, int64_t end,
                               uint8_t* packed, float* absmax) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * blocksize, length = std::min(blocksize, n - first);
    if (!quantize_block(w + first, length, length == blocksize, packed + first / 2, absmax + b)) return false;
  }
  return true;
}

template <class T>
bool blocks_portable(const T* w, int64_t n, int64_t blocksize, int64_t begin, int64_t end, uint8_t* packed,
                     float* absmax) {
  return quantize_blocks(w, n, blocksize, begin, end, packed, absmax);
}
template <class T>
LK_AVX512 bool blocks_avx512(const T* w, int64_t n, int64_t blocksize, int64_t begin, int64_t end,
                             uint8_t* packed, float* absmax) {
  return quantize_blocks(w, n, blocksize, begin, end, packed, absmax);
}

template <class T>
int quantize(const void* weight, int64_t n, int64_t blocksize, uint8_t* packed, float* absmax) {
  const T* w = static_cast<const T*>(weight);
  const auto blocks = isa() >= Isa::avx512 ? blocks_avx512<T> : blocks_portable<T>;
  std::atomic<bool> finite{true};
  const int64_t grain = std::max<int64_t>(1, 16384 / blocksize);
  parallel_for((n + blocksize - 1) / blocksize, grain, [&](int64_t begin, int64_t end) {
    if (!blocks(w, n, blocksize, begin, end, packed, absmax)) finite.store(false, std::memory_order_relaxed);
  });
  return finite ? LK_OK : LK_NONFINITE;
}

// The code of the entry nearest to v / nested: midpoints between neighbours, and their product with `nested`,
// are exact in double, so this is the true nearest and a tie is a tie.
uint8_t nearest_dynamic_code(double v, double nested) {
  int low = 0, high = 255;  // the answer is the number of midpoints below v
  while (low < high) {
    const int k = (low + high) / 2;
    const double mid = (static_cast<double>(nf4::kDynamicMap[k]) + nf4::kDynamicMap[k + 1]) / 2;
    if (v > mid * nested) {
      low = k + 1;
    } else {
      high = k;
    }
  }
  return static_cast<uint8_t>(low);
}

}  // namespace
}  // namespace lk::cpu

extern "C" int lk_cpu_nf4_quantize(const void* weight, int dtype, int64_t n, int64_t blocksize,
                                   uint8_t* packed, float* absmax) {
  using namespace lk::cpu;
  switch (dtype) {
    case LK_F32: return quantize<float>(weight, n, blocksize, packed, absmax);
    case LK_F16: return quantize<Half>(weight, n, blocksize, packed, absmax);
    case LK_BF16: return quantize<BFloat16>(weight, n, blocksize, packed, absmax);
  }
  return LK_UNSUPPORTED_DTYPE;
}

extern "C" int lk_cpu_nf4_quantize_absmax(const float* absmax, int64_t blocks, uint8_t* codes,
                                          float* nested_absmax, float* offset) {
  using namespace lk;
  // One thread, index order, double: the mean is the same whatever the number of threads. n / 64 additions
  // are nothing beside the n weights.
  double sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += absmax[b];
  const float mean = blocks > 0 ? static_cast<float>(sum / static_cast<double>(blocks)) : 0.0f;
  *offset = mean;
  const int64_t nested_blocks = (blocks + nf4::kNestedBlock - 1) / nf4::kNestedBlock;
  cpu::parallel_for(nested_blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * nf4::kNestedBlock, last = std::min(blocks, first + nf4::kNestedBlock);
      float nested = 0;
      for (int64_t b = first; b < last; ++b) nested = std::max(nested, std::fabs(absmax[b] - mean));
      nested_absmax[i] = nested;
      for (int64_t b = first; b < last; ++b) codes[b] = cpu::nearest_dynamic_code(absmax[b] - mean, nested);
    }
  });
  return LK_OK;
}
