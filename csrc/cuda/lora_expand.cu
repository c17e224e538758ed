// lora_expand: what an adapter adds, from its low rank to full width, of one adapter or of several:
//   forward   out [T, N] (+)= s'·h·Bᵀ           v = h, w = B [N, r]
//   backward  out [T, K] (+)= m⊙(g·A)           v = g, w = A [r, K], the mask drawn in the fragment
// It is rounded once, on top of what is there, or alone.
//
//             128 columns
//           ┌─────────────┐     a block: 64 rows of one adapter, 128 columns, ranks 64 at a time
//   64 rows │ 4 x 16 rows │     a warp: 16 rows (m16), 16 tiles of columns (n8)
//           └─────────────┘
//
// B's rows are columns of the output and are read as they lie, A's through ldmatrix's transposition. A lane
// holds two successive columns of two rows, half of two counters of the mask: it draws one of them and gets
// the other from its neighbour.
//
// Bytes: out written, and read where it is added to. Floor: these bytes over the bandwidth.
#include "low_rank.cuh"

namespace lk::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kRanks = 64, kTiles = kTileCols / 8;
constexpr int kW = kTileRows * kRanks * 2, kBytes = kW + kTileCols * kRanks * 2;

struct Problem {
  Rows rows;
  Matrix v;                 // [T, most r]
  Matrix w[kMostAdapters];  // [C, r], or [r, C] where kTransposed
  int rank[kMostAdapters];
  float scale[kMostAdapters];
  Dropout dropout;
  Global<uint16_t> out;
  int64_t out_stride, columns;  // C
  unsigned column_tiles;        // of kTileCols; all tiles along x, since y ends at 65535, 4 million rows
  bool add, pairs;              // pairs: two elements may be read and written as one
};

template <int kDtype, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 3) lora_expand(const __grid_constant__ Problem p) {
  LK_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const RowTile tile = row_tile(p.rows, blockIdx.x / p.column_tiles, lane);
  if (tile.count == 0) return;
  const int64_t col0 = int64_t{blockIdx.x % p.column_tiles} * kTileCols;
  const int rank = p.rank[tile.adapter], columns = clamped(p.columns - col0, kTileCols);
  const Matrix& w = p.w[tile.adapter];

  float acc[kTiles][4] = {};
  for (int first = 0; first < rank; first += kRanks) {
    start_rank_tile<kDtype, 8, kThreads>(
        shared, p.v, [&](int row) { return p.rows[tile.begin + row]; }, tile.count, kTileRows, first, rank,
        thread);
    if constexpr (kTransposed) {
      for (int id = thread; id < kRanks * 16; id += kThreads) {
        const int row = id / 16, piece = id % 16;
        const int there = first + row < rank ? clamped(columns - 8 * piece, 8) : 0;
        start_piece<kDtype>(shared + (kW + tile_place(row, piece)), w, first + row, col0 + 8 * piece, there);
      }
    } else {
      start_rank_tile<kDtype, 8, kThreads>(
          shared + kW, w, [&](int row) { return col0 + row; }, columns, kTileCols, first, rank, thread);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kRanks / 16; ++s) {
      if (first + 16 * s >= rank) break;
      uint32_t a[4];
      ptx::ldmatrix_x4(a, shared + rank_place<8>(16 * warp + lane % 16, 2 * s + lane / 16));
#pragma unroll
      for (int pair = 0; pair < kTiles / 2; ++pair) {
        uint32_t b[4];
        if constexpr (kTransposed) {
          ptx::ldmatrix_x4_trans(b, shared + (kW + tile_place(16 * s + lane % 16, 2 * pair + lane / 16)));
        } else {
          ptx::ldmatrix_x4(
              b, shared + (kW + rank_place<8>(16 * pair + lane % 8 + lane / 16 * 8, 2 * s + lane / 8 % 2)));
        }
        mma<kDtype>(acc[2 * pair], a, {b[0], b[1]});
        mma<kDtype>(acc[2 * pair + 1], a, {b[2], b[3]});
      }
    }
    __syncthreads();  // read, before the next ranks are brought
  }

  const bool masked = p.dropout.rng != nullptr;
  const Mask mask(p.dropout);
  const float scale = p.scale[tile.adapter];
  int64_t row_of[2];  // -1: no such row
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * warp + g + 8 * half;
    row_of[half] = row < tile.count ? p.rows[tile.begin + row] : -1;
  }
  const int64_t my_row = t % 2 == 0 ? row_of[0] : row_of[1];  // whose counters this lane draws
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int64_t col = col0 + 8 * j + 2 * t;
    uint32_t kept[2] = {3, 3};  // of each row: its two columns
    if (masked && p.columns % 4 == 0) {
      const uint32_t mine = mask.kept4(static_cast<uint64_t>(my_row * p.columns + col) / 4);
      const uint32_t other = __shfl_xor_sync(0xffffffffu, mine, 1);
      kept[0] = (t % 2 == 0 ? mine : other) >> t % 2 * 2, kept[1] = (t % 2 == 0 ? other : mine) >> t % 2 * 2;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row_of[half] < 0 || col >= p.columns) continue;
      if (masked && p.columns % 4 != 0) {
        kept[half] = kept_anywhere(mask, static_cast<uint64_t>(row_of[half] * p.columns + col));
      }
      float low = kept[half] & 1 ? scale * acc[j][2 * half] : 0;
      float high = kept[half] & 2 ? scale * acc[j][2 * half + 1] : 0;
      const Global<uint16_t> at = p.out + (row_of[half] * p.out_stride + col);
      if (p.pairs) {
        if (p.add) {
          const uint32_t before = cast<const uint32_t>(at)[0];
          low += to_float<kDtype>(static_cast<uint16_t>(before));
          high += to_float<kDtype>(static_cast<uint16_t>(before >> 16));
        }
        cast<uint32_t>(at)[0] = round_pair<kDtype>(low, high);
      } else {
        if (p.add) low += to_float<kDtype>(at[0]);
        at[0] = round_to<kDtype>(low);
        if (col + 1 >= p.columns) continue;
        if (p.add) high += to_float<kDtype>(at[1]);
        at[1] = round_to<kDtype>(high);
      }
    }
  }
}

