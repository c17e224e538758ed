// Random problems for the kernels of csrc/cuda on the stand-in, checked against plain loops in double: for
// the proofs in this folder, the sanitizer build, and for gdb. No torch, no Python.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/api.h"
#include "../../csrc/cuda/ptx.cuh"
#include "../../csrc/nf4.h"
#include "../../csrc/optim_table.h"
#include "../../csrc/philox.h"

namespace problems {

using Rng = std::mt19937_64;

struct Wrong : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline int64_t between(Rng& rng, int64_t low, int64_t high) {
  return low + static_cast<int64_t>(rng() % static_cast<uint64_t>(high - low + 1));
}
inline float normal(Rng& rng) { return std::normal_distribution<float>()(rng); }

inline uint16_t to_16(int dtype, float x) {
  return dtype == LK_BF16 ? lk::ptx::cvt_rn_bf16(x) : lk::ptx::cvt_rn_f16(x);
}
inline float from_16(int dtype, uint16_t x) {
  return dtype == LK_BF16 ? lk::ptx::from_bf16(x) : lk::ptx::from_f16(x);
}

// Memory for one launch; registered with the stand-in under a name. Exactly as large as asked for.
template <class T>
struct Buffer {
  std::unique_ptr<T[]> data;
  size_t size;
  explicit Buffer(size_t n) : data(std::make_unique<T[]>(n)), size(n) {}
  T& operator[](size_t i) { return data[i]; }
  const T& operator[](size_t i) const { return data[i]; }
  T* get() { return data.get(); }
  void use(const char* name, simt::Use how) {
    if (size > 0) simt::add_memory(name, data.get(), size * sizeof(T), how);
  }
};

inline void check_status(int status) {
  if (status == LK_LAUNCH_FAILED) throw Wrong(lk::cuda::last_error());
  if (status != LK_OK) throw Wrong("status " + std::to_string(status));
}

// Forgets the memory of the launch at the end, however it ends.
struct Memory {
  Memory() { simt::clear_memory(); }
  ~Memory() { simt::clear_memory(); }
};

struct Nf4 {
  int64_t n, blocksize;
  bool nested;
  Buffer<uint8_t> packed, codes;
  Buffer<float> absmax, nested_absmax, offset;

