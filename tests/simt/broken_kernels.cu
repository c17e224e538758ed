// Kernels that are wrong on purpose, each beside its right form: the stand-in must stop or contradict every
// wrong one within 100 seeds, and pass every right one for all of them. Compiled for the host only.
//
//   broken_kernels [SEEDS]      prints a line a kernel; exit status 1 where one is not caught, or a right one
//   fails
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>

#include "../../csrc/cuda/tensor_map.cuh"
#include "../../csrc/cuda/tile.cuh"
#include "problems.h"

namespace {

using namespace lk;
using problems::Buffer;
using problems::Rng;
using problems::Wrong;
using simt::Use;

enum class Bug {
  none,
  missing_syncthreads,
  missing_wait_group,
  wait_group_one_too_lax,
  stage_reused_too_early,
  off_by_one_tile,
  missing_tail_mask,
  missing_commit,
  wrong_swizzle,
  misaligned_row,
  missing_named_barrier,
  race_between_two_warps,
  barrier_of_too_few,
  shuffle_outside_the_mask,
  divergent_collective,
  missing_grid_flag,
  sums_after_the_flag,
  counter_not_reset,
  missing_phase_flip,
  missing_expected_bytes,
  too_many_arrivals,
  wrong_descriptor_stride,
  missing_wgmma_fence,
  missing_wgmma_wait,
  stage_released_too_early,
  missing_init_fence,
  missing_proxy_fence,
  missing_bulk_wait,
  missing_cluster_wait,
  leaves_cluster_too_early,
};

// ---- a block's cp.async ring: out[block] = sum of 1024 of n floats
// -----------------------------------------

constexpr int kTileFloats = 256, kTiles = 4, kStages = 3, kPipelineThreads = 64;

template <Bug kBug>
__global__ void pipeline(Global<const float> x, int64_t n, Global<float> out) {
  LK_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first = blockIdx.x * int64_t{kTileFloats} * kTiles;
  const auto tile = [&](int step) { return shared + step % kStages * kTileFloats * 4; };
  const auto start = [&](int step, int into) {
    if (step < kTiles + (kBug == Bug::off_by_one_tile ? 1 : 0)) {
      const int64_t at = first + step * kTileFloats + 4 * thread;
      const int64_t left = n - at;
      int valid = left >= 4 ? 16 : left > 0 ? static_cast<int>(4 * left) : 0;
      if (kBug == Bug::missing_tail_mask) valid = 16;
      ptx::cp_async<16>(tile(into) + 16 * thread, x + (valid > 0 ? at : 0), valid);
    }
    if (kBug != Bug::missing_commit) ptx::cp_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) start(step, step);
  float sum = 0;
  for (int step = 0; step < kTiles + (kBug == Bug::off_by_one_tile ? 1 : 0); ++step) {
    if (kBug == Bug::wait_group_one_too_lax) {
      ptx::cp_async_wait<kStages - 1>();
    } else if (kBug != Bug::missing_wait_group) {
      ptx::cp_async_wait<kStages - 2>();
    }
    if (kBug != Bug::missing_syncthreads) __syncthreads();
    start(step + kStages - 1, step + kStages - (kBug == Bug::stage_reused_too_early ? 0 : 1));
    const Shared<float> numbers = cast<float>(tile(step));
    for (int i = 0; i < 4; ++i) sum += numbers[(4 * thread + 4 * 17 + i) % kTileFloats];  // of another thread
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  __syncthreads();
  if (thread % 32 == 0) cast<float>(shared)[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) out[blockIdx.x] = cast<float>(shared)[0] + cast<float>(shared)[1];
}

template <Bug kBug>
void run_pipeline(Rng& rng) {
  const int64_t n = problems::between(rng, 1, 3 * kTileFloats * kTiles), per_block = kTileFloats * kTiles;
  const auto blocks = static_cast<unsigned>((n + per_block - 1) / per_block);
  Buffer<float> x(n), out(blocks);
  for (size_t i = 0; i < x.size; ++i) x[i] = static_cast<float>(problems::between(rng, -8, 8));
  problems::Memory memory;
  x.use("x", Use::input), out.use("out", Use::output);
  problems::check_status(cuda::launch("pipeline", pipeline<kBug>,
                                      {blocks, 1, 1, kPipelineThreads, kStages * kTileFloats * 4}, nullptr,
                                      Global<const float>(x.get()), n, Global<float>(out.get())));
  for (unsigned b = 0; b < blocks; ++b) {
    float want = 0;
    for (int64_t i = b * per_block; i < std::min(n, (b + 1) * per_block); ++i) want += x[i];
    if (out[b] != want) throw Wrong("pipeline: wrong sum");
  }
}

// ---- ldmatrix and mma: out [16, 8] = a [16, 64] · b [8, 64]ᵀ
// ------------------------------------------------

template <Bug kBug>
__global__ void matrix(Global<const uint16_t> a, Global<const uint16_t> b, Global<float> out) {
  LK_DYNAMIC_SHARED(shared);  // a, then b: rows of 128 bytes, 16-byte chunks swizzled
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 24 * 8; i += 32) {
    const int row = i / 8, chunk = i % 8;
    const Global<const uint16_t> from = row < 16 ? a + row * 64 : b + (row - 16) * 64;
    ptx::cp_async<16>(shared + row * 128 + 16 * swizzled(row, chunk), from + 8 * chunk);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  float d[4] = {0, 0, 0, 0};
  for (int k = 0; k < 4; ++k) {
    uint32_t left[4], right[2];
    const int row = lane % 16, chunk = 2 * k + lane / 16;
    int place = 16 * (kBug == Bug::wrong_swizzle ? chunk : swizzled(row, chunk));
    if (kBug == Bug::misaligned_row) place ^= 8;
    ptx::ldmatrix_x4(left, shared + row * 128 + place);
    const int column = lane % 8, half = 2 * k + lane / 8 % 2;
    ptx::ldmatrix_x2(right, shared + (16 + column) * 128 + 16 * swizzled(16 + column, half));
    ptx::mma_bf16(d, left, right);
  }
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

template <Bug kBug>
void run_matrix(Rng& rng) {
  Buffer<uint16_t> a(16 * 64), b(8 * 64);
  Buffer<float> out(16 * 8);
  for (auto* buffer : {&a, &b}) {
    for (size_t i = 0; i < buffer->size; ++i) {
      (*buffer)[i] = ptx::cvt_rn_bf16(static_cast<float>(problems::between(rng, -4, 4)));
    }
  }
  problems::Memory memory;
  a.use("a", Use::input), b.use("b", Use::input), out.use("out", Use::output);
  problems::check_status(cuda::launch("matrix", matrix<kBug>, {1, 1, 1, 32, 24 * 128}, nullptr,
                                      Global<const uint16_t>(a.get()), Global<const uint16_t>(b.get()),
                                      Global<float>(out.get())));
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float want = 0;
      for (int k = 0; k < 64; ++k) want += ptx::from_bf16(a[i * 64 + k]) * ptx::from_bf16(b[j * 64 + k]);
      if (out[i * 8 + j] != want) throw Wrong("matrix: wrong product");
    }
  }
}

// ---- two warps and named barriers: out[i] = 2 x[i], handed over through one buffer
// -------------------------

template <Bug kBug>
__global__ void hand_over(Global<const int> x, int rounds, Global<int> out) {
  LK_DYNAMIC_SHARED(shared);
  const Shared<int> buffer = cast<int>(shared);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int round = 0; round < rounds; ++round) {
    if (warp == 0) {
      if (round > 0 && kBug != Bug::race_between_two_warps) ptx::barrier_sync(2, 64);  // it is empty
      buffer[lane] = 2 * x[round * 32 + lane];
      ptx::barrier_arrive(1, 64);
    } else {
      if (kBug != Bug::missing_named_barrier) ptx::barrier_sync(1, kBug == Bug::barrier_of_too_few ? 32 : 64);
      out[round * 32 + 31 - lane] = buffer[31 - lane];
      if (round + 1 < rounds && kBug != Bug::race_between_two_warps) ptx::barrier_arrive(2, 64);
    }
  }
}

