// One small device program for each primitive of ptx.cuh and ptx_sm90.cuh, as kernel text that nvcc compiles
// for a device and the host compiler for csrc/simt: test_twins.py compares what the two compute. Included by
// twins.cu.
//
// A program gets its buffers and numbers from Python (tests/twins.py says what each means) and launches one
// kernel. LK_TWINS_ARCH is 80 for ptx.cuh alone, 100 for what every later GPU has, 90 for all.
//
// On the stand-in a `fault` other than 0 breaks the program in one place, which must be caught. Device code
// has no faults in it: a wgmma that may not be waited for would be compiled to wait at once.
#pragma once
#include "../../csrc/cuda/ptx.cuh"
#if LK_TWINS_ARCH >= 90
#include "../../csrc/cuda/tensor_map.cuh"
#endif

#ifdef LK_SIMT
#define LK_FAULT(number) (fault == (number))
#else
#define LK_FAULT(number) false
#endif

namespace twins {

using lk::Global;
using lk::Shared;
namespace ptx = lk::ptx;

struct Buffer {
  void* data;
  int64_t bytes;
  int32_t use;  // simt::Use: input, output, inout
};

template <class T>
Global<T> global(const Buffer& buffer) {
  return Global<T>(static_cast<T*>(buffer.data));
}

inline int launch(auto kernel, unsigned blocks, unsigned threads, size_t shared_bytes, unsigned cluster,
                  auto... arguments) {
  return lk::cuda::launch("twin", kernel, {blocks, 1, 1, threads, shared_bytes, cluster}, nullptr,
                          arguments...);
}

// ---- numbers ----------------------------------------------------------------------------------------------

// x [n] -> bits [5, n]: conversions of x[i]; floats [2, n]: what its bits 16..31 are as bf16, bits 8..23 as
// fp16.
__global__ void convert_kernel(Global<const float> x, Global<uint32_t> out, Global<float> floats, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const float v = x[i], next = x[(i + 1) % n];
  const uint32_t bits = __float_as_uint(v);
  out[i] = ptx::cvt_rn_bf16(v);
  out[n + i] = ptx::cvt_rn_f16(v);
  out[2 * n + i] = ptx::cvt_rn_bf16x2(v, next);
  out[3 * n + i] = ptx::cvt_rn_f16x2(v, next);
  out[4 * n + i] = ptx::cvt_rna_tf32(v);
  floats[i] = ptx::from_bf16(static_cast<uint16_t>(bits >> 16));
  floats[n + i] = ptx::from_f16(static_cast<uint16_t>(bits >> 8));
}
inline int convert(const Buffer* b, const int64_t*) {
  const int n = static_cast<int>(b[0].bytes / 4);
  return launch(convert_kernel, static_cast<unsigned>((n + 127) / 128), 128, 0, 1, global<const float>(b[0]),
                global<uint32_t>(b[1]), global<float>(b[2]), n);
}

// words [3, n] -> out [n].
__global__ void prmt_kernel(Global<const uint32_t> words, Global<uint32_t> out, int n) {
  const int i = static_cast<int>(threadIdx.x);
  out[i] = ptx::prmt(words[i], words[n + i], words[2 * n + i] & 0x7777);
}
inline int prmt(const Buffer* b, const int64_t*) {
  const int n = static_cast<int>(b[1].bytes / 4);
  return launch(prmt_kernel, 1, static_cast<unsigned>(n), 0, 1, global<const uint32_t>(b[0]),
                global<uint32_t>(b[1]), n);
}

// words [2, n] -> out [2, n]: the products' low halves, and the high ones.
__global__ void mul_wide_kernel(Global<const uint32_t> words, Global<uint32_t> out, int n) {
  const int i = static_cast<int>(threadIdx.x);
  const uint64_t product = ptx::mul_wide(words[i], words[n + i]);
  out[i] = static_cast<uint32_t>(product), out[n + i] = static_cast<uint32_t>(product >> 32);
}
inline int mul_wide(const Buffer* b, const int64_t*) {
  const int n = static_cast<int>(b[1].bytes / 8);
  return launch(mul_wide_kernel, 1, static_cast<unsigned>(n), 0, 1, global<const uint32_t>(b[0]),
                global<uint32_t>(b[1]), n);
}

// ---- memory -----------------------------------------------------------------------------------------------

// in [threads, 16 bytes] -> out, with the halves that load_stream of 8 bytes brings exchanged.
__global__ void stream_kernel(Global<const uint4> in, Global<uint4> out) {
  const int i = static_cast<int>(threadIdx.x);
  ptx::prefetch_l2(in + i);
  const uint4 whole = ptx::load_stream(in + i);
  const uint2 low = ptx::load_stream(lk::cast<const uint2>(in + i));
  const uint2 high = ptx::load_stream(lk::cast<const uint2>(in + i) + 1);
  ptx::store_stream(out + i, make_uint4(high.x ^ whole.x, high.y, low.x, low.y ^ whole.w));
}
inline int stream(const Buffer* b, const int64_t*) {
  return launch(stream_kernel, 1, static_cast<unsigned>(b[0].bytes / 16), 0, 1, global<const uint4>(b[0]),
                global<uint4>(b[1]));
}

// Each block writes its number to `parts`; the last one to count adds them up. counter [1] starts at 0.
__global__ void last_block_kernel(Global<uint32_t> counter, Global<uint32_t> parts, Global<uint32_t> sum) {
  if (threadIdx.x != 0) return;
  parts[static_cast<int>(blockIdx.x)] = 3 * blockIdx.x + 1;
  __threadfence();
  if (ptx::atomic_add_acq_rel(counter, 1) + 1 < gridDim.x) return;
  uint32_t total = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) total += parts[i];
  sum[0] = total;
}
inline int last_block(const Buffer* b, const int64_t*) {
  return launch(last_block_kernel, static_cast<unsigned>(b[1].bytes / 4), 32, 0, 1, global<uint32_t>(b[0]),
                global<uint32_t>(b[1]), global<uint32_t>(b[2]));
}

