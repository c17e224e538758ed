// Host twins of csrc/cuda/ptx.cuh: what each instruction computes, from the PTX ISA, and when its effects may
// be seen. Documented there.
#pragma once
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>

#include "device.h"

namespace lk::ptx {

using simt::Where;

// ---- numbers
// -----------------------------------------------------------------------------------------------

inline float from_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
inline float from_f16(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline uint16_t cvt_rn_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t cvt_rn_f16(float x) {
  return x != x ? 0x7fff : std::bit_cast<uint16_t>(static_cast<_Float16>(x));
}
inline uint32_t cvt_rn_bf16x2(float low, float high) {
  return uint32_t{cvt_rn_bf16(low)} | uint32_t{cvt_rn_bf16(high)} << 16;
}
inline uint32_t cvt_rn_f16x2(float low, float high) {
  return uint32_t{cvt_rn_f16(low)} | uint32_t{cvt_rn_f16(high)} << 16;
}
inline uint32_t cvt_rna_tf32(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if ((bits >> 23 & 255) == 255) return x != x ? 0x7fffffff : bits;
  return (bits + 0x1000) & ~0x1fffu;
}
inline uint64_t mul_wide(uint32_t a, uint32_t b) { return uint64_t{a} * b; }
inline uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (pick & 7))) & 255;
    if ((pick & 8) != 0) byte = (byte & 128) != 0 ? 255 : 0;  // its sign, eight times
    out |= byte << (8 * i);
  }
  return out;
}

// ---- memory
// ------------------------------------------------------------------------------------------------

inline uint4 load_stream(Global<const uint4> p, Where where = Where::current()) { return p[{0, where}]; }
inline uint2 load_stream(Global<const uint2> p, Where where = Where::current()) { return p[{0, where}]; }
inline void store_stream(Global<uint4> p, uint4 v, Where where = Where::current()) { p[{0, where}] = v; }
inline void prefetch_l2(Global<const void>) {}  // of any address: it never faults

inline uint32_t atomic_add_acq_rel(Global<uint32_t> p, uint32_t value, Where where = Where::current()) {
  simt::publish_global_writes();
  simt::check_atomic(p.region(), p.raw(), sizeof(uint32_t), where);
  const uint32_t old = *p.raw();
  *p.raw() = old + value;
  return old;
}

// ---- asynchronous copies
// -----------------------------------------------------------------------------------

inline uint64_t evict_first_policy() { return 1; }

namespace detail {
inline void copy(Shared<void> to, Global<const void> from, size_t bytes, int valid, Where where) {
  if (valid < 0 || static_cast<size_t>(valid) > bytes) simt::fail(where, "cp.async of %d valid bytes", valid);
  simt::check_write(to.region(), to.raw(), bytes, bytes, where);
  if (valid > 0) simt::check_read(from.region(), from.raw(), static_cast<size_t>(valid), bytes, where);
  if (reinterpret_cast<uintptr_t>(from.raw()) % bytes != 0)
    simt::fail(where, "cp.async from a misaligned address");
  simt::mark_in_flight(to.region(), to.raw(), bytes, where);
  void* target = to.raw();
  const void* source = from.raw();
  auto pending = simt::start_async(
      [=] {
        std::memset(target, 0, bytes);
        std::memcpy(target, source, static_cast<size_t>(valid));
      },
      where);
  simt::Region* region = to.region();
  simt::cp_async_add(pending, [=] { simt::mark_arrived(region, target, bytes); });
}
}  // namespace detail

template <int kBytes>
void cp_async(Shared<void> to, Global<const void> from, int valid = kBytes, Where where = Where::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  detail::copy(to, from, kBytes, valid, where);
}
inline void cp_async_hint(Shared<void> to, Global<const void> from, uint64_t policy, int valid = 16,
                          Where where = Where::current()) {
  if (policy != evict_first_policy()) simt::fail(where, "not a policy of evict_first_policy()");
  detail::copy(to, from, 16, valid, where);
}
inline void cp_async_commit() { simt::cp_async_commit(); }
template <int kAllowed>
void cp_async_wait() {
  simt::cp_async_wait(kAllowed);
}

// ---- matrices
// ----------------------------------------------------------------------------------------------