template <Bug kBug>
void run_hand_over(Rng& rng) {
  const int rounds = static_cast<int>(problems::between(rng, 2, 5));
  Buffer<int> x(rounds * 32), out(rounds * 32);
  for (size_t i = 0; i < x.size; ++i) x[i] = static_cast<int>(i) + 1;
  problems::Memory memory;
  x.use("x", Use::input), out.use("out", Use::output);
  problems::check_status(cuda::launch("hand_over", hand_over<kBug>, {1, 1, 1, 64, 128}, nullptr,
                                      Global<const int>(x.get()), rounds, Global<int>(out.get())));
  for (size_t i = 0; i < x.size; ++i) {
    if (out[i] != 2 * x[i]) throw Wrong("hand_over: wrong element");
  }
}

// ---- warp collectives: out[i] = sum of the n first of 32
// ---------------------------------------------------

template <Bug kBug>
__global__ void warp_sum(Global<const int> x, int n, Global<int> out) {
  const int lane = static_cast<int>(threadIdx.x);
  const uint32_t mask = n == 32 ? 0xffffffffu : (1u << n) - 1;
  if (kBug == Bug::divergent_collective) {
    const bool any = lane % 2 == 0 ? __any_sync(0xffffffffu, true) : __ballot_sync(0xffffffffu, true) != 0;
    out[lane] = any;
    return;
  }
  int sum = 0;
  if (lane < n) {
    const int mine = x[lane];
    for (int source = 0; source < (kBug == Bug::shuffle_outside_the_mask ? 32 : n); ++source) {
      sum += __shfl_sync(mask, mine, source);
    }
  }
  out[lane] = sum;
}