// in [4, 128, 16 bytes], valid [128] int32 -> out [4, 128, 16 bytes]: one quarter per kind of copy.
__global__ void cp_async_kernel(Global<const char> in, Global<const int> valid, Global<uint4> out) {
  LK_DYNAMIC_SHARED(shared);
  const int t = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int at = 16 * t, quarter = 16 * threads, count = valid[t];
  for (int i = 0; i < 16; i += 4) ptx::cp_async<4>(shared + at + i, in + at + i);
  ptx::cp_async_commit();
  for (int i = 0; i < 16; i += 8)
    ptx::cp_async<8>(shared + quarter + at + i, in + quarter + at + i, count / 2);
  ptx::cp_async<16>(shared + 2 * quarter + at, in + 2 * quarter + at, count);
  ptx::cp_async_commit();
  ptx::cp_async_hint(shared + 3 * quarter + at, in + 3 * quarter + at, ptx::evict_first_policy(), count);
  ptx::cp_async_commit();
  ptx::cp_async_wait<2>();
  __syncthreads();
  const int other = (t + 37) % threads;
  const auto from = lk::cast<const uint4>(shared);
  out[other] = from[other];
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int i = 1; i < 4; ++i) out[i * threads + other] = from[i * threads + other];
}
inline int cp_async(const Buffer* b, const int64_t*) {
  return launch(cp_async_kernel, 1, 128, 4 * 128 * 16, 1, global<const char>(b[0]), global<const int>(b[1]),
                global<uint4>(b[2]));
}

// ---- matrices of a warp -----------------------------------------------------------------------------------

// in [32 rows, 16 bytes] -> out [12, 32]: the registers of the four forms, x4, x2, x4.trans, x2.trans.
__global__ void ldmatrix_kernel(Global<const uint4> in, Global<uint32_t> out) {
  LK_DYNAMIC_SHARED(shared);
  const int lane = static_cast<int>(threadIdx.x);
  lk::cast<uint4>(shared)[lane] = in[lane];
  __syncwarp();
  uint32_t four[4], two[2];
  const Shared<const void> row = shared + 16 * lane;
  ptx::ldmatrix_x4(four, row);
  for (int i = 0; i < 4; ++i) out[32 * i + lane] = four[i];
  ptx::ldmatrix_x2(two, row);
  for (int i = 0; i < 2; ++i) out[32 * (4 + i) + lane] = two[i];
  ptx::ldmatrix_x4_trans(four, row);
  for (int i = 0; i < 4; ++i) out[32 * (6 + i) + lane] = four[i];
  ptx::ldmatrix_x2_trans(two, row);
  for (int i = 0; i < 2; ++i) out[32 * (10 + i) + lane] = two[i];
}
inline int ldmatrix(const Buffer* b, const int64_t*) {
  return launch(ldmatrix_kernel, 1, 32, 512, 1, global<const uint4>(b[0]), global<uint32_t>(b[1]));
}

// Fragments a [32, 4], b [32, 2], d [32, 4] -> out [32, 4]. kind: 0 bf16, 1 fp16, 2 tf32.
__global__ void mma_kernel(Global<const uint32_t> a, Global<const uint32_t> b, Global<const float> d,
                           Global<float> out, int kind) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t fragment_a[4], fragment_b[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) fragment_a[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) fragment_b[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) sums[i] = d[4 * lane + i];
  if (kind == 0) ptx::mma_bf16(sums, fragment_a, fragment_b);
  if (kind == 1) ptx::mma_f16(sums, fragment_a, fragment_b);
  if (kind == 2) ptx::mma_tf32(sums, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = sums[i];
}
inline int mma(const Buffer* b, const int64_t* numbers) {
  return launch(mma_kernel, 1, 32, 0, 1, global<const uint32_t>(b[0]), global<const uint32_t>(b[1]),
                global<const float>(b[2]), global<float>(b[3]), static_cast<int>(numbers[0]));
}

// Warp 0 hands values to warp 1 by barrier 1, warp 2 to warp 3 by barrier 2. in, out [64].
__global__ void named_barrier_kernel(Global<const uint32_t> in, Global<uint32_t> out) {
  LK_DYNAMIC_SHARED(shared);
  const auto words = lk::cast<uint32_t>(shared);
  const int t = static_cast<int>(threadIdx.x), pair = t / 64, i = 32 * pair + t % 32;
  if (t / 32 % 2 == 0) {
    words[i] = in[i];
    ptx::barrier_arrive(1 + pair, 64);
  } else {
    ptx::barrier_sync(1 + pair, 64);
    out[i] = words[i ^ 5] + 1;
  }
}
inline int named_barrier(const Buffer* b, const int64_t*) {
  return launch(named_barrier_kernel, 1, 128, 256, 1, global<const uint32_t>(b[0]), global<uint32_t>(b[1]));
}

#if LK_TWINS_ARCH >= 90

// Chunk `chunk` of row `row` of a tile of 128-byte swizzle.
__device__ inline int swizzled_128(int row, int chunk) { return 128 * row + 16 * (chunk ^ row % 8); }

