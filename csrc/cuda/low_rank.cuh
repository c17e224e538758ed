// What the kernels of the low-rank products share: lora_shrink (h = dropout(x)·Aᵀ), lora_expand (y += s·h·Bᵀ,
// dx += m⊙(g·A)) and lora_linear_backward_sweep (g, dA, dB, dbias). Each reads something of size T x K or T x
// N once and is bound by that, so it brings tiles of it by cp.async and multiplies them by mma.m16n8k16 with
// what has rank r.
//
//   rows       a tile holds 64 rows of one adapter: successive ones, or where several adapters share a call
//              those that `order` names
//   tile       [64 rows][128 columns] of a 16-bit type, 256 bytes a row; 16-byte pieces permuted so that
//              ldmatrix reads eight rows without a conflict, either way round
//   rank tile  [rows][8·kRankTiles ranks], permuted likewise
#pragma once
#include <algorithm>

#include "dropout.cuh"
#include "nf4.cuh"
#include "tile.cuh"

namespace lk::cuda {

constexpr int kTileRows = 64, kTileCols = 128, kTileBytes = kTileRows * kTileCols * 2;
constexpr int kMostAdapters = LK_MOST_ADAPTERS;

// ---- operands ---------------------------------------------------------------------------------------------

// A row-major matrix of any dtype with unit column stride.
struct Matrix {
  Global<const void> data;
  int64_t stride;
  int dtype;
  bool aligned;  // rows start on 16 bytes
};
inline Matrix matrix_of(const void* data, int dtype, int64_t stride) {
  const int64_t bytes = dtype == LK_F32 ? 4 : 2;
  return {Global<const void>(data), stride, dtype,
          reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * bytes % 16 == 0};
}
inline Matrix matrix_of(const lk_matrix& m) { return matrix_of(m.data, m.dtype, m.stride); }

// Rows by adapter: those of adapter a are order[begins[a]], ..., order[begins[a + 1] - 1]. Without `order`
// there is one adapter, and every row is its.
struct Rows {
  int64_t count;
  Global<const int64_t> order, begins;
  int adapters;

  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    return order == nullptr ? i : int64_t{order[i]};
  }
  __device__ __forceinline__ int64_t begin(int adapter) const {
    return order == nullptr ? 0 : int64_t{begins[adapter]};
  }
  __device__ __forceinline__ int64_t end(int adapter) const {
    return order == nullptr ? count : int64_t{begins[adapter + 1]};
  }
};
inline Rows rows_of(const lk_rows& r) {
  return {r.count, Global<const int64_t>(r.order), Global<const int64_t>(r.begins),
          static_cast<int>(r.adapters)};
}
// How many tiles a launch needs at most: each adapter's last one may hold few rows.
inline int64_t most_tiles(int64_t rows, int64_t adapters, bool sorted) {
  return (rows + kTileRows - 1) / kTileRows + (sorted ? adapters : 0);
}

inline int64_t most_rank(const lk_rows& rows, const lk_adapter* adapters) {
  int64_t most = 0;
  for (int64_t a = 0; a < rows.adapters; ++a) most = std::max(most, adapters[a].rank);
  return most;
}

// The rows of each adapter cut into runs of at most `length`, adapter by adapter; one that has no rows has an
// empty run where kEmpty. For a whole warp: lane l knows of adapters 2l and 2l + 1.
template <bool kEmpty>
struct Runs {
  static_assert(kMostAdapters <= 64, "two for each lane");
  int64_t length;
  int64_t edge[3];  // where their rows begin and end
  int count[2];     // runs
  int before;       // runs of adapters before them
  int split;        // runs before them of adapters that have several

  struct Run {
    int adapter;  // -1: no such run
    int64_t begin, end;
    int runs;  // of its adapter
    int slot;  // its number among runs of adapters that have several
  };

