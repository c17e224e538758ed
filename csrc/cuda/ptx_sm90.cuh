// Every inline-PTX primitive that needs sm_90, and nothing but primitives; wgmma and setmaxnreg exist on
// sm_90a alone. On the stand-in the same names are host twins, csrc/simt/ptx_sm90.h.
#pragma once
#include "ptx.cuh"

namespace lk {

// How rows of a tile lie in shared memory: a row is as many bytes as the name says, rows are packed, and the
// tile starts on a multiple of eight rows. The 16-byte chunks of row r change places by exclusive or: 128:
// with r % 8, 64: with r / 2 % 4, 32: with r / 4 % 2, so that eight rows of one column of chunks lie in
// different banks.
enum class Swizzle : int { none = 0, bytes_32 = 32, bytes_64 = 64, bytes_128 = 128 };

}  // namespace lk

#ifdef LK_SIMT
#include "../simt/ptx_sm90.h"
#else
#include <cuda.h>

namespace lk {

// Where a matrix lies in global memory and how it is cut into tiles. Made by make_tensor_map_2d; a kernel
// takes it as `const __grid_constant__ TensorMap map` and hands out &map.
using TensorMap = CUtensorMap;

}  // namespace lk

namespace lk::ptx {

// ---- barriers in shared memory ----------------------------------------------------------------------------
//
// An mbarrier is eight bytes. Its phase is complete when `count` arrivals have come and as many bytes as were
// expected; then the next phase begins, with the same count. Phases have parity 0, 1, 0, ...

// Before first use; one thread. Others see it after fence_mbarrier_init and a barrier of the block or
// cluster.
__device__ __forceinline__ void mbarrier_init(Shared<uint64_t> barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

// Makes this thread's mbarrier_init visible to TMA and to the other blocks of the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival; what this thread did before is seen by those that wait.
__device__ __forceinline__ void mbarrier_arrive(Shared<uint64_t> barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Expects `bytes` more from asynchronous copies in this phase, then arrives.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(Shared<uint64_t> barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Arrives at the barrier that lies at the same place in the block of rank `rank` in this cluster.
__device__ __forceinline__ void mbarrier_arrive_remote(Shared<uint64_t> barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Waits until the phase of this parity is complete. On a barrier whose first phase is not complete, parity 1
// is that of the phase before it: no wait, which is how the first round of a ring finds its stages empty.
__device__ __forceinline__ void mbarrier_wait(Shared<uint64_t> barrier, uint32_t parity) {
  const uint32_t address = shared_address(barrier);
  uint32_t complete;
  do {  // a try gives up after a while that the hardware chooses
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n"
        "}"
        : "=r"(complete)
        : "r"(address), "r"(parity)
        : "memory");
  } while (complete == 0);
}

// The same where threads of other blocks of the cluster arrive: what they did before is seen as well.
__device__ __forceinline__ void mbarrier_wait_cluster(Shared<uint64_t> barrier, uint32_t parity) {
  const uint32_t address = shared_address(barrier);
  uint32_t complete;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n"
        "}"
        : "=r"(complete)
        : "r"(address), "r"(parity)
        : "memory");
  } while (complete == 0);
}

// ---- the asynchronous proxy -------------------------------------------------------------------------------

// What this thread stored to shared memory may be read by TMA and wgmma from now on; for a whole block's
// stores, every thread fences and then comes the barrier.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same of global memory that TMA reads in the kernel that writes it.
__device__ __forceinline__ void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// A policy for copies with a hint: these lines of L2 are the last to go.
__device__ __forceinline__ uint64_t evict_last_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Brings a tensor map near, before its first use.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// One thread starts the copy of the tile whose first element is (row, col) to `to`, which is aligned to 128
// bytes (swizzled: to eight rows). Elements outside the matrix become zeros. The barrier counts the bytes of
// the whole tile.
__device__ __forceinline__ void tma_load_2d(Shared<void> to, const TensorMap* map, Shared<uint64_t> barrier,
                                            int col, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(col), "r"(row)
      : "memory");
}

// With an L2 policy.
__device__ __forceinline__ void tma_load_2d_hint(Shared<void> to, const TensorMap* map,
                                                 Shared<uint64_t> barrier, int col, int row,
                                                 uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(col), "r"(row), "l"(policy)
      : "memory");
}

// To the same place in every block of the cluster whose bit of `blocks` is set; the barrier at the same place
// in each of them counts the bytes.
__device__ __forceinline__ void tma_load_2d_multicast(Shared<void> to, const TensorMap* map,
                                                      Shared<uint64_t> barrier, int col, int row,
                                                      uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(col), "r"(row), "h"(blocks)
      : "memory");
}

