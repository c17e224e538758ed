// lora_shrink: h [T, r] = s·dropout(x)·Aᵀ, of one adapter or of several, each of whose rows are its own. The
// mask is drawn on the tile in shared memory: x is read once and nothing of its size is written.
//
//                 K, cut into slices
//            ┌──────────┬──────────┬───
//     64     │ 128 ▒    │          │        a block: 64 rows of one adapter, one slice of K, up to 64 ranks
//     rows   │     ▒    │          │        ▒ a stage: [64][128] of x, [8·kRankTiles][128] of A
//            └──────────┴──────────┴───     a warp: 16 of the rows (m16), every rank (n8 tiles)
//
// Slices meet in fp32 partial sums, which the last block of a tile adds in their order (last_to_arrive).
//
// Bytes: x once (for each 64 ranks), A once per 64 rows, from L2. Floor: the bytes of x over the bandwidth;
// the mask costs 17 instructions an element (sm_90a), about as long as reading x takes.
#include "lora_linear.cuh"
#include "low_rank.cuh"

namespace lk::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kStages = 3;
constexpr int kMostSlices = 32;

struct Problem {
  Rows rows;
  Matrix x;
  int64_t k;
  Matrix A[kMostAdapters];  // [r, K] each
  int rank[kMostAdapters];
  float scale[kMostAdapters];
  Dropout dropout;
  Global<uint16_t> h;  // [T, h_stride]
  int64_t h_stride;
  Global<float> partial;      // [tile][chunk][slice][64][8·kRankTiles]
  Global<uint32_t> counters;  // [tile][chunk], zero between launches
  int64_t slice_k;
  int slices, chunks;
};

template <int kRankTiles>
struct Shape {
  static constexpr int kRanks = 8 * kRankTiles;
  static constexpr int kStageBytes = kTileBytes + kRanks * 256;
  static constexpr int kBytes = kStages * kStageBytes;
};

template <int kDtype, int kRankTiles>
__global__ void __launch_bounds__(kThreads, 2) lora_shrink(const __grid_constant__ Problem p) {
  LK_DYNAMIC_SHARED(shared);
  using S = Shape<kRankTiles>;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int slice = static_cast<int>(blockIdx.x) % p.slices;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) / p.slices;  // tile and chunk of ranks
  const RowTile tile = row_tile(p.rows, unit / p.chunks, lane);
  const int first_rank = static_cast<int>(unit % p.chunks) * S::kRanks;
  const int ranks = clamped(p.rank[tile.adapter] - first_rank, S::kRanks);
  if (tile.count == 0 || ranks == 0) return;  // so do all blocks of this tile and chunk
  const Matrix& A = p.A[tile.adapter];
  const int64_t col0 = slice * p.slice_k, col_end = p.k < col0 + p.slice_k ? p.k : col0 + p.slice_k;
  const int steps = static_cast<int>((col_end - col0 + kTileCols - 1) / kTileCols);
  const bool dropout = p.dropout.rng != nullptr;
  const Mask mask(p.dropout);

  const Rows successive{};  // those of A

  const auto stage = [&](int step) { return shared + step % kStages * S::kStageBytes; };
  const auto start = [&](int step) {
    if (step < steps) {
      const int64_t col = col0 + int64_t{step} * kTileCols;
      start_tile<kDtype, kThreads>(stage(step), p.x, p.rows, tile.begin, tile.count, col, col_end, thread);
      start_tile<kDtype, kThreads, S::kRanks>(stage(step) + kTileBytes, A, successive, first_rank, ranks, col,
                                              col_end, thread);
    }
    ptx::cp_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) start(step);

  float acc[kRankTiles][4] = {};
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    if (dropout) {
      const int64_t col = col0 + int64_t{step} * kTileCols;
      mask_tile<kThreads>(stage(step), mask, p.rows, tile.begin, tile.count, col, col_end, p.k, thread);
    }
    __syncthreads();  // the stage is there, and the one that is filled next has been read
    start(step + kStages - 1);
    const Shared<const char> x = stage(step), right = stage(step) + kTileBytes;
#pragma unroll
    for (int s = 0; s < kTileCols / 16; ++s) {
      uint32_t a[4];
      load_a(a, x, 16 * warp, 2 * s, lane);
#pragma unroll
      for (int pair = 0; pair < kRankTiles / 2; ++pair) {
        uint32_t b[4];
        load_b(b, right, 16 * pair, 2 * s, lane);
        mma<kDtype>(acc[2 * pair], a, {b[0], b[1]});
        mma<kDtype>(acc[2 * pair + 1], a, {b[2], b[3]});
      }
    }
  }

  const int g = lane / 4, t = lane % 4;
  const auto sums = [&](int s) { return (unit * p.slices + s) * kTileRows * S::kRanks; };
  const float scale = p.scale[tile.adapter];
  const auto put = [&](int row, int rank, float value) {
    if (row < tile.count && rank < ranks) {
      p.h[p.rows[tile.begin + row] * p.h_stride + first_rank + rank] = round_to<kDtype>(scale * value);
    }
  };