// ---- stmatrix, elect_sync ---------------------------------------------------------------------------------

// Registers [4, 32] -> out [2, 32 rows, 16 bytes]: x4, x4.trans.
__global__ void stmatrix_kernel(Global<const uint32_t> in, Global<uint4> out) {
  LK_DYNAMIC_SHARED(shared);
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = in[32 * i + lane];
  ptx::stmatrix_x4(shared + 16 * lane, r);
  ptx::stmatrix_x4_trans(shared + 512 + 16 * lane, r);
  __syncwarp();
  for (int i = 0; i < 2; ++i) out[32 * i + lane] = lk::cast<const uint4>(shared)[32 * i + (lane + 9) % 32];
}
inline int stmatrix(const Buffer* b, const int64_t*) {
  return launch(stmatrix_kernel, 1, 32, 1024, 1, global<const uint32_t>(b[0]), global<uint4>(b[1]));
}

// out [2, warps]: lanes elected (1), and whether the second election chose the same one (1).
__global__ void elect_kernel(Global<uint32_t> out) {
  const int warp = static_cast<int>(threadIdx.x / 32), warps = static_cast<int>(blockDim.x / 32);
  const uint32_t first = __ballot_sync(0xffffffffu, ptx::elect_sync());
  const bool again = ptx::elect_sync();
  if (again) {
    out[warp] = static_cast<uint32_t>(__popc(first));
    out[warps + warp] = first >> threadIdx.x % 32 & 1;
  }
}
inline int elect(const Buffer* b, const int64_t*) {
  return launch(elect_kernel, 1, static_cast<unsigned>(b[0].bytes / 8 * 32), 0, 1, global<uint32_t>(b[0]));
}

// ---- mbarriers --------------------------------------------------------------------------------------------

// Warp 0 puts rounds of 32 words into a ring of three stages, warps 1 and 2 add them up. in [rounds, 32], out
// [2, 32]. Faults: 1 both lanes and warps arrive at `full`, 2 parity never flips, 3 `full` not initialised, 4
// `empty` counts one warp of the two, 5 arrives before it reads, 6 stores over a barrier.
__global__ void ring_kernel(Global<const uint32_t> in, Global<uint32_t> out, int rounds, int fault) {
  constexpr int kStages = 3;
  LK_DYNAMIC_SHARED(shared);
  const auto full = lk::cast<uint64_t>(shared), empty = full + kStages;
  const auto stages = lk::cast<uint32_t>(shared + 64);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      if (!LK_FAULT(3)) ptx::mbarrier_init(full + i, 1);
      ptx::mbarrier_init(empty + i, LK_FAULT(4) ? 1 : 2);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  uint32_t sum = 0;
  for (int i = 0; i < rounds; ++i) {
    const int stage = i % kStages;
    const uint32_t parity = LK_FAULT(2) ? 0 : i / kStages % 2;
    if (warp == 0) {
      ptx::mbarrier_wait(empty + stage, parity ^ 1);
      stages[32 * stage + lane] = in[32 * i + lane];
      __syncwarp();
      if (lane == 0 || LK_FAULT(1)) ptx::mbarrier_arrive(full + stage);
      if (LK_FAULT(6)) lk::cast<uint32_t>(full)[1] = 0;
    } else {
      ptx::mbarrier_wait(full + stage, parity);
      if (lane == 0 && LK_FAULT(5)) ptx::mbarrier_arrive(empty + stage);
      sum += (i + 1) * stages[32 * stage + lane];
      __syncwarp();
      if (lane == 0 && !LK_FAULT(5)) ptx::mbarrier_arrive(empty + stage);
    }
  }
  if (warp > 0) out[32 * (warp - 1) + lane] = sum;
}
inline int ring(const Buffer* b, const int64_t* numbers) {
  return launch(ring_kernel, 1, 96, 64 + 3 * 128, 1, global<const uint32_t>(b[0]), global<uint32_t>(b[1]),
                static_cast<int>(b[0].bytes / 128), static_cast<int>(numbers[0]));
}

// ---- TMA and bulk copies ----------------------------------------------------------------------------------

// The box at (row, col) of a matrix -> out [box bytes], as it lies in shared memory. Faults: 1 no wait, 2
// fewer bytes expected, 3 more, 4 no fence after init, 5 ends with the copy in flight, 6 over stores not
// fenced.
__global__ void tma_load_kernel(const __grid_constant__ lk::TensorMap map, Global<uint4> out, int bytes,
                                int row, int col, int hint, int fault) {
  LK_DYNAMIC_SHARED(shared);
  const auto barrier = lk::cast<uint64_t>(shared);
  const auto tile = shared + (LK_FAULT(7) ? 0 : 1024);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&map);
    ptx::mbarrier_init(barrier, 1);
    if (!LK_FAULT(4)) ptx::fence_mbarrier_init();
    if (LK_FAULT(6)) lk::cast<uint32_t>(tile)[5] = 1;
    ptx::mbarrier_arrive_expect_tx(barrier, static_cast<uint32_t>(bytes + (LK_FAULT(2)   ? -16
                                                                           : LK_FAULT(3) ? 16
                                                                                         : 0)));
    if (hint == 0) ptx::tma_load_2d(tile, &map, barrier, col, row);
    if (hint == 1) ptx::tma_load_2d_hint(tile, &map, barrier, col, row, ptx::evict_first_policy());
    if (hint == 2) ptx::tma_load_2d_hint(tile, &map, barrier, col, row, ptx::evict_last_policy());
  }
  if (LK_FAULT(5)) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < bytes / 16; ++i) out[i] = make_uint4(0, 0, 0, 0);
    }
    return;
  }
  __syncthreads();
  if (!LK_FAULT(1)) ptx::mbarrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 16; i += 64)
    out[i] = lk::cast<const uint4>(tile)[i];
}