// One thread starts the copy of a tile from shared memory; elements outside the matrix are not written.
__device__ __forceinline__ void tma_store_2d(const TensorMap* map, Shared<const void> from, int col,
                                             int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(col), "r"(row)
               : "memory");
}

// Closes a group of this thread's tma_store_2d.
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most kAllowed of this thread's groups are not done: the bytes are in global memory.
template <int kAllowed>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kAllowed) : "memory");
}

// Waits until at most kAllowed of them have not read their shared memory, which may then be written again.
// Needed before the block ends.
template <int kAllowed>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kAllowed) : "memory");
}

// One thread starts a copy of `bytes`, a multiple of 16 like both addresses; the barrier counts them.
__device__ __forceinline__ void bulk_load(Shared<void> to, Global<const void> from, uint32_t bytes,
                                          Shared<uint64_t> barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// With an L2 policy.
__device__ __forceinline__ void bulk_load_hint(Shared<void> to, Global<const void> from, uint32_t bytes,
                                               Shared<uint64_t> barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// ---- matrices ---------------------------------------------------------------------------------------------

// ldmatrix_x4 backwards: lane l points to where row l % 8 of matrix l / 8 goes.
__device__ __forceinline__ void stmatrix_x4(Shared<void> row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Each matrix transposed on the way.
__device__ __forceinline__ void stmatrix_x4_trans(Shared<void> row, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

// ---- warpgroup matrix multiply ----------------------------------------------------------------------------
//
// Four warps compute d [64, N] (+)= a [64, 16] · b [16, N]; it goes on while they do other things. An operand
// is K-major where 16-byte chunks run along k, MN-major (kTransposeA, kTransposeB) where they run along rows
// of a or columns of b. With w the warp, g = lane / 4, t = lane % 4:
//   d[4j], d[4j+1]: row 16w + g, columns 8j + 2t and the next;  d[4j+2], d[4j+3]: row 16w + g + 8, the same;
//   a in registers: rows 16w + g, +8, +0, +8 of columns 2t, 2t, 2t+8, 2t+8 (two each), like mma_bf16.
//
// Registers belong to the multiply from wgmma_fence, which names those that are not already in flight, until
// a wgmma_wait that names the accumulators; a's until any wgmma_wait that the multiply is done at.

namespace detail {

// Keeps the compiler from moving reads or writes of a register past this point.
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void pin(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <class T, int kCount>
__device__ __forceinline__ void pin(T (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) pin(registers[i]);
}

}  // namespace detail

// Hands registers, accumulators and a's, to the multiplies that follow.
template <class... T, int... kCounts>
__device__ __forceinline__ void wgmma_fence(T (&... registers)[kCounts]) {
  (detail::pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes a group of this warp's multiplies.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kAllowed of this warp's groups are not done. Accumulators that are read next are named.
template <int kAllowed, int... kCounts>
__device__ __forceinline__ void wgmma_wait(float (&... d)[kCounts]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kAllowed) : "memory");
  (detail::pin(d), ...);
}

// Operands of an asm statement: register names, and the accumulators that they stand for.
#define LK_NAMES_4 "%0, %1, %2, %3"
#define LK_NAMES_8 LK_NAMES_4 ", %4, %5, %6, %7"
#define LK_NAMES_16 LK_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LK_NAMES_32 \
  LK_NAMES_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LK_NAMES_64                                                                  \
  LK_NAMES_32                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LK_NAMES_128                                                                             \
  LK_NAMES_64                                                                                    \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LK_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LK_SUMS_8(i) LK_SUMS_4(i), LK_SUMS_4(i + 4)
#define LK_SUMS_16(i) LK_SUMS_8(i), LK_SUMS_8(i + 8)
#define LK_SUMS_32(i) LK_SUMS_16(i), LK_SUMS_16(i + 16)
#define LK_SUMS_64(i) LK_SUMS_32(i), LK_SUMS_32(i + 32)
#define LK_SUMS_128(i) LK_SUMS_64(i), LK_SUMS_64(i + 64)

// The numbers are those of the operands behind the accumulators.
#define LK_WGMMA_SS(n, type, names, sums, a_number, b_number, scale_number, trans_a_number, trans_b_number)  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" scale_number ", 0;\nwgmma.mma_async.sync.aligned.m64n" n \
               "k16.f32." type " {" names "}, %" a_number ", %" b_number ", p, 1, 1, %" trans_a_number       \
               ", %" trans_b_number ";\n}"                                                                   \
               : sums                                                                                        \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransposeA)),      \
                 "n"(static_cast<int>(kTransposeB)))
#define LK_WGMMA_SS_SHAPES(type)                                                                            \
  static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 128 || N == 256);                           \
  if constexpr (N == 8) LK_WGMMA_SS("8", type, LK_NAMES_4, LK_SUMS_4(0), "4", "5", "6", "7", "8");          \
  if constexpr (N == 16) LK_WGMMA_SS("16", type, LK_NAMES_8, LK_SUMS_8(0), "8", "9", "10", "11", "12");     \
  if constexpr (N == 32) LK_WGMMA_SS("32", type, LK_NAMES_16, LK_SUMS_16(0), "16", "17", "18", "19", "20"); \
  if constexpr (N == 64) LK_WGMMA_SS("64", type, LK_NAMES_32, LK_SUMS_32(0), "32", "33", "34", "35", "36"); \
  if constexpr (N == 128)                                                                                   \
    LK_WGMMA_SS("128", type, LK_NAMES_64, LK_SUMS_64(0), "64", "65", "66", "67", "68");                     \
  if constexpr (N == 256)                                                                                   \
  LK_WGMMA_SS("256", type, LK_NAMES_128, LK_SUMS_128(0), "128", "129", "130", "131", "132")

#define LK_WGMMA_RS(n, type, names, sums, a0, a1, a2, a3, b_number, scale_number, trans_b_number)            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" scale_number ", 0;\nwgmma.mma_async.sync.aligned.m64n" n \
               "k16.f32." type " {" names "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b_number              \
               ", p, 1, 1, %" trans_b_number ";\n}"                                                          \
               : sums                                                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),      \
                 "n"(static_cast<int>(kTransposeB)))