  static int64_t blocks(int64_t n, int64_t blocksize) { return (n + blocksize - 1) / blocksize; }
  Nf4(Rng& rng, int64_t elements, int64_t block, bool is_nested)
      : n(elements),
        blocksize(block),
        nested(is_nested),
        packed((n + 1) / 2),
        codes(nested ? blocks(n, block) : 0),
        absmax(nested ? 0 : blocks(n, block)),
        nested_absmax(nested ? blocks(blocks(n, block), 256) : 0),
        offset(nested ? 1 : 0) {
    for (size_t i = 0; i < packed.size; ++i) packed[i] = static_cast<uint8_t>(rng());
    for (size_t i = 0; i < codes.size; ++i) codes[i] = static_cast<uint8_t>(rng());
    for (size_t i = 0; i < absmax.size; ++i) absmax[i] = 0.05f + std::abs(normal(rng));
    for (size_t i = 0; i < nested_absmax.size; ++i) nested_absmax[i] = 0.1f + 0.2f * std::abs(normal(rng));
    if (nested) offset[0] = 0.5f;
  }
  float scale(int64_t block) const {
    if (!nested) return absmax[block];
    return lk::nf4::kDynamicMap[codes[block]] * nested_absmax[block / 256] + offset[0];
  }
  double weight(int64_t i) const {
    const int nibble = i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15;
    return static_cast<double>(lk::nf4::kCodebook[nibble]) * scale(i / blocksize);
  }
  lk_nf4_weight view() {
    using simt::Use;
    packed.use("packed", Use::input), codes.use("absmax", Use::input), absmax.use("absmax", Use::input);
    nested_absmax.use("nested_absmax", Use::input), offset.use("offset", Use::input);
    return {packed.get(), nested ? static_cast<const void*>(codes.get()) : absmax.get(),
            nested ? nested_absmax.get() : nullptr, nested ? offset.get() : nullptr, blocksize};
  }
};

// nf4_dequantize of a random rectangle: aligned or ragged.
inline void dequantize(Rng& rng) {
  const bool aligned = rng() % 2 == 0;
  const int64_t unit = aligned ? 16 : 1, k = unit * between(rng, 1, aligned ? 12 : 150),
                n = between(rng, 1, 40);
  Nf4 w(rng, n * k, int64_t{32} << between(rng, 0, 3), rng() % 2 == 0);
  const int64_t row = between(rng, 0, n - 1), col = unit * between(rng, 0, k / unit - 1);
  const lk_region region = {k, row, between(rng, 1, n - row), col, unit * between(rng, 1, (k - col) / unit)};
  const int dtype = static_cast<int>(rng() % 3);
  const size_t size = dtype == LK_F32 ? 4 : 2;
  Memory memory;
  Buffer<uint32_t> out((region.rows * region.cols * size + 3) / 4);
  simt::add_memory("out", out.get(), region.rows * region.cols * size, simt::Use::output);
  const lk_nf4_weight weight = w.view();
  check_status(lk_cuda_nf4_dequantize(&weight, &region, out.get(), dtype, region.cols, nullptr));
  simt::check_outputs_written();
  for (int64_t r = 0; r < region.rows; ++r) {
    for (int64_t c = 0; c < region.cols; ++c) {
      const int64_t i = (row + r) * k + col + c, o = r * region.cols + c;
      const float want = static_cast<float>(w.weight(i));
      const bool same = dtype == LK_F32 ? reinterpret_cast<float*>(out.get())[o] == want
                                        : reinterpret_cast<uint16_t*>(out.get())[o] == to_16(dtype, want);
      if (!same)
        throw Wrong("nf4_dequantize: wrong weight at " + std::to_string(r) + ", " + std::to_string(c));
    }
  }
}

// nf4_quantize and its second level, several launches on the same scratch: codes and scales byte for byte.
inline void quantize(Rng& rng) {
  // Blocks that warps share and blocks that lanes share; scales whose mean is half way between two floats.
  const bool tie = rng() % 3 == 0;
  const int64_t blocksize = tie || rng() % 3 == 0 ? 32 : int64_t{32} << between(rng, 0, 7);
  const int64_t n = tie ? 64 * between(rng, 1, 3000) : between(rng, 1, rng() % 4 == 0 ? 200000 : 9000);
  lk::cuda::pretended_device() = {1, 80};
  const int64_t blocks = Nf4::blocks(n, blocksize), nested = Nf4::blocks(blocks, 256);
  const int dtype = tie ? LK_F32 : static_cast<int>(rng() % 3);
  Buffer<float> values(n);
  Buffer<uint16_t> halves(n);
  Buffer<uint64_t> scratch(2 + LK_NF4_PARTIAL_SUMS);
  for (int launch = 0; launch < 2; ++launch) {
    for (int64_t i = 0; i < n; ++i) {
      values[i] = rng() % 7 == 0 ? 0 : normal(rng);
      if (tie)
        values[i] = i % 32 != 0   ? std::clamp(values[i], -1.0f, 1.0f)
                    : i % 64 == 0 ? 1.0f
                                  : std::nextafter(1.0f, 2.0f);
      if (dtype != LK_F32) values[i] = from_16(dtype, halves[i] = to_16(dtype, values[i]));
    }
    Buffer<uint8_t> packed((n + 1) / 2), codes(blocks);
    Buffer<float> absmax(blocks), nested_absmax(nested), offset(1);
    scratch[0] = scratch[1] = 0;
    Memory memory;
    using simt::Use;
    values.use("weight", Use::input), halves.use("weight", Use::input), packed.use("packed", Use::output);
    absmax.use("absmax", Use::output), codes.use("codes", Use::output), offset.use("offset", Use::output);
    nested_absmax.use("nested_absmax", Use::output), scratch.use("scratch", Use::inout);
    const void* weight = dtype == LK_F32 ? static_cast<const void*>(values.get()) : halves.get();
    auto* words = reinterpret_cast<uint32_t*>(scratch.get());
    check_status(
        lk_cuda_nf4_quantize(weight, dtype, n, blocksize, packed.get(), absmax.get(), words, nullptr));
    check_status(lk_cuda_nf4_quantize_absmax(absmax.get(), blocks, codes.get(), nested_absmax.get(),
                                             offset.get(), words + 2,
                                             reinterpret_cast<double*>(scratch.get() + 2), nullptr));
    simt::check_outputs_written();
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * blocksize, last = std::min(n, first + blocksize);
      float most = 0;
      for (int64_t i = first; i < last; ++i) most = std::max(most, std::abs(values[i]));
      const float floor = std::max(most, lk::nf4::kMinAbsmax);
      const bool whole = last - first == blocksize;
      if (absmax[b] != (whole ? most : floor)) throw Wrong("nf4_quantize: wrong absmax");
      sum += absmax[b];
      for (int64_t i = first; i < last; ++i) {
        const float scaled = std::clamp(whole ? values[i] * (1 / floor) : values[i] / floor, -1.0f, 1.0f);
        int code = 0;
        for (const float middle : lk::nf4::kMidpoints) code += scaled > middle;
        if ((i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15) != code)
          throw Wrong("nf4_quantize: wrong code");
      }
    }
    if (offset[0] != static_cast<float>(sum / static_cast<double>(blocks)))
      throw Wrong("nf4_quantize: wrong offset");
    for (int64_t b = 0; b < blocks; ++b) {
      float most = 0;
      for (int64_t i = b / 256 * 256; i < std::min(blocks, (b / 256 + 1) * 256); ++i) {
        most = std::max(most, std::abs(absmax[i] - offset[0]));
      }
      if (nested_absmax[b / 256] != most) throw Wrong("nf4_quantize: wrong nested_absmax");
      int code = 0;
      for (int j = 0; j < 255; ++j) {
        const double middle = (double{lk::nf4::kDynamicMap[j]} + lk::nf4::kDynamicMap[j + 1]) / 2;
        code += double{absmax[b] - offset[0]} > middle * most;
      }
      if (codes[b] != code) throw Wrong("nf4_quantize: wrong code of a scale");
    }
  }
}

// lora_dropout of a piece of a longer input, in place or not.
inline void dropout(Rng& rng) {
  const int64_t n = between(rng, 1, 3000),
                first = rng() % 2 == 0 ? 4 * between(rng, 0, 9) : between(rng, 0, 9);
  const int dtype = rng() % 2 == 0 ? LK_F32 : LK_BF16;
  const double p = 0.3;
  Buffer<float> x(n), out(n);  // of the first half where elements have 16 bits
  const size_t size = dtype == LK_F32 ? 4 : 2;
  Buffer<int64_t> key(2);
  key[0] = static_cast<int64_t>(rng() >> 1), key[1] = static_cast<int64_t>(rng() >> 1);
  for (int64_t i = 0; i < n; ++i) x[i] = 1 + std::abs(normal(rng));
  Memory memory;
  simt::add_memory("x", x.get(), n * size, simt::Use::input);
  simt::add_memory("out", out.get(), n * size, simt::Use::output);
  key.use("rng", simt::Use::input);
  check_status(lk_cuda_lora_dropout(x.get(), dtype, n, first, p, key.get(), out.get(), nullptr));
  simt::check_outputs_written();
  const auto* from = reinterpret_cast<const char*>(x.get());
  const auto* to = reinterpret_cast<const char*>(out.get());
  for (int64_t i = 0; i < n; ++i) {
    const auto words = lk::philox4x32_10(static_cast<uint64_t>(first + i) / 4, static_cast<uint64_t>(key[1]),
                                         static_cast<uint64_t>(key[0]));
    const bool keep = words.w[(first + i) % 4] >= lk::dropout_threshold(p);
    const char zero[4] = {};
    if (std::memcmp(to + i * size, keep ? from + i * size : zero, size) != 0)
      throw Wrong("lora_dropout: wrong element");
  }
}