#pragma unroll
  for (int j = 0; j < kRankTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = 16 * warp + g + e / 2 * 8, rank = 8 * j + 2 * t + e % 2;
      if (p.slices == 1) {
        put(row, rank, acc[j][e]);
      } else {
        p.partial[sums(slice) + row * S::kRanks + rank] = acc[j][e];
      }
    }
  }
  if (p.slices == 1 || !last_to_arrive(p.counters + unit, p.slices, cast<uint32_t>(shared), thread)) return;
  for (int i = 4 * thread; i < tile.count * S::kRanks; i += 4 * kThreads) {
    const float4 sum = add_partial(p.partial + (sums(0) + i), sums(1) - sums(0), p.slices);
    const int row = i / S::kRanks, rank = i % S::kRanks;
    put(row, rank, sum.x), put(row, rank + 1, sum.y), put(row, rank + 2, sum.z), put(row, rank + 3, sum.w);
  }
  if (thread == 0) p.counters[unit] = 0;
}

struct Plan {
  int rank_tiles, slices, chunks;
  int64_t slice_k, tiles;

  int64_t workspace_floats() const {
    return slices == 1 ? 0 : tiles * chunks * slices * kTileRows * 8 * rank_tiles;
  }
};

Plan make_plan(int64_t tiles, int64_t k, int64_t rank, int multiprocessors) {
  const int rank_tiles = rank <= 16 ? 2 : 8;
  const int chunks = static_cast<int>((rank + 8 * rank_tiles - 1) / (8 * rank_tiles));
  // As many slices, of two stages of K at least, as take the least time: waves of two blocks for each
  // multiprocessor, times a block's stages and what its start and end cost, about as much as two (model, not
  // measured).
  constexpr int64_t kAround = 2;
  const int64_t stages = std::max<int64_t>(1, (k + kTileCols - 1) / kTileCols);
  int64_t best = stages, least = 0;  // stages of a slice
  for (int64_t slices = 1; slices <= kMostSlices && (slices == 1 || 2 * slices <= stages); ++slices) {
    const int64_t each = (stages + slices - 1) / slices,
                  blocks = tiles * chunks * ((stages + each - 1) / each);
    const int64_t waves = (blocks + 2 * multiprocessors - 1) / (2 * multiprocessors);
    if (slices == 1 || waves * (each + kAround) < least) best = each, least = waves * (each + kAround);
  }
  return {rank_tiles, static_cast<int>((stages + best - 1) / best), chunks, best * kTileCols, tiles};
}

template <int kDtype, int kRankTiles>
int run(const Problem& p, const Plan& plan, void* stream) {
  const LaunchShape shape{static_cast<unsigned>(plan.tiles * plan.chunks * plan.slices), 1, 1, kThreads,
                          Shape<kRankTiles>::kBytes};
  return launch("lora_shrink", lora_shrink<kDtype, kRankTiles>, shape, stream, p);
}

}  // namespace
}  // namespace lk::cuda

extern "C" int lk_cuda_lora_shrink(const lk_matrix* x, int64_t in_features, const lk_rows* rows,
                                   const lk_adapter* adapters, void* h, int64_t h_stride, void* workspace,
                                   uint32_t* counters, void* stream) {
  using namespace lk::cuda;
  if (x->dtype != LK_BF16 && x->dtype != LK_F16) return LK_UNSUPPORTED_DTYPE;
  const int64_t rank = most_rank(*rows, adapters);
  if (rows->count == 0 || rank == 0) return LK_OK;
  const Plan plan = make_plan(most_tiles(rows->count, rows->adapters, rows->order != nullptr), in_features,
                              rank, device_info().multiprocessors);
  Problem p{};
  p.rows = rows_of(*rows), p.x = matrix_of(*x), p.k = in_features;
  for (int64_t a = 0; a < rows->adapters; ++a) {
    p.A[a] = matrix_of(adapters[a].lora_A), p.rank[a] = static_cast<int>(adapters[a].rank);
    p.scale[a] = static_cast<float>(adapters[a].scaling);
  }
  p.dropout = dropout_of(adapters[0].dropout_p, adapters[0].rng);
  p.h = lk::Global<uint16_t>(static_cast<uint16_t*>(h)), p.h_stride = h_stride;
  p.partial = lk::Global<float>(static_cast<float*>(workspace)), p.counters = lk::Global<uint32_t>(counters);
  p.slice_k = plan.slice_k, p.slices = plan.slices, p.chunks = plan.chunks;
  if (x->dtype == LK_BF16) {
    return plan.rank_tiles == 2 ? run<LK_BF16, 2>(p, plan, stream) : run<LK_BF16, 8>(p, plan, stream);
  }
  return plan.rank_tiles == 2 ? run<LK_F16, 2>(p, plan, stream) : run<LK_F16, 8>(p, plan, stream);
}

extern "C" lk_scratch lk_cuda_lora_shrink_scratch(int64_t rows, int64_t adapters, int sorted,
                                                  int64_t in_features, int64_t most_rank) {
  using namespace lk::cuda;
  if (rows == 0 || most_rank == 0) return {0, 0};
  const Plan plan = make_plan(most_tiles(rows, adapters, sorted != 0), in_features, most_rank,
                              device_info().multiprocessors);
  return {4 * plan.workspace_floats(), plan.slices > 1 ? plan.tiles * plan.chunks : 0};
}