// numbers: element bytes, rows, cols, row stride, box rows, box cols, swizzle, row, col, then the program's
// own.
inline lk::cuda::TileShape tile_shape(const int64_t* numbers) {
  return {static_cast<int>(numbers[0]),
          numbers[1],
          numbers[2],
          numbers[3],
          static_cast<int>(numbers[4]),
          static_cast<int>(numbers[5]),
          static_cast<lk::Swizzle>(numbers[6])};
}
inline int tma_load(const Buffer* b, const int64_t* numbers) {
  lk::TensorMap map;
  const int status = lk::cuda::make_tensor_map_2d(&map, b[0].data, tile_shape(numbers));
  if (status != LK_OK) return status;
  const int bytes = static_cast<int>(b[1].bytes);
  return launch(tma_load_kernel, 1, 64, static_cast<size_t>(1024 + bytes), 1, map, global<uint4>(b[1]), bytes,
                static_cast<int>(numbers[7]), static_cast<int>(numbers[8]), static_cast<int>(numbers[9]),
                static_cast<int>(numbers[10]));
}

// tiles [2, box bytes], as they lie in shared memory -> the boxes at (row, col) and one box below, of a
// matrix that keeps its other elements. Faults: 1 no fence, 2 the second tile overwrites the first before it
// is read, 3 no wait at the end, 4 no commit.
__global__ void tma_store_kernel(const __grid_constant__ lk::TensorMap map, Global<const uint4> tiles,
                                 int bytes, int row, int col, int box_rows, int fault) {
  LK_DYNAMIC_SHARED(shared);
  if (threadIdx.x == 0) {  // the stand-in follows stores from the first mbarrier on
    ptx::mbarrier_init(lk::cast<uint64_t>(shared), 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const auto tile = shared + 1024;
  for (int pass = 0; pass < 2; ++pass) {
    for (int i = static_cast<int>(threadIdx.x); i < bytes / 16; i += 64) {
      lk::cast<uint4>(tile)[i] = tiles[pass * (bytes / 16) + i];
    }
    if (!LK_FAULT(1)) ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
      ptx::tma_store_2d(&map, tile, col, row + pass * box_rows);
      if (!LK_FAULT(4)) ptx::bulk_commit();
      if (!LK_FAULT(3) && (!LK_FAULT(2) || pass == 1)) ptx::bulk_wait_read<0>();
    }
    __syncthreads();
  }
  if (threadIdx.x == 0 && !LK_FAULT(3)) ptx::bulk_wait<0>();
}
inline int tma_store(const Buffer* b, const int64_t* numbers) {
  lk::TensorMap map;
  const int status = lk::cuda::make_tensor_map_2d(&map, b[1].data, tile_shape(numbers));
  if (status != LK_OK) return status;
  const int bytes = static_cast<int>(b[0].bytes / 2);
  return launch(tma_store_kernel, 1, 64, static_cast<size_t>(1024 + bytes), 1, map, global<const uint4>(b[0]),
                bytes, static_cast<int>(numbers[7]), static_cast<int>(numbers[8]),
                static_cast<int>(numbers[4]), static_cast<int>(numbers[9]));
}

// in -> out through two bulk copies that one barrier counts.
__global__ void bulk_load_kernel(Global<const char> in, Global<uint4> out, int bytes) {
  LK_DYNAMIC_SHARED(shared);
  const auto barrier = lk::cast<uint64_t>(shared + bytes);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::bulk_load(shared, in, static_cast<uint32_t>(bytes / 2), barrier);
    ptx::bulk_load_hint(shared + bytes / 2, in + bytes / 2, static_cast<uint32_t>(bytes / 2), barrier,
                        ptx::evict_first_policy());
    ptx::mbarrier_arrive_expect_tx(barrier, static_cast<uint32_t>(bytes));
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 16; i += 64)
    out[i] = lk::cast<const uint4>(shared)[i];
}
inline int bulk_load(const Buffer* b, const int64_t*) {
  const int bytes = static_cast<int>(b[0].bytes);
  return launch(bulk_load_kernel, 1, 64, static_cast<size_t>(bytes) + 8, 1, global<const char>(b[0]),
                global<uint4>(b[1]), bytes);
}

// ---- clusters ---------------------------------------------------------------------------------------------