enum class Kernel { decode, decode_clustered, mixed, mixed_given_h };

// lora_linear by one of its kernels, several launches one after the other on the same counters.
inline void lora_linear(Rng& rng, Kernel kernel) {
  const bool clustered = kernel == Kernel::decode_clustered;
  const bool mixed = kernel == Kernel::mixed || kernel == Kernel::mixed_given_h,
             given = kernel == Kernel::mixed_given_h;
  const int dtype = rng() % 2 == 0 ? LK_BF16 : LK_F16;
  const bool nf4 = rng() % 2 == 0, biased = rng() % 2 == 0;
  const int64_t tokens = mixed ? between(rng, 1, 70) : between(rng, 1, 8), k = 64 * between(rng, 1, 22);
  const int64_t n = between(rng, 1, 150);
  const int64_t rank = given   ? between(rng, 1, rng() % 8 == 0 ? 256 : 50)
                       : mixed ? between(rng, 0, 16)
                               : between(rng, 0, 2) * between(rng, 1, 17);
  lk::cuda::pretended_device() = {static_cast<int>(between(rng, 1, rng() % 2 == 0 ? 24 : 2)),
                                  clustered ? 90 : 86};
  Buffer<uint16_t> x(tokens * k), dense(nf4 ? 0 : n * k), bias(biased ? n : 0), A(rank * k), B(n * rank);
  Nf4 w(rng, nf4 ? n * k : 64, 64, rng() % 2 == 0);
  for (auto* buffer : {&x, &dense, &bias, &A, &B}) {
    for (size_t i = 0; i < buffer->size; ++i) (*buffer)[i] = to_16(dtype, normal(rng));
  }
  const double scaling = 0.5;
  const lk_scratch space = mixed ? lk_cuda_lora_linear_mixed_scratch(tokens, n, k, rank)
                                 : lk_cuda_lora_linear_decode_scratch(tokens, n, k, rank, nf4, clustered);
  Buffer<uint32_t> counters(space.counters), workspace(space.workspace / 4);
  Buffer<uint16_t> y(tokens * n), h(tokens * rank);
  std::vector<double> low(tokens * rank);  // h in double
  for (int64_t i = 0; i < tokens * rank; ++i) {
    for (int64_t c = 0; c < k; ++c) {
      low[i] += double{from_16(dtype, x[i / rank * k + c])} * from_16(dtype, A[i % rank * k + c]);
    }
    if (given) h[i] = to_16(dtype, static_cast<float>(low[i]));
  }
  for (int launch = 0; launch < 2; ++launch) {
    Memory memory;
    using simt::Use;
    x.use("x", Use::input), dense.use("weight", Use::input), bias.use("bias", Use::input);
    A.use("lora_A", Use::input), B.use("lora_B", Use::input), y.use("y", Use::output);
    h.use("h", given ? Use::input : Use::output);
    counters.use("counters", Use::inout), workspace.use("workspace", Use::output);
    const lk_nf4_weight weight = nf4 ? w.view() : lk_nf4_weight{};
    const lk_base_weight base = {nf4 ? &weight : nullptr, {dense.get(), dtype, k}, n, k};
    const lk_adapter adapter = {{A.get(), dtype, k}, {B.get(), dtype, rank}, rank, scaling, 0, nullptr};
    const lk_matrix rows = {x.get(), dtype, k}, addend = {biased ? bias.get() : nullptr, dtype, n};
    check_status(mixed       ? lk_cuda_lora_linear_mixed(
                                   &rows, tokens, &base, &adapter, &addend, given ? h.get() : nullptr, y.get(),
                                   given ? nullptr : h.get(), workspace.get(), counters.get(), nullptr)
                 : clustered ? lk_cuda_lora_linear_decode_clustered(&rows, tokens, &base, &adapter, &addend,
                                                                    y.get(), h.get(), nullptr)
                             : lk_cuda_lora_linear_decode(&rows, tokens, &base, &adapter, &addend, y.get(),
                                                          h.get(), workspace.get(), counters.get(), nullptr));
    simt::check_outputs_written();
    // Norms of rows of K terms of unit variance; a wrong fragment, row or slice is off by much more.
    const double unit = dtype == LK_BF16 ? 8e-3 : 2e-3;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t r = 0; r < rank; ++r) {
        const double want = low[t * rank + r], got = from_16(dtype, h[t * rank + r]);
        if (!(std::abs(got - want) <= unit * (std::abs(want) + std::sqrt(double(k))))) throw Wrong("wrong h");
      }
      for (int64_t o = 0; o < n; ++o) {
        double sum = biased ? from_16(dtype, bias[o]) : 0, size = 1;
        for (int64_t c = 0; c < k; ++c) {
          const double product = from_16(dtype, x[t * k + c]) *
                                 (nf4 ? w.weight(o * k + c) : double{from_16(dtype, dense[o * k + c])});
          sum += product, size += product * product;
        }
        for (int64_t r = 0; r < rank; ++r) {
          const double product = scaling * low[t * rank + r] * from_16(dtype, B[o * rank + r]);
          sum += product, size += product * product;
        }
        const double got = from_16(dtype, y[t * n + o]);
        if (!(std::abs(got - sum) <= unit * (std::abs(sum) + std::sqrt(size)))) {
          throw Wrong("wrong y[" + std::to_string(t) + ", " + std::to_string(o) +
                      "]: " + std::to_string(got) + ", expected " + std::to_string(sum));
        }
      }
    }
  }
}

// ---- the low-rank products
// ---------------------------------------------------------------------------------