  __device__ __forceinline__ Runs(const Rows& rows, int64_t run_length, int lane) : length(run_length) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int adapter = 2 * lane + i;
      edge[i] = adapter < rows.adapters ? rows.begin(adapter) : rows.end(rows.adapters - 1);
    }
    int all = 0, several = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      count[i] = static_cast<int>((edge[i + 1] - edge[i] + length - 1) / length);
      if (kEmpty && count[i] == 0 && 2 * lane + i < rows.adapters) count[i] = 1;
      all += count[i], several += count[i] > 1 ? count[i] : 0;
    }
    before = sum_of_lower_lanes(all, lane), split = sum_of_lower_lanes(several, lane);
  }

  // Run `index`, the same for all lanes.
  __device__ __forceinline__ Run operator[](int64_t index) const {
    const uint32_t behind = __ballot_sync(0xffffffffu, before + count[0] + count[1] <= index);
    if (behind == 0xffffffffu) return {-1, 0, 0, 0, 0};
    const int owner = __popc(behind);  // it, and what it knows
    const int in_owner = static_cast<int>(index) - __shfl_sync(0xffffffffu, before, owner);
    const int first = __shfl_sync(0xffffffffu, count[0], owner);
    const int second = __shfl_sync(0xffffffffu, count[1], owner);
    const int slots = __shfl_sync(0xffffffffu, split, owner);
    const int64_t edge0 = __shfl_sync(0xffffffffu, edge[0], owner);
    const int64_t edge1 = __shfl_sync(0xffffffffu, edge[1], owner);
    const int64_t edge2 = __shfl_sync(0xffffffffu, edge[2], owner);
    const bool odd = in_owner >= first;
    const int part = odd ? in_owner - first : in_owner;
    const int64_t begin = (odd ? edge1 : edge0) + part * length, end = odd ? edge2 : edge1;
    return {2 * owner + (odd ? 1 : 0), begin, end < begin + length ? end : begin + length,
            odd ? second : first, slots + (odd && first > 1 ? first : 0) + part};
  }

  // Of an adapter, each lane's own: how many runs it has, and its first one's slot.
  struct Slots {
    int runs, first;
  };
  __device__ __forceinline__ Slots slots_of(int adapter) const {
    const int first = __shfl_sync(0xffffffffu, count[0], adapter / 2);
    const int second = __shfl_sync(0xffffffffu, count[1], adapter / 2);
    const int slots = __shfl_sync(0xffffffffu, split, adapter / 2);
    return adapter % 2 == 0 ? Slots{first, slots} : Slots{second, slots + (first > 1 ? first : 0)};
  }

  static __device__ __forceinline__ int sum_of_lower_lanes(int value, int lane) {
    int sum = value;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const int lower = __shfl_up_sync(0xffffffffu, sum, by);
      if (lane >= by) sum += lower;
    }
    return sum - value;
  }
};

// Rows [begin, begin + count) in the order of `rows`, all of one adapter; count 0: no such tile.
struct RowTile {
  int adapter;
  int64_t begin;
  int count;
};
// For whole warps, `tile` the same for all lanes.
__device__ __forceinline__ RowTile row_tile(const Rows& rows, int64_t tile, int lane) {
  const auto run = Runs<false>(rows, kTileRows, lane)[tile];
  return {run.adapter < 0 ? 0 : run.adapter, run.begin, static_cast<int>(run.end - run.begin)};
}

// ---- tiles in shared memory -------------------------------------------------------------------------------

__device__ __forceinline__ int tile_place(int row, int piece) {
  return row * 256 + 16 * swizzled(row, piece);
}

template <int kRankTiles>
__device__ __forceinline__ int rank_place(int row, int piece) {
  constexpr int kRowsOfALine = 8 / kRankTiles;
  return row * 16 * kRankTiles + 16 * (piece ^ row / kRowsOfALine % kRankTiles);
}

// Elements [col, col + 8) of a row as T, zeros behind the first `there`, by loads: of any dtype, anywhere.
// Not inlined, since it stands in loops whose usual way is another.
template <int kDtype>
__device__ __noinline__ uint4 load_piece(Matrix m, int64_t row, int64_t col, int there) {
  uint32_t pairs[4];
  if (m.dtype == LK_F32 && m.aligned && there == 8) {
    const Global<const float4> from = cast<const float4>(cast<const float>(m.data) + (row * m.stride + col));
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const float4 four = from[v];
      pairs[2 * v] = round_pair<kDtype>(four.x, four.y),
                pairs[2 * v + 1] = round_pair<kDtype>(four.z, four.w);
    }
  } else {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      float two[2] = {};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (2 * v + e < there) two[e] = load_float(m.data, m.dtype, row * m.stride + col + 2 * v + e);
      }
      pairs[v] = round_pair<kDtype>(two[0], two[1]);
    }
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Starts a copy of elements [col, col + 8) of a row to 16 bytes of shared memory as T: the first `there` of
// them, zeros behind. By cp.async where the matrix allows it.
template <int kDtype>
__device__ __forceinline__ void start_piece(Shared<char> to, const Matrix& m, int64_t row, int64_t col,
                                            int there) {
  if (m.dtype == kDtype && m.aligned) {
    const int64_t at = there > 0 ? row * m.stride + col : 0;
    ptx::cp_async<16>(to, cast<const uint16_t>(m.data) + at, 2 * there);
  } else {
    cast<uint4>(to)[0] = load_piece<kDtype>(m, row, col, there);
  }
}

__device__ __forceinline__ int clamped(int64_t left, int most) {
  return left < 0 ? 0 : left < most ? static_cast<int>(left) : most;
}