template <Bug kBug>
void run_warp_sum(Rng& rng) {
  const int n = static_cast<int>(problems::between(rng, 1, 31));
  Buffer<int> x(32), out(32);
  int want = 0;
  for (int i = 0; i < 32; ++i) want += i < n ? x[i] = i * i : (x[i] = 0);
  problems::Memory memory;
  x.use("x", Use::input), out.use("out", Use::output);
  problems::check_status(cuda::launch("warp_sum", warp_sum<kBug>, {1, 1, 1, 32}, nullptr,
                                      Global<const int>(x.get()), n, Global<int>(out.get())));
  for (int i = 0; i < n; ++i) {
    if (out[i] != want) throw Wrong("warp_sum: wrong sum");
  }
}

// ---- a grid that meets at a counter: out = sum of the blocks' sums, twice in a row
// -------------------------

template <Bug kBug>
__global__ void grid_sum(Global<const int> x, Global<int> parts, Global<uint32_t> counter, Global<int> out) {
  LK_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const Shared<uint32_t> last = cast<uint32_t>(shared);
  if (kBug != Bug::sums_after_the_flag) parts[blockIdx.x * 32 + thread] = x[blockIdx.x * 32 + thread];
  __syncthreads();
  if (thread == 0) last[0] = ptx::atomic_add_acq_rel(counter, 1) + 1 == gridDim.x;
  __syncthreads();
  if (kBug == Bug::sums_after_the_flag) parts[blockIdx.x * 32 + thread] = x[blockIdx.x * 32 + thread];
  if (kBug == Bug::missing_grid_flag ? blockIdx.x != 0 : last[0] == 0) return;
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b * 32 + thread];
  out[thread] = sum;
  if (thread == 0 && kBug != Bug::counter_not_reset) counter[0] = 0;
}