// A matrix [rows, cols] of any dtype, rows `stride` apart.
struct AnyMatrix {
  int64_t rows, cols, stride;
  int dtype;
  Buffer<float> wide;
  Buffer<uint16_t> narrow;
  AnyMatrix(Rng& rng, int64_t r, int64_t c, int type, int64_t extra = 0)
      : rows(r),
        cols(c),
        stride(c + extra),
        dtype(type),
        wide(type == LK_F32 ? r * stride : 0),
        narrow(type == LK_F32 ? 0 : r * stride) {
    for (size_t i = 0; i < wide.size; ++i) wide[i] = normal(rng);
    for (size_t i = 0; i < narrow.size; ++i) narrow[i] = to_16(type, normal(rng));
  }
  double operator()(int64_t r, int64_t c) const {
    const size_t i = r * stride + c;
    return dtype == LK_F32 ? wide[i] : from_16(dtype, narrow[i]);
  }
  lk_matrix view() {
    return {dtype == LK_F32 ? static_cast<void*>(wide.get()) : narrow.get(), dtype, stride};
  }
  lk_matrix use(const char* name, simt::Use how) {
    wide.use(name, how), narrow.use(name, how);
    return view();
  }
};

// One adapter of every row, or several whose rows are sorted; some rows are nobody's, some adapters have
// none.
struct Adapters {
  int64_t tokens;
  bool sorted;
  std::vector<int64_t> rank;
  std::vector<double> scaling;
  std::vector<int> of_row;
  int64_t most = 0;
  Buffer<int64_t> order, begins;
  Adapters(Rng& rng, int64_t rows)
      : tokens(rows),
        sorted(rng() % 2 == 0),
        rank(sorted ? between(rng, 1, 4) : 1),
        of_row(rows, 0),
        order(sorted ? rows : 0),
        begins(sorted ? rank.size() + 1 : 0) {
    for (auto& r : rank) {
      r = between(rng, rng() % 4 == 0 && sorted ? 0 : 1, rng() % 6 == 0 ? 130 : 18);
      scaling.push_back(0.25 + static_cast<double>(rng() % 8) / 4);
      most = std::max(most, r);
    }
    if (!sorted) return;
    const int64_t adapters = static_cast<int64_t>(rank.size());
    const bool uneven = rng() % 2 == 0;
    for (auto& a : of_row)
      a = static_cast<int>(uneven && rng() % 8 != 0 ? 0 : between(rng, -1, adapters - 1));
    size_t next = 0;
    for (int a = -1; a < adapters; ++a) {
      if (a >= 0) begins[a] = static_cast<int64_t>(next);
      for (int64_t t = 0; t < rows; ++t) {
        if (of_row[t] == a) order[next++] = t;
      }
    }
    begins[adapters] = static_cast<int64_t>(next);
  }
  lk_rows view() {
    order.use("order", simt::Use::input), begins.use("begins", simt::Use::input);
    return {tokens, sorted ? order.get() : nullptr, sorted ? begins.get() : nullptr,
            static_cast<int64_t>(rank.size())};
  }
};

// The mask of a random key: kept(element).
struct Drawn {
  double p;
  Buffer<int64_t> key;
  explicit Drawn(Rng& rng) : p(rng() % 2 == 0 ? 0.3 : 0), key(2) {
    key[0] = static_cast<int64_t>(rng() >> 1), key[1] = static_cast<int64_t>(rng() >> 1);
  }
  bool kept(int64_t i) const {
    const auto words = lk::philox4x32_10(static_cast<uint64_t>(i) / 4, static_cast<uint64_t>(key[1]),
                                         static_cast<uint64_t>(key[0]));
    return words.w[i % 4] >= lk::dropout_threshold(p);
  }
  const int64_t* view() {
    if (p > 0) key.use("rng", simt::Use::input);
    return p > 0 ? key.get() : nullptr;
  }
};

// A sum of products, and what an error of it is measured by.
struct Sum {
  double value = 0, squares = 1;
  void add(double product) { value += product, squares += product * product; }
  void check(const char* name, int64_t i, int64_t j, double got, int dtype) const {
    const double unit = dtype == LK_BF16 ? 8e-3 : 2e-3;
    if (!(std::abs(got - value) <= unit * (std::abs(value) + std::sqrt(squares)))) {
      throw Wrong(std::string("wrong ") + name + "[" + std::to_string(i) + ", " + std::to_string(j) +
                  "]: " + std::to_string(got) + ", expected " + std::to_string(value));
    }
  }
};

inline int any_16(Rng& rng) { return rng() % 2 == 0 ? LK_BF16 : LK_F16; }
inline int any_dtype(Rng& rng, int dtype) {
  return rng() % 3 == 0 ? LK_F32 : rng() % 4 == 0 ? LK_F16 : dtype;
}
// Aligned or not, of one strip of columns or of two.
inline int64_t any_columns(Rng& rng) {
  const int64_t most = rng() % 4 == 0 ? 90 : 40;
  return rng() % 2 == 0 ? 8 * between(rng, 1, most) : between(rng, 1, 6 * most);
}
inline void any_device(Rng& rng) {
  lk::cuda::pretended_device() = {static_cast<int>(between(rng, 1, rng() % 2 == 0 ? 40 : 3)), 86};
}

inline void shrink(Rng& rng) {
  const int dtype = any_16(rng);
  const int64_t k = any_columns(rng) * between(rng, 1, 4);
  any_device(rng);
  Adapters adapters(rng, between(rng, 1, 150));
  Drawn mask(rng);
  AnyMatrix x(rng, adapters.tokens, k, dtype, rng() % 4 == 0 ? between(rng, 0, 9) : 0);
  std::vector<AnyMatrix> A;
  for (const int64_t r : adapters.rank) A.emplace_back(rng, r, k, any_dtype(rng, dtype));
  const int64_t stride = adapters.most + between(rng, 0, 2);
  const int64_t count = static_cast<int64_t>(adapters.rank.size());
  const lk_scratch space =
      lk_cuda_lora_shrink_scratch(adapters.tokens, count, adapters.sorted, k, adapters.most);
  Buffer<uint32_t> counters(space.counters), workspace(space.workspace / 4);
  Buffer<uint16_t> h(adapters.tokens * stride);
  for (int launch = 0; launch < 2; ++launch) {
    for (size_t i = 0; i < h.size; ++i) h[i] = 0x1234;
    Memory memory;
    using simt::Use;
    const lk_matrix from = x.use("x", Use::input);
    h.use("h", Use::inout), counters.use("counters", Use::inout), workspace.use("workspace", Use::output);
    std::vector<lk_adapter> views;
    for (int64_t a = 0; a < count; ++a) {
      views.push_back(
          {A[a].use("lora_A", Use::input), {}, adapters.rank[a], adapters.scaling[a], mask.p, mask.view()});
    }
    const lk_rows rows = adapters.view();
    check_status(lk_cuda_lora_shrink(&from, k, &rows, views.data(), h.get(), stride, workspace.get(),
                                     counters.get(), nullptr));
    for (int64_t t = 0; t < adapters.tokens; ++t) {
      const int a = adapters.of_row[t];
      for (int64_t r = 0; r < stride; ++r) {
        const uint16_t got = h[t * stride + r];
        if (a < 0 || r >= adapters.rank[a]) {
          if (got != 0x1234) throw Wrong("lora_shrink wrote an element of no adapter");
          continue;
        }
        Sum sum;
        for (int64_t c = 0; c < k; ++c) {
          if (mask.kept(t * k + c)) sum.add(adapters.scaling[a] * x(t, c) * A[a](r, c));
        }
        sum.check("h", t, r, from_16(dtype, got), dtype);
      }
    }
  }
}

