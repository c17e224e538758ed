// adamw_step, adamw8bit_step, lion_step and lion8bit_step on a CPU: one step of all pieces of state in a run
// of pages (optim_state.h has their layout and the 8-bit code; lora_kernels/reference_optim.py the order of
// every operation, each of which is rounded by itself).
//
//   AdamW  m ← β1·m + (1-β1)·g;  v ← β2·v + (1-β2)·g²;  p ← p·(1-lr·wd) - lr/(1-β1^t)·m / (√v/√(1-β2^t) +
//   eps) Lion   p ← p·(1-lr·wd) - lr·sign(β1·m + (1-β1)·g);  m ← β2·m + (1-β2)·g
//
//   threads  runs of blocks of 256 elements, counted through all pieces: a thousand small parameters are one
//            parallel region, as balanced as one large parameter. No sum crosses a block.
//   block    param, grad ──> x, g as fp32     fp32: where they lie; 16-bit: in L1
//            state ──> m, v                   32-bit: where it lies; 8-bit: decoded into L1
//            update x, m, v
//            x ──> param (one rounding), m, v ──> codes and absmax
//   bytes    per element of AdamW in fp32 16 read and 12 written; 8-bit state 10 + 6 with fp32 parameters,
//            6 + 4 with 16-bit ones. Bound by them; Philox adds about 25 integer operations an element.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../optim_table.h"
#include "convert.h"
#include "parallel.h"

namespace lk::cpu {
namespace {

using namespace lk::optim;

constexpr int64_t kGrain = 16;  // blocks of the smallest range that is worth a thread's while
constexpr float kInf = std::numeric_limits<float>::infinity();

// A segment whose page is not done yet.
struct Piece {
  char* param;       // its first element
  const char* grad;  // likewise
  char* state;
  StateLayout layout;
  int64_t first, count;
  int64_t first_block;  // blocks of the pieces before it
  int grad_dtype;
  Correction correction;
  uint64_t stream;
};

struct Step {
  int op, dtype, rounding;
  uint64_t seed;
  Numbers numbers;
  std::vector<Piece> pieces;
  int64_t blocks = 0;
};

int64_t size_of(int dtype) { return dtype == LK_F32 ? 4 : 2; }

// By bits, because a conditional expression tempts the compiler into a branch around what may raise a
// floating- point exception.
LK_INLINE float chosen(bool first, float a, float b) {
  const uint32_t mask = first ? 0xffffffffu : 0;
  return float_of((bits_of(a) & mask) | (bits_of(b) & ~mask));
}

// ---- the parameters' rounding

LK_INLINE BFloat16 stochastic(float x, uint32_t word, BFloat16) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = stochastic_bf16(magnitude, word) | (bits >> 31 << 15);
  const uint32_t nearest = from_float<BFloat16>(x).bits;
  return {static_cast<uint16_t>(magnitude < kBf16Infinity ? rounded : nearest)};
}
LK_INLINE Half stochastic(float x, uint32_t word, Half) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = stochastic_f16(magnitude, word) | (bits >> 31 << 15);
  const uint32_t nearest = from_float<Half>(x).bits;
  return {static_cast<uint16_t>(magnitude < kF16Infinity ? rounded : nearest)};
}

// The words of a block's elements, in a loop over counters that the compiler vectorises.
LK_INLINE void random_words(int64_t first, uint64_t stream, uint64_t seed, uint32_t (&words)[kBlock]) {
  constexpr int64_t kCounters = kBlock / 4;
  alignas(64) uint32_t drawn[4][kCounters];
  for (int64_t c = 0; c < kCounters; ++c) {
    const PhiloxWords four = philox4x32_10(static_cast<uint64_t>(first / 4 + c), stream, seed);
    for (int k = 0; k < 4; ++k) drawn[k][c] = four.w[k];
  }
  for (int64_t c = 0; c < kCounters; ++c) {
    for (int k = 0; k < 4; ++k) words[4 * c + k] = drawn[k][c];
  }
}

template <class T>
LK_INLINE void read_params(const T* __restrict param, const T* __restrict lost, int64_t n,
                           float* __restrict x) {
  read_run(param, n, x);
  if (lost == nullptr) return;
  alignas(64) float rest[kBlock];
  read_run(lost, n, rest);
  for (int64_t i = 0; i < n; ++i) x[i] += rest[i];
}