template <Bug kBug>
void run_grid_sum(Rng& rng) {
  const auto blocks = static_cast<unsigned>(problems::between(rng, 2, 6));
  Buffer<int> x(32 * blocks), parts(32 * blocks), out(32);
  Buffer<uint32_t> counter(1);
  for (int launch = 0; launch < 2; ++launch) {
    for (size_t i = 0; i < x.size; ++i) x[i] = static_cast<int>(problems::between(rng, 1, 100));
    problems::Memory memory;
    x.use("x", Use::input), parts.use("workspace", Use::output), counter.use("counter", Use::inout);
    out.use("out", Use::output);
    problems::check_status(cuda::launch("grid_sum", grid_sum<kBug>, {blocks, 1, 1, 32, 16}, nullptr,
                                        Global<const int>(x.get()), Global<int>(parts.get()),
                                        Global<uint32_t>(counter.get()), Global<int>(out.get())));
    simt::check_outputs_written();
    for (int i = 0; i < 32; ++i) {
      int want = 0;
      for (unsigned b = 0; b < blocks; ++b) want += x[b * 32 + i];
      if (out[i] != want) throw Wrong("grid_sum: wrong sum");
    }
  }
}

// ---- TMA, mbarriers and wgmma: y [64, 64] = a [64, K] · b [64, K]ᵀ; then out through TMA
// --------------------

constexpr int kGemmStages = 2, kStageBytes = 2 * 64 * 128,
              kGemmThreads = 160;  // a warpgroup, and a warp that loads

template <Bug kBug>
__global__ void gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                     const __grid_constant__ TensorMap y, int steps) {
  LK_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const Shared<uint64_t> full = cast<uint64_t>(shared + kGemmStages * kStageBytes),
                         empty = full + kGemmStages;
  if (thread == 0) {
    for (int s = 0; s < kGemmStages; ++s) ptx::mbarrier_init(full + s, 1), ptx::mbarrier_init(empty + s, 4);
    if (kBug != Bug::missing_init_fence) ptx::fence_mbarrier_init();
  }
  __syncthreads();
  Ring<kGemmStages> ring;
  if (warp == 4) {
    if (lane == 0) {
      for (int step = 0; step < steps; ++step, ring.next()) {
        ptx::mbarrier_wait(empty + ring.stage, kBug == Bug::missing_phase_flip ? 1 : ring.phase ^ 1);
        const Shared<char> stage = shared + ring.stage * kStageBytes;
        if (kBug == Bug::missing_expected_bytes) {
          ptx::mbarrier_arrive(full + ring.stage);
        } else {
          ptx::mbarrier_arrive_expect_tx(full + ring.stage, kStageBytes);
        }
        ptx::tma_load_2d(stage, &a, full + ring.stage, 64 * step, 0);
        ptx::tma_load_2d(stage + kStageBytes / 2, &b, full + ring.stage, 64 * step, 0);
      }
    }
    return;
  }
  float d[32];
  for (float& sum : d) sum = 0;
  for (int step = 0; step < steps; ++step, ring.next()) {
    ptx::mbarrier_wait(full + ring.stage, ring.phase);
    if (kBug != Bug::missing_wgmma_fence) ptx::wgmma_fence(d);
    const Shared<char> stage = shared + ring.stage * kStageBytes;
    for (int k = 0; k < 4; ++k) {
      const uint64_t left = ptx::k_major_descriptor<Swizzle::bytes_128>(stage);
      const uint64_t right =
          kBug == Bug::wrong_descriptor_stride
              ? ptx::matrix_descriptor<Swizzle::bytes_128>(stage + kStageBytes / 2, 16, 512)
              : ptx::k_major_descriptor<Swizzle::bytes_128>(stage + kStageBytes / 2);
      ptx::wgmma_ss_bf16<64>(d, ptx::descriptor_advance(left, 32 * k), ptx::descriptor_advance(right, 32 * k),
                             true);
    }
    ptx::wgmma_commit();
    if (kBug == Bug::stage_released_too_early && lane == 0) ptx::mbarrier_arrive(empty + ring.stage);
    if (kBug != Bug::missing_wgmma_wait) ptx::wgmma_wait<0>(d);
    if (kBug != Bug::stage_released_too_early && lane == 0) ptx::mbarrier_arrive(empty + ring.stage);
    if (kBug == Bug::too_many_arrivals && lane == 1) ptx::mbarrier_arrive(empty + ring.stage);
  }
  ptx::barrier_sync(1, 128);  // every warp is done with the stages: the first one takes y
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 32; ++i) {
    const int row = 16 * warp + g + i / 2 % 2 * 8, col = i / 4 * 8 + 2 * t + i % 2;
    cast<float>(shared)[row * 64 + col] = d[i];
  }
  if (kBug != Bug::missing_proxy_fence) ptx::fence_proxy_async();
  ptx::barrier_sync(1, 128);
  if (thread == 0) {
    ptx::tma_store_2d(&y, shared, 0, 0);
    ptx::bulk_commit();
    if (kBug != Bug::missing_bulk_wait) ptx::bulk_wait<0>();
  }
}