inline void expand(Rng& rng) {
  const int dtype = any_16(rng);
  const int64_t columns = any_columns(rng);
  const bool backward = rng() % 2 == 0, add = rng() % 2 == 0;
  any_device(rng);
  Adapters adapters(rng, between(rng, 1, 150));
  Drawn mask(rng);
  if (!backward) mask.p = 0;
  AnyMatrix v(rng, adapters.tokens, adapters.most, dtype, rng() % 3);
  std::vector<AnyMatrix> w;
  for (const int64_t r : adapters.rank) {
    w.emplace_back(rng, backward ? r : columns, backward ? columns : r, any_dtype(rng, dtype));
  }
  AnyMatrix out(rng, adapters.tokens, columns, dtype, rng() % 3 == 0 ? 3 : 0);
  const std::vector<uint16_t> before(out.narrow.get(), out.narrow.get() + out.narrow.size);
  Memory memory;
  using simt::Use;
  const lk_matrix from = v.use("v", Use::input), to = out.use("out", Use::inout);
  std::vector<lk_adapter> views;
  for (size_t a = 0; a < w.size(); ++a) {
    const lk_matrix weight = w[a].use("weights", Use::input);
    views.push_back({backward ? weight : lk_matrix{}, backward ? lk_matrix{} : weight, adapters.rank[a],
                     adapters.scaling[a], backward ? mask.p : 0, backward ? mask.view() : nullptr});
  }
  const lk_rows rows = adapters.view();
  check_status(lk_cuda_lora_expand(&from, &rows, views.data(), backward, add, const_cast<void*>(to.data),
                                   columns, out.stride, nullptr));
  for (int64_t t = 0; t < adapters.tokens; ++t) {
    const int a = adapters.of_row[t];
    for (int64_t c = 0; c < out.stride; ++c) {
      const size_t i = t * out.stride + c;
      if (a < 0 || c >= columns) {
        if (out.narrow[i] != before[i]) throw Wrong("lora_expand wrote an element of no adapter");
        continue;
      }
      Sum sum;
      if (add) sum.add(from_16(dtype, before[i]));
      for (int64_t r = 0; r < adapters.rank[a] && (!backward || mask.kept(t * columns + c)); ++r) {
        sum.add(v(t, r) * (backward ? w[a](r, c) : adapters.scaling[a] * w[a](c, r)));
      }
      sum.check("out", t, c, from_16(dtype, out.narrow[i]), dtype);
    }
  }
}

// Both sweeps of the backward, with and without each of their outputs.
inline void sweep(Rng& rng, bool over_x) {
  const int dtype = any_16(rng);
  const int64_t columns = any_columns(rng);
  any_device(rng);
  Adapters adapters(rng, rng() % 4 == 0 ? between(rng, 150, 400) : between(rng, 1, 150));
  Drawn mask(rng);
  if (!over_x) mask.p = 0;
  const int64_t count = static_cast<int64_t>(adapters.rank.size());
  const bool with_g = !over_x && rng() % 4 != 0, with_bias = !over_x && !adapters.sorted && rng() % 2 == 0;
  AnyMatrix z(rng, adapters.tokens, columns, dtype, rng() % 4 == 0 ? between(rng, 0, 9) : 0);
  AnyMatrix v(rng, adapters.tokens, adapters.most, dtype, rng() % 3),
      g(rng, adapters.tokens, v.stride, dtype);
  std::vector<AnyMatrix> w, out;
  std::vector<bool> wanted;
  for (const int64_t r : adapters.rank) {
    w.emplace_back(rng, columns, r, any_dtype(rng, dtype));
    out.emplace_back(rng, over_x ? r : columns, over_x ? columns : r, any_dtype(rng, dtype));
    wanted.push_back(rng() % 4 != 0);
  }
  Buffer<float> bias(with_bias ? columns : 0);
  Memory memory;
  using simt::Use;
  const lk_rows rows = adapters.view();
  int64_t most = 0;
  for (int64_t a = 0; a < count; ++a) most = std::max(most, over_x && !wanted[a] ? 0 : adapters.rank[a]);
  const int64_t bytes = lk_cuda_lora_linear_backward_sweep_workspace(adapters.tokens, count, columns, most,
                                                                     with_g ? g.stride : 0);
  Buffer<uint32_t> workspace(bytes / 4);
  workspace.use("workspace", Use::output);
  const lk_matrix from = z.use(over_x ? "x" : "dy", Use::input), low = v.use(over_x ? "g" : "h", Use::input);
  std::vector<lk_adapter> views;
  std::vector<lk_matrix> gradients;
  for (int64_t a = 0; a < count; ++a) {
    const bool none = over_x && !wanted[a];
    views.push_back({{},
                     over_x ? lk_matrix{} : w[a].use("lora_B", Use::input),
                     none ? 0 : adapters.rank[a],
                     over_x ? 1 : adapters.scaling[a],
                     mask.p,
                     mask.view()});
    gradients.push_back(wanted[a] ? out[a].use(over_x ? "dA" : "dB", Use::output) : lk_matrix{});
  }
  if (over_x) {
    check_status(lk_cuda_lora_linear_backward_x(&from, columns, &rows, views.data(), &low, gradients.data(),
                                                workspace.get(), nullptr));
  } else {
    if (with_g) g.use("g", Use::inout);
    bias.use("dbias", Use::output);
    check_status(lk_cuda_lora_linear_backward_dy(
        &from, columns, &rows, views.data(), &low, with_g ? g.narrow.get() : nullptr, g.stride,
        gradients.data(), with_bias ? bias.get() : nullptr, workspace.get(), nullptr));
  }
  simt::check_outputs_written();
  for (int64_t a = 0; a < count; ++a) {
    for (int64_t c = 0; c < columns && wanted[a]; ++c) {
      for (int64_t r = 0; r < adapters.rank[a]; ++r) {
        Sum sum;
        for (int64_t t = 0; t < adapters.tokens; ++t) {
          if (adapters.of_row[t] != a || !mask.kept(t * columns + c)) continue;
          sum.add((over_x ? 1 : adapters.scaling[a]) * z(t, c) * v(t, r));
        }
        sum.check(over_x ? "dA" : "dB", r, c, over_x ? out[a](r, c) : out[a](c, r), out[a].dtype);
      }
    }
  }
  for (int64_t t = 0; t < adapters.tokens && with_g; ++t) {
    const int a = adapters.of_row[t];
    for (int64_t r = 0; a >= 0 && r < adapters.rank[a]; ++r) {
      Sum sum;
      for (int64_t c = 0; c < columns; ++c) sum.add(adapters.scaling[a] * z(t, c) * w[a](c, r));
      sum.check("g", t, r, g(t, r), dtype);
    }
  }
  for (int64_t c = 0; c < columns && with_bias; ++c) {
    Sum sum;
    for (int64_t t = 0; t < adapters.tokens; ++t) sum.add(z(t, c));
    sum.check("dbias", 0, c, bias[c], LK_F16);
  }
}