// A tile of kRows rows of z: `count` of them from `begin` on, in the order of `rows`; columns from col.
// A thread's pieces lie one above the other, so that a whole tile of successive rows costs it an addition and
// a copy for each.
template <int kDtype, int kThreads, int kRows = kTileRows>
__device__ __forceinline__ void start_tile(Shared<char> to, const Matrix& z, const Rows& rows, int64_t begin,
                                           int count, int64_t col, int64_t col_end, int thread) {
  constexpr int kRound = kThreads / 16, kRounds = kRows / kRound;
  static_assert(kRound % 8 == 0 && kRows % kRound == 0, "one swizzle for all of a thread's rows");
  const int row0 = thread / 16, piece = thread % 16;
  const Shared<char> at = to + tile_place(row0, piece);
  const int64_t first = col + 8 * piece;
  const int there = clamped(col_end - first, 8);
  const Global<const uint16_t> data = cast<const uint16_t>(z.data);
  if (z.dtype != kDtype || !z.aligned) {
#pragma unroll 1
    for (int i = 0; i < kRounds; ++i) {
      const int row = row0 + i * kRound, mine = row < count ? there : 0;
      cast<uint4>(at + i * kRound * 256)[0] =
          load_piece<kDtype>(z, mine > 0 ? rows[begin + row] : 0, first, mine);
    }
  } else if (rows.order == nullptr && count == kRows && col + kTileCols <= col_end) {
    const Global<const uint16_t> from = data + ((begin + row0) * z.stride + first);
    const int64_t round = kRound * z.stride;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) ptx::cp_async<16>(at + i * kRound * 256, from + i * round);
  } else {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int row = row0 + i * kRound;
      const bool is_there = row < count && there > 0;
      const int64_t from = is_there ? rows[begin + row] * z.stride + first : 0;
      ptx::cp_async<16>(at + i * kRound * 256, data + from, is_there ? 2 * there : 0);
    }
  }
}

// Applies the mask to what this thread's own start_tile brought; call it when those copies are done.
template <int kThreads>
__device__ __forceinline__ void mask_tile(Shared<char> tile, const Mask& mask, const Rows& rows,
                                          int64_t begin, int count, int64_t col, int64_t col_end,
                                          int64_t cols, int thread) {
  constexpr int kRound = kThreads / 16;
  const int piece = thread % 16;
  if (col + 8 * piece >= col_end) return;
  const bool counters = cols % 4 == 0;  // each piece is two of them
#pragma unroll 1                        // twenty or thirty rounds of Philox each are enough to hide a latency
  for (int row = thread / 16; row < count; row += kRound) {
    const Shared<uint4> at = cast<uint4>(tile + tile_place(row, piece));
    const auto first = static_cast<uint64_t>(rows[begin + row] * cols + col + 8 * piece);
    at[0] = counters ? mask.keep(at[0], first / 4) : keep_eight(at[0], kept_anywhere(mask, first));
  }
}

// A rank tile: `count` rows of v from `begin` on (of `rows`, or successive), ranks from `rank` on.
template <int kDtype, int kRankTiles, int kThreads, class RowOf>
__device__ __forceinline__ void start_rank_tile(Shared<char> to, const Matrix& v, RowOf row_of, int count,
                                                int total, int64_t rank, int64_t rank_end, int thread) {
  for (int id = thread; id < total * kRankTiles; id += kThreads) {
    const int row = id / kRankTiles, piece = id % kRankTiles;
    const int there = row < count ? clamped(rank_end - rank - 8 * piece, 8) : 0;
    start_piece<kDtype>(to + rank_place<kRankTiles>(row, piece), v, there > 0 ? row_of(row) : 0,
                        rank + 8 * piece, there);
  }
}

// ---- fragments
// ---------------------------------------------------------------------------------------------
//
// Each ldmatrix_x4 below brings a fragment a of m16k16, or the fragments b of two n8 tiles of k16.

// a = rows [row, +16) x columns [8·piece, +16) of a tile.
__device__ __forceinline__ void load_a(uint32_t (&a)[4], Shared<const char> tile, int row, int piece,
                                       int lane) {
  ptx::ldmatrix_x4(a, tile + tile_place(row + lane % 16, piece + lane / 16));
}
// a = transpose of rows [row, +16) x columns [8·piece, +16) of a tile: m runs over columns, k over rows.
__device__ __forceinline__ void load_a_trans(uint32_t (&a)[4], Shared<const char> tile, int row, int piece,
                                             int lane) {
  ptx::ldmatrix_x4_trans(a, tile + tile_place(row + lane % 8 + lane / 16 * 8, piece + lane / 8 % 2));
}
// b of rank tiles 2·pair and 2·pair + 1, k over rows [row, +16) of a rank tile.
template <int kRankTiles>
__device__ __forceinline__ void load_b_ranks(uint32_t (&b)[4], Shared<const char> v, int row, int pair,
                                             int lane) {
  ptx::ldmatrix_x4_trans(b, v + rank_place<kRankTiles>(row + lane % 16, 2 * pair + lane / 16));
}
// b of rows [row, +8) and [row + 8, +8) of a tile, k over columns [8·piece, +16).
__device__ __forceinline__ void load_b(uint32_t (&b)[4], Shared<const char> tile, int row, int piece,
                                       int lane) {
  ptx::ldmatrix_x4(b, tile + tile_place(row + lane % 8 + lane / 16 * 8, piece + lane / 8 % 2));
}

// A number as the output's dtype.
__device__ __forceinline__ void store_float(Global<void> p, int dtype, int64_t i, float value) {
  if (dtype == LK_F32) {
    cast<float>(p)[i] = value;
  } else {
    cast<uint16_t>(p)[i] = dtype == LK_BF16 ? ptx::cvt_rn_bf16(value) : ptx::cvt_rn_f16(value);
  }
}

}  // namespace lk::cuda