template <int kDtype>
int run(const Problem& p, bool transposed, const LaunchShape& shape, void* stream) {
  return transposed ? launch("lora_expand", lora_expand<kDtype, true>, shape, stream, p)
                    : launch("lora_expand", lora_expand<kDtype, false>, shape, stream, p);
}

}  // namespace
}  // namespace lk::cuda

extern "C" int lk_cuda_lora_expand(const lk_matrix* v, const lk_rows* rows, const lk_adapter* adapters,
                                   int backward, int add, void* out, int64_t columns, int64_t out_stride,
                                   void* stream) {
  using namespace lk::cuda;
  if (v->dtype != LK_BF16 && v->dtype != LK_F16) return LK_UNSUPPORTED_DTYPE;
  if (rows->count == 0 || columns == 0) return LK_OK;
  Problem p{};
  p.rows = rows_of(*rows), p.v = matrix_of(*v);
  for (int64_t a = 0; a < rows->adapters; ++a) {
    const lk_adapter& from = adapters[a];
    p.w[a] = matrix_of(backward ? from.lora_A : from.lora_B), p.rank[a] = static_cast<int>(from.rank);
    p.scale[a] = backward ? 1.0f : static_cast<float>(from.scaling / (1 - from.dropout_p));
  }
  if (backward) p.dropout = dropout_of(adapters[0].dropout_p, adapters[0].rng);
  p.out = lk::Global<uint16_t>(static_cast<uint16_t*>(out));
  p.out_stride = out_stride, p.columns = columns, p.add = add != 0;
  p.pairs = columns % 2 == 0 && out_stride % 2 == 0 && reinterpret_cast<uintptr_t>(out) % 4 == 0;
  const int64_t tiles = most_tiles(rows->count, rows->adapters, rows->order != nullptr);
  p.column_tiles = static_cast<unsigned>((columns + kTileCols - 1) / kTileCols);
  const LaunchShape shape{static_cast<unsigned>(tiles * p.column_tiles), 1, 1, kThreads, kBytes};
  return v->dtype == LK_BF16 ? run<LK_BF16>(p, backward != 0, shape, stream)
                             : run<LK_F16>(p, backward != 0, shape, stream);
}