namespace detail {

struct MatrixLoad {
  Shared<const void> row;
  uint32_t* out;
  Where where;
};

template <int kCount, bool kTranspose>
void load_matrices(void** lanes) {
  for (int m = 0; m < kCount; ++m) {
    uint16_t element[8][8];
    for (int i = 0; i < 8; ++i) {
      auto* lane = static_cast<MatrixLoad*>(lanes[8 * m + i]);
      simt::check_read(lane->row.region(), lane->row.raw(), 16, 16, lane->where);
      if (!lane->row.region()->shared) simt::fail(lane->where, "ldmatrix from memory that is not shared");
      std::memcpy(element[i], lane->row.raw(), 16);
    }
    for (int l = 0; l < 32; ++l) {
      const int a = l / 4, b = 2 * (l % 4);
      const uint16_t low = kTranspose ? element[b][a] : element[a][b];
      const uint16_t high = kTranspose ? element[b + 1][a] : element[a][b + 1];
      static_cast<MatrixLoad*>(lanes[l])->out[m] = uint32_t{low} | uint32_t{high} << 16;
    }
  }
}

struct Mma {
  float* d;
  const uint32_t *a, *b;
};

template <float (*kFloat)(uint16_t)>
void mma_16bit(void** lanes) {
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    auto* lane = static_cast<Mma*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = kFloat(static_cast<uint16_t>(lane->a[i] >> (16 * half)));
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int half = 0; half < 2; ++half) {
        b[2 * t + half + i * 8][g] = kFloat(static_cast<uint16_t>(lane->b[i] >> (16 * half)));
      }
    }
  }
  for (int l = 0; l < 32; ++l) {
    auto* lane = static_cast<Mma*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + i / 2 * 8, col = 2 * t + i % 2;
      float sum = lane->d[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][col];
      lane->d[i] = sum;
    }
  }
}

inline void mma_tf32_lanes(void** lanes) {
  float a[16][8], b[8][8];
  const auto value = [](uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); };
  for (int l = 0; l < 32; ++l) {
    auto* lane = static_cast<Mma*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = value(lane->a[i]);
    for (int i = 0; i < 2; ++i) b[t + i * 4][g] = value(lane->b[i]);
  }
  for (int l = 0; l < 32; ++l) {
    auto* lane = static_cast<Mma*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + i / 2 * 8, col = 2 * t + i % 2;
      float sum = lane->d[i];
      for (int k = 0; k < 8; ++k) sum += a[row][k] * b[k][col];
      lane->d[i] = sum;
    }
  }
}

constexpr uint32_t kAllLanes = 0xffffffffu;

}  // namespace detail

inline void ldmatrix_x4(uint32_t (&r)[4], Shared<const void> row, Where where = Where::current()) {
  detail::MatrixLoad load{row, r, where};
  simt::warp_collective(detail::kAllLanes, "ldmatrix.x4", &load, detail::load_matrices<4, false>, where);
}
inline void ldmatrix_x2(uint32_t (&r)[2], Shared<const void> row, Where where = Where::current()) {
  detail::MatrixLoad load{row, r, where};
  simt::warp_collective(detail::kAllLanes, "ldmatrix.x2", &load, detail::load_matrices<2, false>, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], Shared<const void> row, Where where = Where::current()) {
  detail::MatrixLoad load{row, r, where};
  simt::warp_collective(detail::kAllLanes, "ldmatrix.x4.trans", &load, detail::load_matrices<4, true>, where);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], Shared<const void> row, Where where = Where::current()) {
  detail::MatrixLoad load{row, r, where};
  simt::warp_collective(detail::kAllLanes, "ldmatrix.x2.trans", &load, detail::load_matrices<2, true>, where);
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     Where where = Where::current()) {
  detail::Mma mma{d, a, b};
  simt::warp_collective(detail::kAllLanes, "mma.bf16", &mma, detail::mma_16bit<from_bf16>, where);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    Where where = Where::current()) {
  detail::Mma mma{d, a, b};
  simt::warp_collective(detail::kAllLanes, "mma.f16", &mma, detail::mma_16bit<from_f16>, where);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     Where where = Where::current()) {
  detail::Mma mma{d, a, b};
  simt::warp_collective(detail::kAllLanes, "mma.tf32", &mma, detail::mma_tf32_lanes, where);
}

// ---- barriers of a part of the block
// -----------------------------------------------------------------------

inline void barrier_sync(int id, int threads, Where where = Where::current()) {
  simt::barrier(id, static_cast<unsigned>(threads), true, where);
}
inline void barrier_arrive(int id, int threads, Where where = Where::current()) {
  simt::barrier(id, static_cast<unsigned>(threads), false, where);
}

}  // namespace lk::ptx