template <Bug kBug>
void run_gemm(Rng& rng) {
  const int steps = static_cast<int>(problems::between(rng, 3, 6)), k = 64 * steps;
  Buffer<uint16_t> storage_a(64 * k + 64), storage_b(64 * k + 64);
  Buffer<float> storage_y(64 * 64 + 32);
  // TMA wants 16-byte aligned matrices, which new[] of 16-bit elements does not promise.
  const auto aligned = [](auto* p) {
    return reinterpret_cast<std::remove_reference_t<decltype(p)>>((reinterpret_cast<uintptr_t>(p) + 127) /
                                                                  128 * 128);
  };
  uint16_t *a = aligned(storage_a.get()), *b = aligned(storage_b.get());
  float* y = aligned(storage_y.get());
  for (int i = 0; i < 64 * k; ++i) {
    a[i] = ptx::cvt_rn_bf16(static_cast<float>(problems::between(rng, -3, 3)));
    b[i] = ptx::cvt_rn_bf16(static_cast<float>(problems::between(rng, -3, 3)));
  }
  problems::Memory memory;
  simt::add_memory("a", a, 64 * k * 2, Use::input), simt::add_memory("b", b, 64 * k * 2, Use::input);
  simt::add_memory("y", y, 64 * 64 * 4, Use::output);
  TensorMap a_map, b_map, y_map;
  problems::check_status(cuda::make_tensor_map_2d(&a_map, a, {2, 64, k, k, 64, 64}));
  problems::check_status(cuda::make_tensor_map_2d(&b_map, b, {2, 64, k, k, 64, 64}));
  problems::check_status(cuda::make_tensor_map_2d(&y_map, y, {4, 64, 64, 64, 64, 64, Swizzle::none}));
  problems::check_status(cuda::launch(
      "gemm", gemm<kBug>, {1, 1, 1, kGemmThreads, kGemmStages * (kStageBytes + 2 * sizeof(uint64_t))},
      nullptr, a_map, b_map, y_map, steps));
  simt::check_outputs_written();
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < 64; ++j) {
      float want = 0;
      for (int c = 0; c < k; ++c) want += ptx::from_bf16(a[i * k + c]) * ptx::from_bf16(b[j * k + c]);
      if (y[i * 64 + j] != want) throw Wrong("gemm: wrong product");
    }
  }
}

// ---- a cluster: out[i] = sum over the blocks of their i-th number, read from one another's shared memory
// ----