inline void backward_dx(Rng& rng) {
  const int dtype = any_16(rng);
  const bool nf4 = rng() % 2 == 0;
  const int64_t tokens = between(rng, 1, 70), k = 64 * between(rng, 1, 7);
  const int64_t n = rng() % 4 == 0 ? between(rng, 900, 1300) : between(rng, 1, 200);
  const int64_t rank = rng() % 4 == 0 ? 0 : between(rng, 1, 40);
  lk::cuda::pretended_device() = {static_cast<int>(between(rng, 1, 24)), 86};
  Drawn mask(rng);
  AnyMatrix dy(rng, tokens, n, dtype, rng() % 3 == 0 ? between(rng, 0, 9) : 0);
  AnyMatrix g(rng, tokens, rank, dtype, rng() % 3);
  AnyMatrix dense(rng, nf4 ? 0 : n, k, dtype), A(rng, rank, k, dtype);
  Nf4 w(rng, nf4 ? n * k : 64, 64, rng() % 2 == 0);
  const lk_scratch space = lk_cuda_lora_linear_backward_dx_scratch(tokens, n, k);
  Buffer<uint32_t> counters(space.counters), workspace(space.workspace / 4);
  Buffer<uint16_t> dx(tokens * k);
  for (int launch = 0; launch < 2; ++launch) {
    Memory memory;
    using simt::Use;
    const lk_matrix from = dy.use("dy", Use::input), low = g.use("g", Use::input);
    dx.use("dx", Use::output);
    counters.use("counters", Use::inout), workspace.use("workspace", Use::output);
    const lk_nf4_weight weight = nf4 ? w.view() : lk_nf4_weight{};
    const lk_base_weight base = {nf4 ? &weight : nullptr, dense.use("weight", Use::input), n, k};
    const lk_adapter adapter = {A.use("lora_A", Use::input), {}, rank, 1, mask.p, mask.view()};
    check_status(lk_cuda_lora_linear_backward_dx(&from, tokens, &base, &adapter, low.data, g.stride, dx.get(),
                                                 workspace.get(), counters.get(), nullptr));
    simt::check_outputs_written();
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t c = 0; c < k; ++c) {
        Sum sum;
        for (int64_t o = 0; o < n; ++o) sum.add(dy(t, o) * (nf4 ? w.weight(o * k + c) : dense(o, c)));
        for (int64_t r = 0; r < rank && mask.kept(t * k + c); ++r) sum.add(g(t, r) * A(r, c));
        sum.check("dx", t, c, from_16(dtype, dx[t * k + c]), dtype);
      }
    }
  }
}

// ---- the optimizers' steps

// A piece of state in plain loops: what the kernel must give, to the bit.
struct OptimPiece {
  int op, dtype, rounding;
  lk::optim::Numbers k;
  lk::optim::Correction correction;
  lk_optim_segment row;
  uint64_t seed;

  static float get(const char* from, int dtype, int64_t i) {
    if (dtype == LK_F32) return reinterpret_cast<const float*>(from)[i];
    return from_16(dtype, reinterpret_cast<const uint16_t*>(from)[i]);
  }
  static void decode(const std::vector<char>& page, int64_t codes, int64_t absmax,
                     const std::array<float, 256>& map, std::vector<float>& out) {
    for (size_t i = 0; i < out.size(); ++i) {
      const uint8_t code = static_cast<uint8_t>(page[codes + i]);
      out[i] = map[code] * reinterpret_cast<const float*>(page.data() + absmax)[i / 256];
    }
  }
  static void encode(std::vector<char>& page, int64_t codes, int64_t absmax,
                     const std::array<float, 256>& map, const std::vector<float>& x) {
    for (size_t block = 0; block < x.size(); block += 256) {
      const size_t end = std::min(x.size(), block + 256);
      float most = 0;
      for (size_t i = block; i < end; ++i) most = std::max(most, std::abs(x[i]));
      reinterpret_cast<float*>(page.data() + absmax)[block / 256] = most;
      const float inverse = most < lk::optim::kMinAbsmax ? 0.0f : 1.0f / most;
      for (size_t i = block; i < end; ++i) {
        const double r = static_cast<double>(x[i] * inverse);
        int best = 0;
        for (int c = 1; c < 256; ++c) {
          const double now = std::abs(r - map[c]), before = std::abs(r - map[best]);
          if (now < before || (now == before && std::abs(map[c]) < std::abs(map[best]))) best = c;
        }
        page[codes + i] = static_cast<char>(best);
      }
    }
  }