template <class T>
LK_INLINE void write_params(const float* __restrict x, int64_t n, const uint32_t* __restrict words,
                            T* __restrict param, T* __restrict lost) {
  if (words != nullptr) {
    for (int64_t i = 0; i < n; ++i) param[i] = stochastic(x[i], words[i], T{});
  } else if (lost != nullptr) {  // what the rounding lost; nothing where the parameter overflowed
    alignas(64) float rest[kBlock];
    write_run(x, n, param);
    read_run(param, n, rest);
    for (int64_t i = 0; i < n; ++i) {
      const float difference = x[i] - rest[i];
      rest[i] = chosen(std::fabs(difference) < kInf, difference, 0.0f);
    }
    write_run(rest, n, lost);
  } else {
    write_run(x, n, param);
  }
}

// ---- the update

// kGuarded: an element whose new state is not finite keeps its values.
template <bool kGuarded>
LK_INLINE void update_adamw(const Numbers& k, const Correction& c, int64_t n, const float* __restrict g,
                            float* __restrict x, float* __restrict m, float* __restrict v) {
  for (int64_t i = 0; i < n; ++i) {
    const float new_m = k.beta1 * m[i] + k.rest1 * g[i];
    const float new_v = k.beta2 * v[i] + k.rest2 * g[i] * g[i];
    const float denominator = std::sqrt(new_v) * c.root + k.eps;
    const float new_x = x[i] * k.decay - c.step_size * new_m / denominator;
    const bool good = !kGuarded || new_v < kInf;
    m[i] = chosen(good, new_m, m[i]);
    v[i] = chosen(good, new_v, v[i]);
    x[i] = chosen(good, new_x, x[i]);
  }
}

template <bool kGuarded>
LK_INLINE void update_lion(const Numbers& k, int64_t n, const float* __restrict g, float* __restrict x,
                           float* __restrict m) {
  for (int64_t i = 0; i < n; ++i) {
    const float c = k.beta1 * m[i] + k.rest1 * g[i];
    const float sign = (c > 0 ? 1.0f : 0.0f) - (c < 0 ? 1.0f : 0.0f);
    const float new_x = x[i] * k.decay - k.lr * sign;
    const float new_m = k.beta2 * m[i] + k.rest2 * g[i];
    const bool good = !kGuarded || std::fabs(new_m) < kInf;
    m[i] = chosen(good, new_m, m[i]);
    x[i] = chosen(good, new_x, x[i]);
  }
}

// ---- 8-bit state

// out[i] = table[index[i]] for a whole block; indices behind the block's end are 0. The compiler makes no
// gathers of a loop.
using LookUp = void (*)(const uint32_t* table, const int32_t* index, uint32_t* out);
void look_up_portable(const uint32_t* table, const int32_t* index, uint32_t* out) {
  for (int64_t i = 0; i < kBlock; ++i) out[i] = table[index[i]];
}
#if defined(__x86_64__)
LK_AVX2 void look_up_avx2(const uint32_t* table, const int32_t* index, uint32_t* out) {
  for (int64_t i = 0; i < kBlock; i += 8) {
    const __m256i at = _mm256_load_si256(reinterpret_cast<const __m256i*>(index + i));
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + i),
                       _mm256_i32gather_epi32(reinterpret_cast<const int*>(table), at, 4));
  }
}
LK_AVX512 void look_up_avx512(const uint32_t* table, const int32_t* index, uint32_t* out) {
  for (int64_t i = 0; i < kBlock; i += 16) {
    _mm512_store_si512(out + i, _mm512_i32gather_epi32(_mm512_load_si512(index + i), table, 4));
  }
}
#endif

LK_INLINE void decode(const uint8_t* __restrict codes, int64_t n, const std::array<float, 256>& map,
                      float absmax, LookUp look_up, float* __restrict out) {
  alignas(64) int32_t index[kBlock];
  alignas(64) uint32_t value[kBlock];
  for (int64_t i = 0; i < n; ++i) index[i] = codes[i];
  for (int64_t i = n; i < kBlock; ++i) index[i] = 0;
  look_up(reinterpret_cast<const uint32_t*>(map.data()), index, value);
  for (int64_t i = 0; i < n; ++i) out[i] = float_of(value[i]) * absmax;
}

