// The kernels of gemm.h in terms of a vector type. Not a header of its own: gemm_<isa>.cpp includes it once,
// inside its namespace and with the compiler set to its instruction set, after defining
//
//   struct Vec { using V; kLanes; kRows (tokens that fit in registers beside two columns of sums);
//                zero(), load(p), store(p, v), broadcast(p), fma(a, b, c) = a*b + c,
//                transpose(from, stride, to, to_stride) of kLanes x kLanes floats }
//
// Conversions here are plain loops, which the compiler vectorises; an instruction set overrides
// what it can do better.

// ---- packing ----

inline void pack_tile(const Matrix& m, int64_t row, int64_t tokens, int64_t inner, float scale,
                      float* packed) {
  constexpr int64_t kColumns = 64;
  float rows[kTile][kColumns];
  for (int64_t c = 0; c < inner; c += kColumns) {
    const int64_t n = std::min(kColumns, inner - c);
    for (int64_t t = 0; t < tokens; ++t) {
      read_floats(m.data, m.dtype, (row + t) * m.stride + c, n, rows[t]);
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t t = 0; t < tokens; ++t) packed[(c + i) * tokens + t] = rows[t][i] * scale;
    }
  }
}

// ---- decoding ----

// Rows [row, row + rows) x columns [col, col + cols) of a matrix as fp32.
inline void load_rows(const Matrix& m, int64_t row, int64_t rows, int64_t col, int64_t cols, float* to,
                      int64_t stride) {
  if (m.nf4 != nullptr) return decode_weights(*m.nf4, {m.cols, row, rows, col, cols}, to, stride);
  for (int64_t i = 0; i < rows; ++i) {
    read_floats(m.data, m.dtype, (row + i) * m.stride + col, cols, to + i * stride);
  }
}

inline void decode(const Right& right, int64_t output, int64_t width, int64_t inner, int64_t count,
                   const float*, float* panels) {
  if (!right.rows_are_outputs) {
    // Rows of all panels at once: the longer a run of codes, the less its blocks' tables weigh.
    alignas(64) float row[kGroup * kPanel] = {};
    for (int64_t c = 0; c < count; ++c) {
      load_rows(right.matrix, inner + c, 1, output, width, row, 0);
      for (int64_t m = 0; m < width; m += kPanel) {
        std::copy_n(row + m, kPanel, panels + m * kChunk + c * kPanel);
      }
    }
    return;
  }
  alignas(64) float rows[Vec::kLanes * kChunk];
  for (int64_t m = 0; m < ceil_div(width, kPanel) * kPanel; m += Vec::kLanes) {
    const int64_t real = std::clamp<int64_t>(width - m, 0, Vec::kLanes);
    load_rows(right.matrix, output + m, real, inner, count, rows, kChunk);
    std::fill(rows + real * kChunk, rows + Vec::kLanes * kChunk, 0.0f);
    float* to = panels + m / kPanel * kPanel * kChunk + m % kPanel;
    for (int64_t c = 0; c < count; c += Vec::kLanes) {  // behind the last there is room: kChunk rows
      Vec::transpose(rows + c, kChunk, to + c * kPanel, kPanel);
    }
  }
}

// ---- the product of one tile ----

// M tokens x N vectors of outputs. `stride`: tokens of the packed tile.
template <int M, int N>
LK_INLINE void multiply_block(const float* left, int64_t stride, const float* panel, int64_t count,
                              bool first, float* sums) {
  using V = Vec::V;
  V acc[M][N];
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) acc[i][j] = Vec::zero();
  }
  for (int64_t c = 0; c < count; ++c) {
    V p[N];
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) p[j] = Vec::load(panel + c * kPanel + j * Vec::kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const V l = Vec::broadcast(left + c * stride + i);
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) acc[i][j] = Vec::fma(l, p[j], acc[i][j]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) {
      float* to = sums + i * kPanel + j * Vec::kLanes;
      Vec::store(to, first ? acc[i][j] : Vec::add(Vec::load(to), acc[i][j]));
    }
  }
}

template <int M, int N>
inline void multiply_rows(int64_t rows, const float* left, int64_t stride, const float* panel, int64_t count,
                          bool first, float* sums) {
  if (rows == M) return multiply_block<M, N>(left, stride, panel, count, first, sums);
  if constexpr (M > 1) multiply_rows<M - 1, N>(rows, left, stride, panel, count, first, sums);
}

inline void multiply(int64_t tokens, const float* left, const float* panel, int64_t count, int64_t width,
                     bool first, float* sums) {
  constexpr int64_t kTwo = 2 * Vec::kLanes;
  for (int64_t c = 0; c < count; c += kShortSum) {
    const int64_t n = std::min(kShortSum, count - c);
    const bool fresh = first && c == 0;
    for (int64_t t = 0; t < tokens; t += Vec::kRows) {
      const int64_t rows = std::min<int64_t>(Vec::kRows, tokens - t);
      const float* from = left + c * tokens + t;
      for (int64_t m = 0; m < width; m += kTwo) {
        const float* p = panel + c * kPanel + m;
        float* to = sums + t * kPanel + m;
        if (width - m > Vec::kLanes) {
          multiply_rows<Vec::kRows, 2>(rows, from, tokens, p, n, fresh, to);
        } else {
          multiply_rows<Vec::kRows, 1>(rows, from, tokens, p, n, fresh, to);
        }
      }
    }
  }
}

// ---- from sums to the output ----

template <class T>
LK_INLINE void store_rows(const Output& out, int64_t row, int64_t tokens, int64_t column, int64_t width,
                          const float* sums) {
  alignas(64) float bias[kPanel] = {};
  if (out.bias != nullptr) read_floats(out.bias, out.bias_dtype, column, width, bias);
  for (int64_t t = 0; t < tokens; ++t) {
    T* to = static_cast<T*>(out.data) + (row + t) * out.stride + column;
    alignas(64) float value[kPanel];
    for (int64_t m = 0; m < kPanel; ++m) value[m] = sums[t * kPanel + m] * out.scale + bias[m];
    if (out.accumulate) {
      for (int64_t m = 0; m < width; ++m) value[m] += to_float(to[m]);
    }
    if (width == kPanel) {  // the usual case, with a length that the compiler knows
      for (int64_t m = 0; m < kPanel; ++m) to[m] = from_float<T>(value[m]);
    } else {
      for (int64_t m = 0; m < width; ++m) to[m] = from_float<T>(value[m]);
    }
  }
}

inline void store(const Output& out, int64_t row, int64_t tokens, int64_t column, int64_t width,
                  const float* sums) {
  switch (out.dtype) {
    case LK_F32: return store_rows<float>(out, row, tokens, column, width, sums);
    case LK_F16: return store_rows<Half>(out, row, tokens, column, width, sums);
    default: return store_rows<BFloat16>(out, row, tokens, column, width, sums);
  }
}