// Two blocks of a cluster bring one box each to both, then each sends the other's threads a word. matrix [2 *
// 16, 64] 16-bit -> out [2 blocks, 2 * 2048 bytes], words [2, 64]. Faults: 1 no cluster barrier before the
// copies, 2 block 0 ends before the other has read its words, 3 a block waits for half of the bytes.
__global__ void cluster_kernel(const __grid_constant__ lk::TensorMap map, Global<uint4> out,
                               Global<uint32_t> words, int fault) {
  constexpr int kBox = 2048;
  LK_DYNAMIC_SHARED(shared);
  const auto full = lk::cast<uint64_t>(shared), ready = full + 1;
  const auto tiles = shared + 1024;
  const auto mine = lk::cast<uint32_t>(shared + 512);
  const uint32_t rank = ptx::cluster_rank(), other = rank ^ 1;
  const int t = static_cast<int>(threadIdx.x), r = static_cast<int>(rank);
  if (t == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(ready, ptx::cluster_size());
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(full, LK_FAULT(3) ? kBox : 2 * kBox);
  }
  if (!LK_FAULT(1)) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
  if (t == 0) ptx::tma_load_2d_multicast(tiles + r * kBox, &map, full, 0, 16 * r, 3);
  ptx::mbarrier_wait(full, 0);
  for (int i = t; i < 2 * kBox / 16; i += 64) out[r * (2 * kBox / 16) + i] = lk::cast<const uint4>(tiles)[i];

  mine[t] = static_cast<uint32_t>(1000 * r + t);
  __syncthreads();
  if (t < 2) ptx::mbarrier_arrive_remote(ready, static_cast<uint32_t>(t));
  ptx::mbarrier_wait_cluster(ready, 0);
  const auto theirs = ptx::map_shared_rank(mine, other);
  words[64 * r + t] = theirs[t];
  if (LK_FAULT(2)) return;
  ptx::cluster_arrive();
  ptx::cluster_wait();
}
inline int cluster(const Buffer* b, const int64_t* numbers) {
  lk::TensorMap map;
  const int status =
      lk::cuda::make_tensor_map_2d(&map, b[0].data, {2, 32, 64, 64, 16, 64, lk::Swizzle::bytes_128});
  if (status != LK_OK) return status;
  return launch(cluster_kernel, 2, 64, 1024 + 2 * 2048, 2, map, global<uint4>(b[1]), global<uint32_t>(b[2]),
                static_cast<int>(numbers[0]));
}

// ---- reductions -------------------------------------------------------------------------------------------

// Threads of all blocks add rows of values to the same 16 bytes. pairs, quads [threads, 4] float, halves
// [threads, 8] 16-bit; sums inout: [2] float of pairs, [4] float of quads, [8] of halves, [2] of their first
// two.
__global__ void reduce_kernel(Global<const float4> quads, Global<const uint4> halves, Global<float> sums,
                              Global<uint32_t> half_sums, int fp16) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const float4 quad = quads[i];
  const uint4 eight = halves[i];
  ptx::red_add_f32(sums, make_float2(quad.x, quad.y));
  ptx::red_add_f32(sums + 4, quad);
  if (fp16 != 0) {
    ptx::red_add_f16x2(half_sums, eight);
    ptx::red_add_f16x2(half_sums + 4, eight.x);
  } else {
    ptx::red_add_bf16x2(half_sums, eight);
    ptx::red_add_bf16x2(half_sums + 4, eight.x);
  }
}
inline int reduce(const Buffer* b, const int64_t* numbers) {
  return launch(reduce_kernel, static_cast<unsigned>(b[0].bytes / 16 / 32), 32, 0, 1,
                global<const float4>(b[0]), global<const uint4>(b[1]), global<float>(b[2]),
                global<uint32_t>(b[3]), static_cast<int>(numbers[0]));
}
#endif  // LK_TWINS_ARCH >= 90

#if LK_TWINS_ARCH == 90

// ---- wgmma ------------------------------------------------------------------------------------------------

constexpr int kDepth = 64;  // of the products below

// An operand in shared memory: [extent, 64] K-major, or [64, extent] MN-major, as boxes that are one swizzle
// wide (16 bytes without one).
template <lk::Swizzle kSwizzle, bool kTranspose>
struct Tile {
  static constexpr int kWidth = kSwizzle == lk::Swizzle::none ? 16 : static_cast<int>(kSwizzle);  // bytes
  static constexpr int kElements = kWidth / 2;
  static __host__ __device__ constexpr int boxes(int extent) {
    return kTranspose ? (extent + kElements - 1) / kElements : kDepth / kElements;
  }
  static __host__ __device__ constexpr int box_rows(int extent) { return kTranspose ? kDepth : extent; }
  static __host__ __device__ constexpr int box_bytes(int extent) { return box_rows(extent) * kWidth; }
  static __host__ __device__ constexpr int bytes(int extent) { return boxes(extent) * box_bytes(extent); }

  static __device__ void load(Shared<char> to, const lk::TensorMap* map, Shared<uint64_t> barrier,
                              int extent) {
    for (int i = 0; i < boxes(extent); ++i) {
      ptx::tma_load_2d(to + i * box_bytes(extent), map, barrier, i * kElements, 0);
    }
  }
  // Of the 16 columns of k from 16 * slice.
  static __device__ uint64_t descriptor(Shared<char> tile, int extent, int slice) {
    if constexpr (kTranspose) {
      const auto start = tile + slice * 16 * kWidth;
      if constexpr (kSwizzle == lk::Swizzle::none) {
        return ptx::matrix_descriptor<kSwizzle>(start, 128, static_cast<uint32_t>(box_bytes(extent)));
      } else {
        return ptx::mn_major_descriptor<kSwizzle>(start, static_cast<uint32_t>(box_bytes(extent)));
      }
    } else if constexpr (kSwizzle == lk::Swizzle::none) {
      return ptx::matrix_descriptor<kSwizzle>(tile + slice * 2 * box_bytes(extent),
                                              static_cast<uint32_t>(box_bytes(extent)), 128);
    } else {
      constexpr int kSlices = kElements / 16;  // of a box
      const auto box = tile + slice / kSlices * box_bytes(extent);
      return ptx::descriptor_advance(ptx::k_major_descriptor<kSwizzle>(box), slice % kSlices * 32);
    }
  }
};