template <bool kSigned>
LK_INLINE float encode(const float* __restrict x, int64_t n, LookUp look_up, uint8_t* __restrict codes) {
  const std::array<uint32_t, kBins>& table = (kSigned ? kSignedCodes : kUnsignedCodes).bins;
  uint32_t most = 0;  // of the bits of |x|, whose order is that of the values: an integer maximum vectorises
  for (int64_t i = 0; i < n; ++i) most = std::max(most, bits_of(x[i]) & 0x7fffffffu);
  const float absmax = float_of(most), inverse = inverse_of(absmax);
  alignas(64) uint32_t bits[kBlock], entry[kBlock];
  alignas(64) int32_t bin[kBlock];
  for (int64_t i = 0; i < n; ++i) {
    bits[i] = bits_of(x[i] * inverse);
    bin[i] = bin_of(bits[i] & 0x7fffffffu);
  }
  for (int64_t i = n; i < kBlock; ++i) bin[i] = 0;
  look_up(table.data(), bin, entry);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t below = midpoints_below(bits[i] & 0x7fffffffu, entry[i]);
    codes[i] = static_cast<uint8_t>(code_of<kSigned>(bits[i], below));
  }
  return absmax;
}

// ---- a block

LK_INLINE void update_block(const Step& step, const Piece& piece, int64_t block, LookUp look_up) {
  const int64_t at = block * kBlock, n = std::min(kBlock, piece.count - at);
  alignas(64) float x_run[kBlock], g_run[kBlock], m_run[kBlock], v_run[kBlock];
  alignas(64) uint32_t word_run[kBlock];

  char* param = piece.param + at * size_of(step.dtype);
  const char* grad = piece.grad + at * size_of(piece.grad_dtype);
  char* compensation =
      piece.layout.compensation < 0 ? nullptr : piece.state + piece.layout.compensation + 2 * at;
  float* x = x_run;
  const float* g = g_run;
  switch (step.dtype) {
    case LK_F32: x = reinterpret_cast<float*>(param); break;
    case LK_F16:
      read_params(reinterpret_cast<const Half*>(param), reinterpret_cast<const Half*>(compensation), n, x);
      break;
    default:
      read_params(reinterpret_cast<const BFloat16*>(param), reinterpret_cast<const BFloat16*>(compensation),
                  n, x);
  }
  if (piece.grad_dtype == LK_F32) {
    g = reinterpret_cast<const float*>(grad);
  } else {
    read_floats(grad, piece.grad_dtype, 0, n, g_run);
  }

  if (is_8bit(step.op)) {
    uint8_t* codes1 = reinterpret_cast<uint8_t*>(piece.state + piece.layout.state1) + at;
    float* absmax1 = reinterpret_cast<float*>(piece.state + piece.layout.absmax1) + block;
    decode(codes1, n, nf4::kDynamicMap, *absmax1, look_up, m_run);
    if (is_adamw(step.op)) {
      uint8_t* codes2 = reinterpret_cast<uint8_t*>(piece.state + piece.layout.state2) + at;
      float* absmax2 = reinterpret_cast<float*>(piece.state + piece.layout.absmax2) + block;
      decode(codes2, n, nf4::kUnsignedDynamicMap, *absmax2, look_up, v_run);
      update_adamw<true>(step.numbers, piece.correction, n, g, x, m_run, v_run);
      *absmax2 = encode<false>(v_run, n, look_up, codes2);
    } else {
      update_lion<true>(step.numbers, n, g, x, m_run);
    }
    *absmax1 = encode<true>(m_run, n, look_up, codes1);
  } else {
    float* m = reinterpret_cast<float*>(piece.state + piece.layout.state1) + at;
    if (is_adamw(step.op)) {
      float* v = reinterpret_cast<float*>(piece.state + piece.layout.state2) + at;
      update_adamw<false>(step.numbers, piece.correction, n, g, x, m, v);
    } else {
      update_lion<false>(step.numbers, n, g, x, m);
    }
  }

  if (step.dtype == LK_F32) return;
  const bool random = step.rounding == LK_STOCHASTIC;
  if (random) random_words(piece.first + at, piece.stream, step.seed, word_run);
  const uint32_t* words = random ? word_run : nullptr;
  if (step.dtype == LK_F16) {
    write_params(x, n, words, reinterpret_cast<Half*>(param), reinterpret_cast<Half*>(compensation));
  } else {
    write_params(x, n, words, reinterpret_cast<BFloat16*>(param), reinterpret_cast<BFloat16*>(compensation));
  }
}

