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
#include "dropout.cuh"

namespace lk::cuda {
namespace {

constexpr int kThreads = 256;

struct Problem {
  int64_t n, first;
  Dropout dropout;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    dropout_aligned(const Problem p, Global<const T> x, Global<T> out) {
  constexpr int kElements = 16 / sizeof(T);
  const int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) * kElements;
  if (i >= p.n) return;
  const Mask mask(p.dropout);
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
  const uint32_t low = mask.kept4(counter);
  if constexpr (sizeof(T) == 4) {
    bits = make_uint4(low & 1 ? bits.x : 0, low & 2 ? bits.y : 0, low & 4 ? bits.z : 0, low & 8 ? bits.w : 0);
  } else {
    bits = keep_eight(bits, low | mask.kept4(counter + 1) << 4);
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
  out[i] = Mask(p.dropout).kept4(element / 4) >> element % 4 & 1 ? T{x[i]} : T{0};
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
  const Problem problem{n, first, {lk::Global<const int64_t>(rng), lk::dropout_threshold(p)}};
  switch (dtype) {
    case LK_F32: return dropout<uint32_t>(problem, x, out, stream);
    case LK_F16:
    case LK_BF16: return dropout<uint16_t>(problem, x, out, stream);
  }
  return LK_UNSUPPORTED_DTYPE;
}