// d [64, N] = 2 a b + a b, a and b as Tile says; the first product twice, to test `accumulate`.
template <int N, bool kTransposeA, bool kTransposeB, lk::Swizzle kSwizzle, bool kFp16>
__global__ void __launch_bounds__(128)
    wgmma_ss_kernel(const __grid_constant__ lk::TensorMap map_a, const __grid_constant__ lk::TensorMap map_b,
                    Global<float> out) {
  using TileA = Tile<kSwizzle, kTransposeA>;
  using TileB = Tile<kSwizzle, kTransposeB>;
  LK_DYNAMIC_SHARED(shared);
  const auto barrier = lk::cast<uint64_t>(shared);
  const auto a = shared + 1024, b = a + TileA::bytes(64);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, TileA::bytes(64) + TileB::bytes(N));
    TileA::load(a, &map_a, barrier, 64);
    TileB::load(b, &map_b, barrier, N);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  float d[N / 2];
  ptx::wgmma_fence(d);
#pragma unroll
  for (int pass = 0; pass < 3; ++pass) {
#pragma unroll
    for (int slice = 0; slice < kDepth / 16; ++slice) {
      const uint64_t at_a = TileA::descriptor(a, 64, slice), at_b = TileB::descriptor(b, N, slice);
      const bool accumulate = pass == 2 || slice > 0;
      if constexpr (kFp16) {
        ptx::wgmma_ss_f16<N, kTransposeA, kTransposeB>(d, at_a, at_b, accumulate);
      } else {
        ptx::wgmma_ss_bf16<N, kTransposeA, kTransposeB>(d, at_a, at_b, accumulate);
      }
    }
    ptx::wgmma_commit();
    if (pass == 1) {
      ptx::wgmma_wait<0>(d);
      for (float& sum : d) sum *= 2.0f;
      ptx::wgmma_fence(d);
    }
  }
  ptx::wgmma_wait<0>(d);
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  for (int i = 0; i < N / 2; ++i) {
    const int row = 16 * (t / 32) + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    out[row * N + column] = d[i];
  }
}

template <bool kTranspose, lk::Swizzle kSwizzle>
int map_tile(lk::TensorMap* map, void* data, int extent) {
  using T = Tile<kSwizzle, kTranspose>;
  const int64_t rows = kTranspose ? kDepth : extent, cols = kTranspose ? extent : kDepth;
  return lk::cuda::make_tensor_map_2d(map, data,
                                      {2, rows, cols, cols, T::box_rows(extent), T::kElements, kSwizzle});
}

template <int N, bool kTransposeA, bool kTransposeB, lk::Swizzle kSwizzle, bool kFp16>
int launch_wgmma_ss(const Buffer* b) {
  lk::TensorMap map_a, map_b;
  int status = map_tile<kTransposeA, kSwizzle>(&map_a, b[0].data, 64);
  if (status == LK_OK) status = map_tile<kTransposeB, kSwizzle>(&map_b, b[1].data, N);
  if (status != LK_OK) return status;
  constexpr int kBytes =
      1024 + Tile<kSwizzle, kTransposeA>::bytes(64) + Tile<kSwizzle, kTransposeB>::bytes(N);
  return launch(wgmma_ss_kernel<N, kTransposeA, kTransposeB, kSwizzle, kFp16>, 1, 128, kBytes, 1, map_a,
                map_b, global<float>(b[2]));
}

// numbers: N, a transposed, b transposed, swizzle, fp16. Those that tests/twins.py asks for.
inline int wgmma_ss(const Buffer* b, const int64_t* numbers) {
  using enum lk::Swizzle;
  const auto is = [&](int n, bool transpose_a, bool transpose_b, lk::Swizzle swizzle, bool fp16) {
    return numbers[0] == n && numbers[1] == transpose_a && numbers[2] == transpose_b &&
           numbers[3] == static_cast<int>(swizzle) && numbers[4] == fp16;
  };
#define LK_SHAPE(...) \
  if (is(__VA_ARGS__)) return launch_wgmma_ss<__VA_ARGS__>(b)
  LK_SHAPE(8, false, false, bytes_128, false);
  LK_SHAPE(16, false, false, bytes_128, false);
  LK_SHAPE(32, false, false, bytes_128, false);
  LK_SHAPE(64, false, false, bytes_128, false);
  LK_SHAPE(128, false, false, bytes_128, false);
  LK_SHAPE(256, false, false, bytes_128, false);
  LK_SHAPE(64, false, false, bytes_128, true);
  LK_SHAPE(64, true, false, bytes_128, false);
  LK_SHAPE(128, false, true, bytes_128, false);
  LK_SHAPE(256, true, true, bytes_128, false);
  LK_SHAPE(64, true, true, bytes_128, true);
  LK_SHAPE(32, false, false, bytes_64, false);
  LK_SHAPE(64, true, true, bytes_64, false);
  LK_SHAPE(16, false, false, bytes_32, false);
  LK_SHAPE(8, true, true, bytes_32, false);
  LK_SHAPE(32, false, false, none, false);
  LK_SHAPE(16, true, true, none, false);
#undef LK_SHAPE
  return LK_UNSUPPORTED_DTYPE;
}

