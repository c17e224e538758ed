// NF4 on a device: scales, and the pair table.
#pragma once
#include "../nf4.h"
#include "ptx.cuh"

namespace lk::cuda {

// nf4.h's tables where device code can index them at run time.
struct Nf4Tables {
  float codebook[nf4::kCodes];
  float midpoints[nf4::kCodes - 1];
  float dynamic_map[256];
};
constexpr Nf4Tables make_nf4_tables() {
  Nf4Tables tables{};
  for (int i = 0; i < nf4::kCodes; ++i) tables.codebook[i] = nf4::kCodebook[i];
  for (int i = 0; i + 1 < nf4::kCodes; ++i) tables.midpoints[i] = nf4::kMidpoints[i];
  for (int i = 0; i < 256; ++i) tables.dynamic_map[i] = nf4::kDynamicMap[i];
  return tables;
}
static __constant__ Nf4Tables kNf4Tables = make_nf4_tables();

// lk_nf4_weight with pointers of this side.
struct Nf4Weight {
  Global<const uint8_t> packed;       // [ceil(n / 2)]
  Global<const float> absmax;         // [blocks], or null
  Global<const uint8_t> codes;        // [blocks] of double-quantised scales, or null
  Global<const float> nested_absmax;  // [ceil(blocks / 256)]
  Global<const float> offset;         // [1]
  int block_shift;                    // log2(blocksize)

  explicit Nf4Weight(const lk_nf4_weight& w) : packed(w.packed), block_shift(0) {
    if (w.nested_absmax == nullptr) {
      absmax = Global<const float>(static_cast<const float*>(w.absmax));
      codes = nullptr, nested_absmax = nullptr, offset = nullptr;
    } else {
      absmax = nullptr;
      codes = Global<const uint8_t>(static_cast<const uint8_t*>(w.absmax));
      nested_absmax = Global<const float>(w.nested_absmax);
      offset = Global<const float>(w.offset);
    }
    while ((int64_t{1} << block_shift) < w.blocksize) ++block_shift;
  }
};

// The scale that code `code` of block `block` stands for: two roundings, as the format says, never one fused
// one.
__device__ __forceinline__ float nested_scale(const Nf4Weight& w, int64_t block, uint8_t code,
                                              Shared<const float> dynamic_map) {
  return __fadd_rn(__fmul_rn(dynamic_map[code], w.nested_absmax[block / nf4::kNestedBlock]), w.offset[0]);
}

__device__ __forceinline__ float block_scale(const Nf4Weight& w, int64_t block,
                                             Shared<const float> dynamic_map) {
  return w.codes == nullptr ? float(w.absmax[block]) : nested_scale(w, block, w.codes[block], dynamic_map);
}

// ---- 16-bit types
// ------------------------------------------------------------------------------------------

template <int kDtype>
__device__ __forceinline__ float to_float(uint16_t bits) {
  return kDtype == LK_BF16 ? ptx::from_bf16(bits) : ptx::from_f16(bits);
}
template <int kDtype>
__device__ __forceinline__ uint16_t round_to(float x) {
  return kDtype == LK_BF16 ? ptx::cvt_rn_bf16(x) : ptx::cvt_rn_f16(x);
}
template <int kDtype>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
  return kDtype == LK_BF16 ? ptx::cvt_rn_bf16x2(low, high) : ptx::cvt_rn_f16x2(low, high);
}
template <int kDtype>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kDtype == LK_BF16) {
    ptx::mma_bf16(d, a, b);
  } else {
    ptx::mma_f16(d, a, b);
  }
}

// Element i of an array of any dtype, as float.
__device__ __forceinline__ float load_float(Global<const void> p, int dtype, int64_t i) {
  if (dtype == LK_F32) return cast<const float>(p)[i];
  const uint16_t bits = cast<const uint16_t>(p)[i];
  return dtype == LK_BF16 ? ptx::from_bf16(bits) : ptx::from_f16(bits);
}

// ---- the pair table
// ----------------------------------------------------------------------------------------
//
// byte -> its two weights as T(c·code), the first (the high nibble) in the low half. One copy for each lane,
// in its own bank, so that 32 lanes never meet: entry e of lane l is the word at kPairStride·e + 4·l. With a
// stride of 256 bytes one PRMT makes the address out of a register (byte 0: 4·l, byte 1: e), and an LDS
// follows: one instruction each for two weights. The upper 128 bytes of each stride are free for something
// else.
constexpr int kPairStride = 256;
constexpr int kPairBytes = 256 * kPairStride;

template <int kDtype>
constexpr float kBalance = kDtype == LK_BF16 ? nf4::kBalanceBf16 : nf4::kBalanceF16;

template <int kDtype, int kStride = kPairStride>
__device__ __forceinline__ void fill_pair_table(Shared<char> table, int thread, int threads) {
  for (int i = thread; i < 8 * 256; i += threads) {  // eight threads an entry: their stores meet in no bank
    const int e = i / 8;
    const uint32_t pair = round_pair<kDtype>(kBalance<kDtype> * kNf4Tables.codebook[e >> 4],
                                             kBalance<kDtype> * kNf4Tables.codebook[e & 15]);
    cast<uint4>(table + (e * kStride + i % 8 * 16))[0] = make_uint4(pair, pair, pair, pair);
  }
}

// The pair of byte kByte of `codes`; `lane_address` is 4 · lane. The table starts on a multiple of 64 KiB of
// shared memory's own address space, or its base is added by the load.
template <int kByte>
__device__ __forceinline__ uint32_t decode_pair(Shared<const char> table, uint32_t codes,
                                                uint32_t lane_address) {
  const uint32_t offset =
      ptx::prmt(codes, lane_address, 0x5504u | (kByte << 4));  // bytes: 4·lane, code, 0, 0
  return cast<const uint32_t>(table + offset)[0];
}

}  // namespace lk::cuda
