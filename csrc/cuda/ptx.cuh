// Every inline-PTX primitive for sm_80 and later, and nothing but primitives; those of sm_90 are in
// ptx_sm90.cuh. No kernel contains inline PTX of its own. On the stand-in the same names are host twins,
// csrc/simt/ptx.h.
#pragma once
#include "device.cuh"

#ifdef LK_SIMT
#include "../simt/ptx.h"
#else

namespace lk::ptx {

// ---- numbers
// -----------------------------------------------------------------------------------------------

// float -> bf16 bits, round to nearest even.
__device__ __forceinline__ uint16_t cvt_rn_bf16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// float -> fp16 bits, round to nearest even.
__device__ __forceinline__ uint16_t cvt_rn_f16(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// Two floats -> bf16 bits, `low` in the low half.
__device__ __forceinline__ uint32_t cvt_rn_bf16x2(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// Two floats -> fp16 bits, `low` in the low half.
__device__ __forceinline__ uint32_t cvt_rn_f16x2(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// float -> tf32 bits (a float whose low 13 bits are zero), round to nearest, ties away.
__device__ __forceinline__ uint32_t cvt_rna_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// bf16 bits -> float.
__device__ __forceinline__ float from_bf16(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

// fp16 bits -> float.
__device__ __forceinline__ float from_f16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// a · b in 64 bits: one instruction, where the compiler makes two of a product with a large constant.
__device__ __forceinline__ uint64_t mul_wide(uint32_t a, uint32_t b) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

// Byte i of the result is byte (selector >> 4i) & 7 of the eight bytes low, high.
__device__ __forceinline__ uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
  return bytes;
}

// ---- memory
// ------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes that nobody writes during the kernel and nobody needs again: not kept in L1.
__device__ __forceinline__ uint4 load_stream(Global<const uint4> p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// 8 bytes likewise.
__device__ __forceinline__ uint2 load_stream(Global<const uint2> p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// 16 bytes that will not be read soon: evicted first.
__device__ __forceinline__ void store_stream(Global<uint4> p, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Brings the line of p into L2.
__device__ __forceinline__ void prefetch_l2(Global<const void> p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Adds to a counter in global memory, with release and acquire semantics for the whole device: what this
// thread wrote, and what its block wrote before the last __syncthreads, is seen by whoever reads the new
// value. Returns the old one.
__device__ __forceinline__ uint32_t atomic_add_acq_rel(Global<uint32_t> p, uint32_t value) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
}

// ---- asynchronous copies
// -----------------------------------------------------------------------------------

// A policy for cp_async: these lines of L2 are the first to go.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies kBytes (4, 8 or 16, to which both ends are aligned) to shared memory: the first `valid` from global
// memory, zeros behind them. 16 bytes go around L1. Done after a cp_async_wait of this thread.
template <int kBytes>
__device__ __forceinline__ void cp_async(Shared<void> to, Global<const void> from, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from),
                 "n"(kBytes), "r"(valid)
                 : "memory");
  }
}

// 16 bytes with an L2 policy.
__device__ __forceinline__ void cp_async_hint(Shared<void> to, Global<const void> from, uint64_t policy,
                                              int valid = 16) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(to)),
               "l"(from), "r"(valid), "l"(policy)
               : "memory");
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kAllowed of this thread's groups are not done. Other threads see the bytes after a
// barrier.
template <int kAllowed>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kAllowed) : "memory");
}

// ---- matrices
// ----------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements: lane l points to row l % 8 of matrix l / 8; register m of lane l
// holds elements 2(l % 4) and the next of row l / 4 of matrix m.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], Shared<const void> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Two matrices, rows from lanes 0..15.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], Shared<const void> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// Four matrices, each transposed on the way.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], Shared<const void> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Two matrices, each transposed on the way.
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], Shared<const void> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// d [16, 8] += a [16, 16] · b [16, 8], bf16 with fp32 sums. With g = lane / 4, t = lane % 4:
//   a: rows g, g+8, g, g+8 of columns 2t, 2t, 2t+8, 2t+8 (two each);  b: rows 2t, 2t+8 (two each) of column
//   g; d: rows g, g, g+8, g+8 of columns 2t, 2t+1, 2t, 2t+1.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same of fp16.
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d [16, 8] += a [16, 8] · b [8, 8] of tf32: a: rows g, g+8, g, g+8 of columns t, t, t+4, t+4; b: rows t, t+4
// of column g.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- barriers of a part of the block
// -----------------------------------------------------------------------

// Waits at barrier `id` (1..15) for `threads` threads, a multiple of 32.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts at it without waiting.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace lk::ptx
#endif
