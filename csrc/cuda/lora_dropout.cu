// lora_dropout on a GPU: out[i] = x[i] where the Philox word of element first + i is kept, else 0. Not
// scaled.
//
//   element e reads word e % 4 of philox(counter = (e / 4, offset), key = seed), kept where word >= floor(p *
//   2^32)
//
// Aligned kernel (first divisible by 4, x and out on 16 bytes): a thread owns 16 bytes, 4 fp32 or 8 16-bit
// elements, one or two counters:
//
//     thread t:  16 bytes of x ──ten rounds per four elements──> mask ──and──> 16 bytes of out
//
// General kernel: a thread owns one element. Bytes: every element read and written once, so the floor is that
// of a copy; a counter takes about 100 integer instructions, 12 to 25 an element.
#include "../philox.h"
#include "ptx.cuh"

namespace lk::cuda {
namespace {

constexpr int kThreads = 256;

struct Problem {
  int64_t n, first;
  uint32_t threshold;
  Global<const int64_t> rng;  // [2] (seed, offset)
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    dropout_aligned(const Problem p, Global<const T> x, Global<T> out) {
  constexpr int kElements = 16 / sizeof(T);
  const int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) * kElements;
  if (i >= p.n) return;
  const uint64_t seed = static_cast<uint64_t>(p.rng[0]), offset = static_cast<uint64_t>(p.rng[1]);
  const uint64_t counter = static_cast<uint64_t>(p.first + i) / 4;
  const bool whole = i + kElements <= p.n;
  uint4 bits = make_uint4(0, 0, 0, 0);
  if (whole) {
    bits = ptx::load_stream(cast<const uint4>(x + i));
  } else {
    for (int e = 0; i + e < p.n; ++e) {
      const uint32_t piece = sizeof(T) == 4 ? cast<const uint32_t>(x + i)[e] : cast<const uint16_t>(x + i)[e];
      const int place = e * static_cast<int>(sizeof(T)) * 8;
      uint32_t& word = place < 32 ? bits.x : place < 64 ? bits.y : place < 96 ? bits.z : bits.w;
      word |= piece << place % 32;
    }
  }
  const PhiloxWords low = philox4x32_10(counter, offset, seed);
  const auto keep = [&](uint32_t word) { return word >= p.threshold; };
  if constexpr (sizeof(T) == 4) {
    bits = make_uint4(keep(low.w[0]) ? bits.x : 0, keep(low.w[1]) ? bits.y : 0, keep(low.w[2]) ? bits.z : 0,
                      keep(low.w[3]) ? bits.w : 0);
  } else {
    const PhiloxWords high = philox4x32_10(counter + 1, offset, seed);
    const auto pair = [&](uint32_t two, uint32_t first, uint32_t second) {
      return two & ((keep(first) ? 0xffffu : 0u) | (keep(second) ? 0xffff0000u : 0u));
    };
    bits = make_uint4(pair(bits.x, low.w[0], low.w[1]), pair(bits.y, low.w[2], low.w[3]),
                      pair(bits.z, high.w[0], high.w[1]), pair(bits.w, high.w[2], high.w[3]));
  }
  if (whole) {
    cast<uint4>(out + i)[0] = bits;
  } else {
    for (int e = 0; i + e < p.n; ++e) {
      const int place = e * static_cast<int>(sizeof(T)) * 8;
      const uint32_t word = place < 32 ? bits.x : place < 64 ? bits.y : place < 96 ? bits.z : bits.w;
      out[i + e] = static_cast<T>(word >> place % 32);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    dropout_general(const Problem p, Global<const T> x, Global<T> out) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= p.n) return;
  const uint64_t element = static_cast<uint64_t>(p.first + i);
  const PhiloxWords words =
      philox4x32_10(element / 4, static_cast<uint64_t>(p.rng[1]), static_cast<uint64_t>(p.rng[0]));
  const int w = static_cast<int>(element % 4);
  const uint32_t word = w == 0 ? words.w[0] : w == 1 ? words.w[1] : w == 2 ? words.w[2] : words.w[3];
  out[i] = word >= p.threshold ? T{x[i]} : T{0};
}

// T: an unsigned integer of the dtype's size; only bits are moved.
template <class T>
int dropout(const Problem& p, const void* x, void* out, void* stream) {
  if (p.n == 0) return LK_OK;
  const bool aligned = p.first % 4 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const int64_t per_block = kThreads * (aligned ? 16 / static_cast<int64_t>(sizeof(T)) : 1);
  const LaunchShape shape{static_cast<unsigned>((p.n + per_block - 1) / per_block), 1, 1, kThreads};
  return launch("lora_dropout", aligned ? dropout_aligned<T> : dropout_general<T>, shape, stream, p,
                Global<const T>(static_cast<const T*>(x)), Global<T>(static_cast<T*>(out)));
}

}  // namespace
}  // namespace lk::cuda

extern "C" int lk_cuda_lora_dropout(const void* x, int dtype, int64_t n, int64_t first, double p,
                                    const int64_t* rng, void* out, void* stream) {
  using namespace lk::cuda;
  const Problem problem{n, first, lk::dropout_threshold(p), lk::Global<const int64_t>(rng)};
  switch (dtype) {
    case LK_F32: return dropout<uint32_t>(problem, x, out, stream);
    case LK_F16:
    case LK_BF16: return dropout<uint16_t>(problem, x, out, stream);
  }
  return LK_UNSUPPORTED_DTYPE;
}