template <Bug kBug>
__global__ void cluster_sum(Global<const int> x, Global<int> out) {
  LK_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  cast<int>(shared)[thread] = x[blockIdx.x * 32 + thread];
  ptx::cluster_arrive();
  if (kBug != Bug::missing_cluster_wait) ptx::cluster_wait();
  int sum = 0;
  for (uint32_t rank = 0; rank < ptx::cluster_size(); ++rank) {
    sum += cast<int>(ptx::map_shared_rank(shared, rank))[thread];
  }
  out[blockIdx.x * 32 + thread] = sum;
  if (kBug == Bug::missing_cluster_wait) ptx::cluster_wait();
  if (kBug == Bug::leaves_cluster_too_early) return;
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

template <Bug kBug>
void run_cluster_sum(Rng& rng) {
  const unsigned blocks = 2u << problems::between(rng, 0, 2);
  Buffer<int> x(32 * blocks), out(32 * blocks);
  for (size_t i = 0; i < x.size; ++i) x[i] = static_cast<int>(i * i % 37);
  problems::Memory memory;
  x.use("x", Use::input), out.use("out", Use::output);
  problems::check_status(cuda::launch("cluster_sum", cluster_sum<kBug>, {blocks, 1, 1, 32, 128, blocks},
                                      nullptr, Global<const int>(x.get()), Global<int>(out.get())));
  for (size_t i = 0; i < out.size; ++i) {
    int want = 0;
    for (unsigned b = 0; b < blocks; ++b) want += x[b * 32 + i % 32];
    if (out[i] != want) throw Wrong("cluster_sum: wrong sum");
  }
}

// ---- all of them
// -------------------------------------------------------------------------------------------

#define LK_BROKEN(run, bug) {#bug " in " #run, run<Bug::bug>}
const std::vector<problems::Problem> kBroken = {
    LK_BROKEN(run_pipeline, missing_syncthreads),
    LK_BROKEN(run_pipeline, missing_wait_group),
    LK_BROKEN(run_pipeline, wait_group_one_too_lax),
    LK_BROKEN(run_pipeline, stage_reused_too_early),
    LK_BROKEN(run_pipeline, off_by_one_tile),
    LK_BROKEN(run_pipeline, missing_tail_mask),
    LK_BROKEN(run_pipeline, missing_commit),
    LK_BROKEN(run_matrix, wrong_swizzle),
    LK_BROKEN(run_matrix, misaligned_row),
    LK_BROKEN(run_hand_over, missing_named_barrier),
    LK_BROKEN(run_hand_over, race_between_two_warps),
    LK_BROKEN(run_hand_over, barrier_of_too_few),
    LK_BROKEN(run_warp_sum, shuffle_outside_the_mask),
    LK_BROKEN(run_warp_sum, divergent_collective),
    LK_BROKEN(run_grid_sum, missing_grid_flag),
    LK_BROKEN(run_grid_sum, sums_after_the_flag),
    LK_BROKEN(run_grid_sum, counter_not_reset),
    LK_BROKEN(run_gemm, missing_phase_flip),
    LK_BROKEN(run_gemm, missing_expected_bytes),
    LK_BROKEN(run_gemm, too_many_arrivals),
    LK_BROKEN(run_gemm, wrong_descriptor_stride),
    LK_BROKEN(run_gemm, missing_wgmma_fence),
    LK_BROKEN(run_gemm, missing_wgmma_wait),
    LK_BROKEN(run_gemm, stage_released_too_early),
    LK_BROKEN(run_gemm, missing_init_fence),
    LK_BROKEN(run_gemm, missing_proxy_fence),
    LK_BROKEN(run_gemm, missing_bulk_wait),
    LK_BROKEN(run_cluster_sum, missing_cluster_wait),
    LK_BROKEN(run_cluster_sum, leaves_cluster_too_early),
};
const std::vector<problems::Problem> kRight = {
    LK_BROKEN(run_pipeline, none),    LK_BROKEN(run_matrix, none),   LK_BROKEN(run_hand_over, none),
    LK_BROKEN(run_warp_sum, none),    LK_BROKEN(run_grid_sum, none), LK_BROKEN(run_gemm, none),
    LK_BROKEN(run_cluster_sum, none),
};

}  // namespace

int main(int count, char** arguments) {
  const uint64_t seeds = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 100;
  int missed = 0, failed = 0;
  for (const auto& problem : kRight) failed += !problems::passes(problem, 1, seeds, true);
  for (const auto& problem : kBroken) {
    if (problems::passes(problem, 1, seeds, false)) {
      std::printf("%s: NOT CAUGHT in %llu seeds\n", problem.name, static_cast<unsigned long long>(seeds));
      ++missed;
    } else {
      problems::passes(problem, 1, seeds, true);  // its message
    }
  }
  std::printf("%zu broken kernels, %d not caught; %zu right ones, %d failed\n", kBroken.size(), missed,
              kRight.size(), failed);
  return missed + failed > 0 ? 1 : 0;
}