#define LK_WGMMA_RS_SHAPES(type)                                                                    \
  static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 128 || N == 256);                   \
  if constexpr (N == 8)                                                                             \
    LK_WGMMA_RS("8", type, LK_NAMES_4, LK_SUMS_4(0), "4", "5", "6", "7", "8", "9", "10");           \
  if constexpr (N == 16)                                                                            \
    LK_WGMMA_RS("16", type, LK_NAMES_8, LK_SUMS_8(0), "8", "9", "10", "11", "12", "13", "14");      \
  if constexpr (N == 32)                                                                            \
    LK_WGMMA_RS("32", type, LK_NAMES_16, LK_SUMS_16(0), "16", "17", "18", "19", "20", "21", "22");  \
  if constexpr (N == 64)                                                                            \
    LK_WGMMA_RS("64", type, LK_NAMES_32, LK_SUMS_32(0), "32", "33", "34", "35", "36", "37", "38");  \
  if constexpr (N == 128)                                                                           \
    LK_WGMMA_RS("128", type, LK_NAMES_64, LK_SUMS_64(0), "64", "65", "66", "67", "68", "69", "70"); \
  if constexpr (N == 256)                                                                           \
  LK_WGMMA_RS("256", type, LK_NAMES_128, LK_SUMS_128(0), "128", "129", "130", "131", "132", "133", "134")

// a and b in shared memory, where their descriptors say; bf16. Without `accumulate`, d's old values do not
// count.
template <int N, bool kTransposeA = false, bool kTransposeB = false>
__device__ __forceinline__ void wgmma_ss_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  LK_WGMMA_SS_SHAPES("bf16.bf16");
}

// The same of fp16.
template <int N, bool kTransposeA = false, bool kTransposeB = false>
__device__ __forceinline__ void wgmma_ss_f16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  LK_WGMMA_SS_SHAPES("f16.f16");
}

// a in registers. They stay as they are until the multiply is waited for: one array for each in flight.
template <int N, bool kTransposeB = false>
__device__ __forceinline__ void wgmma_rs_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                                              bool accumulate) {
  LK_WGMMA_RS_SHAPES("bf16.bf16");
}

// The same of fp16.
template <int N, bool kTransposeB = false>
__device__ __forceinline__ void wgmma_rs_f16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                                             bool accumulate) {
  LK_WGMMA_RS_SHAPES("f16.f16");
}

#undef LK_NAMES_4
#undef LK_NAMES_8
#undef LK_NAMES_16
#undef LK_NAMES_32
#undef LK_NAMES_64
#undef LK_NAMES_128
#undef LK_SUMS_4
#undef LK_SUMS_8
#undef LK_SUMS_16
#undef LK_SUMS_32
#undef LK_SUMS_64
#undef LK_SUMS_128
#undef LK_WGMMA_SS
#undef LK_WGMMA_SS_SHAPES
#undef LK_WGMMA_RS
#undef LK_WGMMA_RS_SHAPES

// ---- warps and registers ----------------------------------------------------------------------------------

// True in one lane of the warp, the same one every time. All lanes ask.
__device__ __forceinline__ bool elect_sync() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