// d [64, N] = a b with a [64, 64] in registers. Faults: 1 no fence, 2 a's registers reused, 3 no wait, 4 a
// wait that leaves one in flight, 5 no commit, 6 an accumulator touched in flight, 7 a wrong stride, 8
// another swizzle, 9 a fence that does not name a's registers.
template <int N, bool kTransposeB, bool kFp16>
__global__ void __launch_bounds__(128)
    wgmma_rs_kernel(Global<const uint32_t> a, const __grid_constant__ lk::TensorMap map_b, Global<float> out,
                    int fault) {
  using TileB = Tile<lk::Swizzle::bytes_128, kTransposeB>;
  LK_DYNAMIC_SHARED(shared);
  const auto barrier = lk::cast<uint64_t>(shared);
  const auto b = shared + 1024;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, TileB::bytes(N));
    TileB::load(b, &map_b, barrier, N);
  }
  __syncthreads();
  const int t = static_cast<int>(threadIdx.x), lane = t % 32, row = 16 * (t / 32) + lane / 4;
  uint32_t fragments[kDepth / 16][4];
  for (int slice = 0; slice < kDepth / 16; ++slice) {
    for (int i = 0; i < 4; ++i) {
      fragments[slice][i] = a[(row + i % 2 * 8) * (kDepth / 2) + 8 * slice + lane % 4 + i / 2 * 4];
    }
  }
  float d[N / 2];
  for (float& sum : d) sum = 0.0f;
  ptx::mbarrier_wait(barrier, 0);
  if (LK_FAULT(9)) ptx::wgmma_fence(d);
  if (!LK_FAULT(1) && !LK_FAULT(9))
    ptx::wgmma_fence(d, fragments[0], fragments[1], fragments[2], fragments[3]);
  for (int slice = 0; slice < kDepth / 16; ++slice) {
    uint64_t at_b = TileB::descriptor(b, N, slice);
    if (LK_FAULT(7)) at_b += uint64_t{8} << 32;
    if (LK_FAULT(8)) at_b ^= uint64_t{3} << 62;
    if constexpr (kFp16) {
      ptx::wgmma_rs_f16<N, kTransposeB>(d, fragments[slice], at_b, true);
    } else {
      ptx::wgmma_rs_bf16<N, kTransposeB>(d, fragments[slice], at_b, true);
    }
    if (LK_FAULT(2)) fragments[slice][1] ^= 1;
    if (slice == 2) ptx::wgmma_commit();
  }
  if (!LK_FAULT(5)) ptx::wgmma_commit();
  if (LK_FAULT(6)) d[1] = 0.0f;
  if (LK_FAULT(4)) {
    ptx::wgmma_wait<1>(d);
  } else if (!LK_FAULT(3)) {
    ptx::wgmma_wait<0>(d);
  }
  for (int i = 0; i < N / 2; ++i) out[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}

template <int N, bool kTransposeB, bool kFp16>
int launch_wgmma_rs(const Buffer* b, int fault) {
  lk::TensorMap map;
  const int status = map_tile<kTransposeB, lk::Swizzle::bytes_128>(&map, b[1].data, N);
  if (status != LK_OK) return status;
  return launch(wgmma_rs_kernel<N, kTransposeB, kFp16>, 1, 128,
                1024 + Tile<lk::Swizzle::bytes_128, kTransposeB>::bytes(N), 1, global<const uint32_t>(b[0]),
                map, global<float>(b[2]), fault);
}

// numbers: N, b transposed, fp16, fault.
inline int wgmma_rs(const Buffer* b, const int64_t* numbers) {
  const auto is = [&](int n, bool transpose_b, bool fp16) {
    return numbers[0] == n && numbers[1] == transpose_b && numbers[2] == fp16;
  };
#define LK_SHAPE(...) \
  if (is(__VA_ARGS__)) return launch_wgmma_rs<__VA_ARGS__>(b, static_cast<int>(numbers[3]))
  LK_SHAPE(8, false, false);
  LK_SHAPE(16, false, false);
  LK_SHAPE(32, false, false);
  LK_SHAPE(64, false, false);
  LK_SHAPE(128, false, false);
  LK_SHAPE(256, false, false);
  LK_SHAPE(32, false, true);
  LK_SHAPE(128, true, false);
  LK_SHAPE(64, true, true);
#undef LK_SHAPE
  return LK_UNSUPPORTED_DTYPE;
}

// ---- all of it together -----------------------------------------------------------------------------------