  void run(std::vector<char>& param, const char* grad, int grad_dtype, std::vector<char>& page) const {
    const int64_t n = row.count;
    const auto layout = lk::optim::state_layout(op, n, dtype, rounding);
    const bool eight = lk::optim::is_8bit(op), adamw = lk::optim::is_adamw(op);
    const int64_t at1 = row.offset + layout.state1, at2 = row.offset + layout.state2;
    const int64_t absmax1 = row.offset + layout.absmax1, absmax2 = row.offset + layout.absmax2;
    std::vector<float> m(n), v(n);
    if (eight) {
      decode(page, at1, absmax1, lk::nf4::kDynamicMap, m);
      if (adamw) decode(page, at2, absmax2, lk::nf4::kUnsignedDynamicMap, v);
    }
    for (int64_t i = 0; i < n; ++i) {
      float* m_at = eight ? &m[i] : reinterpret_cast<float*>(page.data() + at1) + i;
      float* v_at = eight || !adamw ? &v[i] : reinterpret_cast<float*>(page.data() + at2) + i;
      const float g = get(grad, grad_dtype, row.first + i);
      float x = get(param.data(), dtype, row.first + i);
      uint16_t* lost = layout.compensation < 0
                           ? nullptr
                           : reinterpret_cast<uint16_t*>(page.data() + row.offset + layout.compensation) + i;
      if (lost != nullptr) x += from_16(dtype, *lost);
      const float c = k.beta1 * *m_at + k.rest1 * g;
      float new_m = c, new_v = 0, new_x;
      if (adamw) {
        new_v = k.beta2 * *v_at + k.rest2 * g * g;
        const float denominator = std::sqrt(new_v) * correction.root + k.eps;
        new_x = x * k.decay - correction.step_size * new_m / denominator;
      } else {
        new_x = x * k.decay - k.lr * (c > 0 ? 1.0f : c < 0 ? -1.0f : 0.0f);
        new_m = k.beta2 * *m_at + k.rest2 * g;
      }
      if (!eight || std::isfinite(adamw ? new_v : new_m)) *m_at = new_m, *v_at = new_v, x = new_x;
      if (dtype == LK_F32) {
        reinterpret_cast<float*>(param.data())[row.first + i] = x;
        continue;
      }
      uint16_t bits = to_16(dtype, x);
      if (rounding == LK_STOCHASTIC) {
        const uint64_t element = static_cast<uint64_t>(row.first + i);
        const auto words = lk::philox4x32_10(element / 4, lk::optim::stream_of(row.step, row.id), seed);
        const uint32_t all = std::bit_cast<uint32_t>(x), magnitude = all & 0x7fffffff;
        const bool bf16 = dtype == LK_BF16;
        if (magnitude < (bf16 ? lk::optim::kBf16Infinity : lk::optim::kF16Infinity)) {
          const uint32_t word = words.w[element % 4];
          const uint32_t rounded =
              bf16 ? lk::optim::stochastic_bf16(magnitude, word) : lk::optim::stochastic_f16(magnitude, word);
          bits = static_cast<uint16_t>(rounded | all >> 31 << 15);
        }
      }
      reinterpret_cast<uint16_t*>(param.data())[row.first + i] = bits;
      if (lost != nullptr) {
        const float rest = x - from_16(dtype, bits);
        *lost = to_16(dtype, std::isfinite(rest) ? rest : 0.0f);
      }
    }
    if (!eight) return;
    encode(page, at1, absmax1, lk::nf4::kDynamicMap, m);
    if (adamw) encode(page, at2, absmax2, lk::nf4::kUnsignedDynamicMap, v);
  }
};

// Bytes at a multiple of 64, and their copy for the plain loops.
struct OptimBytes {
  std::unique_ptr<char[]> raw;
  char* data;
  std::vector<char> wanted;
  explicit OptimBytes(size_t n) : raw(std::make_unique<char[]>(n + 64)), wanted(n) {
    data = raw.get() + (64 - reinterpret_cast<uintptr_t>(raw.get()) % 64) % 64;
  }
  void expect() { std::copy(data, data + wanted.size(), wanted.begin()); }
  // Normal numbers, some of which may be infinite.
  void fill(Rng& rng, int dtype, bool some_infinite) {
    const size_t size = dtype == LK_F32 ? 4 : 2;
    for (size_t i = 0; i < wanted.size() / size; ++i) {
      const bool bad = some_infinite && rng() % 100 == 0;
      const float x = bad ? std::numeric_limits<float>::infinity() : normal(rng);
      if (dtype == LK_F32) {
        reinterpret_cast<float*>(data)[i] = x;
      } else {
        reinterpret_cast<uint16_t*>(data)[i] = to_16(dtype, x);
      }
    }
  }
  void check(const char* what, size_t number) const {
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (data[i] != wanted[i])
        throw Wrong(std::string(what) + " " + std::to_string(number) + ": byte " + std::to_string(i) +
                    " differs");
    }
  }
};