// Raises the registers of each thread of this warpgroup to kCount (24..256, a multiple of 8); waits for
// others to give some up.
template <int kCount>
__device__ __forceinline__ void set_max_registers_up() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Lowers them.
template <int kCount>
__device__ __forceinline__ void set_max_registers_down() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- clusters ---------------------------------------------------------------------------------------------

// This block's rank in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Blocks in the cluster.
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Arrives at the barrier of all threads of the cluster; what this one did before is seen after the wait.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

// Waits for all of them.
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// The same place in the shared memory of the block of rank `rank`: a pointer for ordinary loads and stores.
// That block must not have ended.
template <class T>
__device__ __forceinline__ Shared<T> map_shared_rank(Shared<T> p, uint32_t rank) {
  uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(p), "r"(rank));
  return reinterpret_cast<Shared<T>>(mapped);
}

// ---- kernels after kernels --------------------------------------------------------------------------------

// Waits until the kernels that this one follows have ended and their writes are seen, where it was launched
// to start before that; otherwise nothing.
__device__ __forceinline__ void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The kernel that follows may start.
__device__ __forceinline__ void grid_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- reductions to global memory --------------------------------------------------------------------------
//
// Each element is added on its own, relaxed, in no particular order; p is aligned to all of them together.

// Two floats.
__device__ __forceinline__ void red_add_f32(Global<float> p, float2 v) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(v.x), "f"(v.y) : "memory");
}

// Four.
__device__ __forceinline__ void red_add_f32(Global<float> p, float4 v) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v.x), "f"(v.y),
               "f"(v.z), "f"(v.w)
               : "memory");
}

// Two bf16, each rounded to nearest even.
__device__ __forceinline__ void red_add_bf16x2(Global<uint32_t> p, uint32_t v) {
  asm volatile("red.relaxed.gpu.global.add.noftz.bf16x2 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Eight bf16.
__device__ __forceinline__ void red_add_bf16x2(Global<uint32_t> p, uint4 v) {
  asm volatile("red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Two fp16.
__device__ __forceinline__ void red_add_f16x2(Global<uint32_t> p, uint32_t v) {
  asm volatile("red.relaxed.gpu.global.add.noftz.f16x2 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Eight fp16.
__device__ __forceinline__ void red_add_f16x2(Global<uint32_t> p, uint4 v) {
  asm volatile("red.relaxed.gpu.global.add.noftz.v4.f16x2 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

}  // namespace lk::ptx
#endif

namespace lk::ptx {

// Where wgmma finds a tile of 16-bit elements. The strides in bytes mean, for a tile whose rows of a (columns
// of b) are called m, and chunks are 16 bytes:
//            swizzled K-major   swizzled MN-major                   plain K-major    plain MN-major
//   leading  not used           next swizzle-width of m             next 8 of k      next 8 of k
//   stride   next 8 of m        next 8 of k                         next 8 of m      next 8 of m
// Plain tiles are made of cores of eight packed chunks: 8 m x 8 k.
template <Swizzle kSwizzle>
__device__ __forceinline__ uint64_t matrix_descriptor(Shared<const void> start, uint32_t leading,
                                                      uint32_t stride) {
  constexpr uint64_t kMode = kSwizzle == Swizzle::bytes_128  ? 1
                             : kSwizzle == Swizzle::bytes_64 ? 2
                             : kSwizzle == Swizzle::bytes_32 ? 3
                                                             : 0;
  const auto field = [](uint32_t bytes) { return uint64_t{(bytes & 0x3ffff) >> 4}; };
  return field(shared_address(start)) | field(leading) << 16 | field(stride) << 32 | kMode << 62;
}

// A K-major tile as TMA brings it, box [m, swizzle / 2]: rows of `kSwizzle` bytes. Its k-th slice of 16
// columns starts 32 k bytes further.
template <Swizzle kSwizzle = Swizzle::bytes_128>
__device__ __forceinline__ uint64_t k_major_descriptor(Shared<const void> start) {
  static_assert(kSwizzle != Swizzle::none);
  return matrix_descriptor<kSwizzle>(start, 16, 8 * static_cast<uint32_t>(kSwizzle));
}

// An MN-major tile as TMA brings it, box [k, swizzle / 2], `next` bytes from one box along m to the next one.
// Its k-th slice of 16 rows starts 16 k rows further.
template <Swizzle kSwizzle = Swizzle::bytes_128>
__device__ __forceinline__ uint64_t mn_major_descriptor(Shared<const void> start, uint32_t next) {
  static_assert(kSwizzle != Swizzle::none);
  return matrix_descriptor<kSwizzle>(start, next, 8 * static_cast<uint32_t>(kSwizzle));
}

// The descriptor of what starts `bytes` further, a multiple of 16: one addition.
__device__ __forceinline__ uint64_t descriptor_advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

}  // namespace lk::ptx