// out [M, N] bf16 = a [M, K] b [N, K]ᵀ bf16, tiles of 64 x 64: a producer warpgroup of which one thread
// works, a ring of stages, a consumer warpgroup that releases a stage when the next one's products are under
// way, and an epilogue through stmatrix and TMA. Faults: 1 a stage is released before its products are waited
// for, 2 by one warp for all, 3 not at all, 4 no fence before the TMA store, 5 no barrier before it, 6 no
// wait for it, 7 the parity never flips, 8 the producer does not wait for empty stages, 9 the consumer does
// not wait for full ones, 10 a row too far.
constexpr int kPipelineStages = 3, kStageBytes = 2 * 64 * 128;
__global__ void __launch_bounds__(256, 1)
    pipeline_kernel(const __grid_constant__ lk::TensorMap map_a, const __grid_constant__ lk::TensorMap map_b,
                    const __grid_constant__ lk::TensorMap map_out, int columns, int depth, int fault) {
  constexpr int kTile = 64, kTileBytes = kTile * 128;
  LK_DYNAMIC_SHARED(shared);
  const auto staging = shared + kPipelineStages * kStageBytes;
  const auto full = lk::cast<uint64_t>(staging + kTileBytes), empty = full + kPipelineStages;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int column_tiles = (columns + kTile - 1) / kTile;
  const int row = static_cast<int>(blockIdx.x) / column_tiles * kTile + (LK_FAULT(10) ? 1 : 0);
  const int column = static_cast<int>(blockIdx.x) % column_tiles * kTile;
  const int steps = (depth + kTile - 1) / kTile;
  ptx::grid_dependency_wait();
  if (warp == 0 && ptx::elect_sync()) {
    for (int i = 0; i < kPipelineStages; ++i) {
      ptx::mbarrier_init(full + i, 1);
      ptx::mbarrier_init(empty + i, LK_FAULT(2) ? 1 : 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (warp >= 4) {
    ptx::set_max_registers_down<40>();
    if (warp > 4 || !ptx::elect_sync()) return;
    for (int i = 0; i < steps; ++i) {
      const int stage = i % kPipelineStages;
      const auto to = shared + stage * kStageBytes;
      if (!LK_FAULT(8)) ptx::mbarrier_wait(empty + stage, LK_FAULT(7) ? 1 : i / kPipelineStages % 2 ^ 1);
      ptx::mbarrier_arrive_expect_tx(full + stage, kStageBytes);
      ptx::tma_load_2d(to, &map_a, full + stage, i * kTile, row);
      ptx::tma_load_2d_hint(to + kTileBytes, &map_b, full + stage, i * kTile, column,
                            ptx::evict_last_policy());
    }
    return;
  }

  ptx::set_max_registers_up<232>();
  float d[kTile / 2];
  for (int i = 0; i < steps; ++i) {
    const int stage = i % kPipelineStages;
    const auto from = shared + stage * kStageBytes;
    if (!LK_FAULT(9)) ptx::mbarrier_wait(full + stage, LK_FAULT(7) ? 0 : i / kPipelineStages % 2);
    const uint64_t a = ptx::k_major_descriptor(from), b = ptx::k_major_descriptor(from + kTileBytes);
    ptx::wgmma_fence(d);
    for (int slice = 0; slice < kTile / 16; ++slice) {
      ptx::wgmma_ss_bf16<kTile>(d, ptx::descriptor_advance(a, 32 * slice),
                                ptx::descriptor_advance(b, 32 * slice), i > 0 || slice > 0);
    }
    ptx::wgmma_commit();
    if (LK_FAULT(1)) {
      if (lane == 0) ptx::mbarrier_arrive(empty + stage);
      continue;
    }
    ptx::wgmma_wait<1>();
    const bool releases = LK_FAULT(2) ? threadIdx.x == 0 : lane == 0 && !LK_FAULT(3);
    if (i > 0 && releases) ptx::mbarrier_arrive(empty + (i - 1) % kPipelineStages);
  }
  ptx::wgmma_wait<0>(d);
  ptx::grid_launch_dependents();

  // Lane l gives the row of matrix l / 8: 16 x 16 elements at a time, rows of 128 swizzled bytes.
  for (int i = 0; i < kTile / 16; ++i) {
    uint32_t r[4];
    for (int j = 0; j < 4; ++j) r[j] = ptx::cvt_rn_bf16x2(d[8 * i + 2 * j], d[8 * i + 2 * j + 1]);
    const int tile_row = 16 * warp + lane % 16;
    ptx::stmatrix_x4(staging + swizzled_128(tile_row, 2 * i + lane / 16), r);
  }
  if (!LK_FAULT(4)) ptx::fence_proxy_async();
  if (!LK_FAULT(5)) ptx::barrier_sync(1, 128);
  if (warp == 0 && ptx::elect_sync()) {
    ptx::tma_store_2d(&map_out, staging, column, row);
    ptx::bulk_commit();
    if (!LK_FAULT(6)) ptx::bulk_wait_read<0>();
  }
}

// numbers: M, N, K, fault.
inline int pipeline(const Buffer* b, const int64_t* numbers) {
  const int64_t m = numbers[0], n = numbers[1], k = numbers[2];
  lk::TensorMap map_a, map_b, map_out;
  int status = lk::cuda::make_tensor_map_2d(&map_a, b[0].data, {2, m, k, k, 64, 64});
  if (status == LK_OK) status = lk::cuda::make_tensor_map_2d(&map_b, b[1].data, {2, n, k, k, 64, 64});
  if (status == LK_OK) status = lk::cuda::make_tensor_map_2d(&map_out, b[2].data, {2, m, n, n, 64, 64});
  if (status != LK_OK) return status;
  const auto blocks = static_cast<unsigned>((m + 63) / 64 * ((n + 63) / 64));
  return launch(pipeline_kernel, blocks, 256, kPipelineStages * kStageBytes + 64 * 128 + 64, 1, map_a, map_b,
                map_out, static_cast<int>(n), static_cast<int>(k), static_cast<int>(numbers[3]));
}
#endif  // LK_TWINS_ARCH == 90

struct Program {
  const char* name;
  int (*run)(const Buffer*, const int64_t*);
};
inline constexpr Program kPrograms[] = {
    {"convert", convert},
    {"prmt", prmt},
    {"mul_wide", mul_wide},
    {"stream", stream},
    {"last_block", last_block},
    {"cp_async", cp_async},
    {"ldmatrix", ldmatrix},
    {"mma", mma},
    {"named_barrier", named_barrier},
#if LK_TWINS_ARCH >= 90
    {"stmatrix", stmatrix},
    {"elect", elect},
    {"ring", ring},
    {"tma_load", tma_load},
    {"tma_store", tma_store},
    {"bulk_load", bulk_load},
    {"cluster", cluster},
    {"reduce", reduce},
#endif
#if LK_TWINS_ARCH == 90
    {"wgmma_ss", wgmma_ss},
    {"wgmma_rs", wgmma_rs},
    {"pipeline", pipeline},
#endif
};

}  // namespace twins