// Two steps of random pieces in random pages, some of which are done already, by up to a few launches each.
inline void optim_step(Rng& rng) {
  const int op = static_cast<int>(rng() % 4), dtype = static_cast<int>(rng() % 3);
  const int rounding = dtype == LK_F32 ? LK_NEAREST : static_cast<int>(rng() % 3);
  const int64_t size = dtype == LK_F32 ? 4 : 2, page_count = between(rng, 1, 8);
  const int64_t parameter_count = between(rng, 1, 6);
  lk::cuda::pretended_device() = {static_cast<int>(between(rng, 1, 3)), 80};
  std::vector<OptimBytes> params, grads, pages;
  std::vector<lk_optim_parameter> parameters;
  std::vector<lk_optim_segment> rows;
  std::vector<int64_t> page_bytes(page_count, 64);
  for (int64_t p = 0; p < parameter_count; ++p) {
    const int64_t n = rng() % 3 == 0 ? between(rng, 1, 20) : between(rng, 0, 3000),
                  shift = rng() % 3 == 0 ? between(rng, 1, 7) : 0;
    const int grad_dtype = rng() % 2 == 0 ? dtype : LK_F32;
    const int64_t grad_size = grad_dtype == LK_F32 ? 4 : 2;
    params.emplace_back((n + shift) * size), grads.emplace_back((n + shift) * grad_size);
    params.back().fill(rng, dtype, false);
    parameters.push_back(
        {params.back().data + shift * size, grads.back().data + shift * grad_size, n, grad_dtype});
    for (int64_t first = 0; first < n;) {
      const int64_t count = std::min(n - first, 256 * between(rng, 1, 9)),
                    page = between(rng, 0, page_count - 1);
      rows.push_back({page, page_bytes[page], p, first, count, 0, p + 5});
      page_bytes[page] += lk::optim::state_layout(op, count, dtype, rounding).bytes;
      first += count;
    }
  }
  for (const int64_t bytes : page_bytes) pages.emplace_back(bytes);
  const int64_t done = rng() % 2 == 0 ? between(rng, 0, page_count - 1) : -1;
  for (int64_t tick = 1; tick <= 2; ++tick) {
    if (done >= 0 && tick == 1) *reinterpret_cast<int64_t*>(pages[done].data) = 1;
    for (int64_t p = 0; p < parameter_count; ++p) {  // 8-bit steps leave an element alone that is not finite
      grads[p].fill(rng, parameters[p].grad_dtype, lk::optim::is_8bit(op));
    }
    for (auto* group : {&params, &grads, &pages}) {
      for (OptimBytes& bytes : *group) bytes.expect();
    }
    std::vector<lk_optim_page> page_table;
    for (int64_t i = 0; i < page_count; ++i) page_table.push_back({pages[i].data, page_bytes[i]});
    for (lk_optim_segment& row : rows) row.step = tick + row.parameter;
    const lk_optim_step step = {op,
                                rounding,
                                1e-2,
                                0.9,
                                0.99,
                                1e-8,
                                0.1,
                                static_cast<int64_t>(rng()),
                                tick,
                                dtype,
                                parameters.data(),
                                parameter_count,
                                page_table.data(),
                                page_count,
                                rows.data(),
                                static_cast<int64_t>(rows.size())};
    for (const lk_optim_segment& row : rows) {
      if (tick == 1 && row.page == done) continue;
      const OptimPiece piece{op,
                             dtype,
                             rounding,
                             lk::optim::numbers_of(step),
                             lk::optim::correction_of(step, row.step),
                             row,
                             static_cast<uint64_t>(step.seed)};
      // The wanted bytes of a parameter begin where its buffer does.
      std::vector<char>& all = params[row.parameter].wanted;
      const int64_t skip = static_cast<char*>(parameters[row.parameter].param) - params[row.parameter].data;
      std::vector<char> own(all.begin() + skip, all.end());
      piece.run(own, static_cast<const char*>(parameters[row.parameter].grad),
                parameters[row.parameter].grad_dtype, pages[row.page].wanted);
      std::copy(own.begin(), own.end(), all.begin() + skip);
    }
    for (OptimBytes& page : pages) *reinterpret_cast<int64_t*>(page.wanted.data()) = tick;
    Memory memory;
    const auto use = [](const char* name, std::vector<OptimBytes>& group, simt::Use how) {
      for (OptimBytes& bytes : group) {
        if (!bytes.wanted.empty()) simt::add_memory(name, bytes.data, bytes.wanted.size(), how);
      }
    };
    use("params", params, simt::Use::inout), use("grads", grads, simt::Use::input);
    use("pages", pages, simt::Use::inout);
    check_status(lk_cuda_optim_step(&step, nullptr));
    for (size_t i = 0; i < params.size(); ++i) params[i].check("parameter", i);
    for (size_t i = 0; i < pages.size(); ++i) pages[i].check("page", i);
  }
}

struct Problem {
  const char* name;
  std::function<void(Rng&)> run;
};
inline const std::vector<Problem>& real_kernels() {
  static const std::vector<Problem> all = {
      {"nf4_quantize", quantize},
      {"nf4_dequantize", dequantize},
      {"lora_dropout", dropout},
      {"lora_linear_decode", [](Rng& rng) { lora_linear(rng, Kernel::decode); }},
      {"lora_linear_decode_clustered", [](Rng& rng) { lora_linear(rng, Kernel::decode_clustered); }},
      {"lora_linear_mixed", [](Rng& rng) { lora_linear(rng, Kernel::mixed); }},
      {"lora_linear_mixed_given_h", [](Rng& rng) { lora_linear(rng, Kernel::mixed_given_h); }},
      {"lora_shrink", shrink},
      {"lora_expand", expand},
      {"lora_linear_backward_dy", [](Rng& rng) { sweep(rng, false); }},
      {"lora_linear_backward_x", [](Rng& rng) { sweep(rng, true); }},
      {"lora_linear_backward_dx", backward_dx},
      {"optim_step", optim_step},
  };
  return all;
}

// Runs one problem with `seeds` seeds from `first` on; prints the first failure and the seed that repeats it.
inline bool passes(const Problem& problem, uint64_t first, uint64_t seeds, bool verbose) {
  for (uint64_t seed = first; seed < first + seeds; ++seed) {
    Rng rng(seed);
    simt::set_seed(seed);
    try {
      problem.run(rng);
    } catch (const std::runtime_error& error) {
      if (verbose)
        std::printf("%s: seed %llu: %s\n", problem.name, static_cast<unsigned long long>(seed), error.what());
      return false;
    }
  }
  if (verbose) std::printf("%s: %llu seeds passed\n", problem.name, static_cast<unsigned long long>(seeds));
  return true;
}

}  // namespace problems