// Blocks [begin, end) of all pieces in a row.
LK_INLINE void update_blocks(const Step& step, int64_t begin, int64_t end, LookUp look_up) {
  const auto after = std::upper_bound(step.pieces.begin(), step.pieces.end(), begin,
                                      [](int64_t block, const Piece& p) { return block < p.first_block; });
  const Piece* piece = &*(after - 1);
  int64_t last = piece->first_block + blocks_of(piece->count);
  for (int64_t block = begin; block < end; ++block) {
    while (block >= last) ++piece, last = piece->first_block + blocks_of(piece->count);
    update_block(step, *piece, block - piece->first_block, look_up);
  }
}

using UpdateBlocks = void (*)(const Step& step, int64_t begin, int64_t end);
void update_portable(const Step& step, int64_t begin, int64_t end) {
  update_blocks(step, begin, end, look_up_portable);
}
#if defined(__x86_64__)
LK_AVX2 void update_avx2(const Step& step, int64_t begin, int64_t end) {
  update_blocks(step, begin, end, look_up_avx2);
}
LK_AVX512 void update_avx512(const Step& step, int64_t begin, int64_t end) {
  update_blocks(step, begin, end, look_up_avx512);
}
#endif

UpdateBlocks kernel() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) return update_avx512;
  if (isa() >= Isa::avx2) return update_avx2;
#endif
  return update_portable;
}

int64_t& tick_of(const lk_optim_page& page) { return *static_cast<int64_t*>(page.data); }

// The pieces of pages that are not done yet.
Step prepare(const lk_optim_step& s) {
  Step step{s.op, s.dtype, s.rounding, static_cast<uint64_t>(s.seed), numbers_of(s), {}};
  step.pieces.reserve(static_cast<size_t>(s.segment_count));
  int64_t known = 0;  // the step that `correction` is of: most parameters are at the same one
  Correction correction{};
  for (int64_t i = 0; i < s.segment_count; ++i) {
    const lk_optim_segment& row = s.segments[i];
    if (row.count == 0 || tick_of(s.pages[row.page]) == s.tick) continue;
    if (row.step != known) known = row.step, correction = correction_of(s, known);
    const lk_optim_parameter& parameter = s.parameters[row.parameter];
    step.pieces.push_back(
        {static_cast<char*>(parameter.param) + row.first * size_of(s.dtype),
         static_cast<const char*>(parameter.grad) + row.first * size_of(parameter.grad_dtype),
         static_cast<char*>(s.pages[row.page].data) + row.offset,
         state_layout(s.op, row.count, s.dtype, s.rounding), row.first, row.count, step.blocks,
         parameter.grad_dtype, correction, stream_of(row.step, row.id)});
    step.blocks += blocks_of(row.count);
  }
  return step;
}

}  // namespace
}  // namespace lk::cpu

extern "C" int lk_cpu_optim_step(const lk_optim_step* s) {
  using namespace lk::cpu;
  if (!table_fits(*s)) return LK_BAD_ARGUMENTS;
  const Step step = prepare(*s);
  const UpdateBlocks update = kernel();
  parallel_for(step.blocks, kGrain, [&](int64_t begin, int64_t end) { update(step, begin, end); });
  for (int64_t i = 0; i < s->page_count; ++i) tick_of(s->pages[i]) = s->tick;
  return LK_OK;
}

extern "C" void lk_optim_state_layout(int op, int64_t count, int dtype, int rounding, int64_t offsets[5],
                                      int64_t* bytes) {
  const lk::optim::StateLayout layout = lk::optim::state_layout(op, count, dtype, rounding);
  const int64_t parts[5] = {layout.state1, layout.absmax1, layout.state2, layout.absmax2,
                            layout.compensation};
  std::copy(parts, parts + 5, offsets);
  *bytes = layout.bytes;
}
