// The host's side of csrc/cuda/device.cuh: CUDA's names on the stand-in.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <string>

#include "../api.h"
#include "engine.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::simt::thread_idx())
#define blockIdx (::simt::block_idx())
#define blockDim (::simt::block_dim())
#define gridDim (::simt::grid_dim())

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

// Compiled without contraction: each of these is one rounding.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline int __ffs(uint32_t bits) { return bits == 0 ? 0 : std::countr_zero(bits) + 1; }

inline void __syncthreads(simt::Where where = simt::Where::current()) { simt::barrier(0, 0, true, where); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, simt::Where where = simt::Where::current()) {
  simt::warp_collective(mask, "__syncwarp", nullptr, [](void**) {}, where);
}
inline void __threadfence() { simt::publish_global_writes(); }

namespace simt {

// What the lane `source` of each lane passed; lanes outside the mask cannot be read.
template <class T>
struct Shuffle {
  T value;
  int source;
  uint32_t mask;
  Where where;
};
template <class T>
T shuffle(uint32_t mask, T value, int source, const char* name, const Where& where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  Shuffle<T> mine{value, source, mask, where};
  const auto exchange = [](void** lanes) {
    T values[32];
    for (int i = 0; i < 32; ++i) {
      if (lanes[i] != nullptr) values[i] = static_cast<Shuffle<T>*>(lanes[i])->value;
    }
    for (int i = 0; i < 32; ++i) {
      auto* lane = static_cast<Shuffle<T>*>(lanes[i]);
      if (lane == nullptr) continue;
      if ((lane->mask >> lane->source & 1) == 0) {
        fail(lane->where, "lane %d reads lane %d, which is not in the mask 0x%08x", i, lane->source,
             lane->mask);
      }
      lane->value = values[lane->source];
    }
  };
  warp_collective(mask, name, &mine, exchange, where);
  return mine.value;
}

struct Vote {
  bool mine;
  uint32_t all;
};
inline uint32_t ballot(uint32_t mask, bool predicate, const char* name, const Where& where) {
  Vote vote{predicate, 0};
  const auto count = [](void** lanes) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) {
      if (lanes[i] != nullptr && static_cast<Vote*>(lanes[i])->mine) bits |= 1u << i;
    }
    for (int i = 0; i < 32; ++i) {
      if (lanes[i] != nullptr) static_cast<Vote*>(lanes[i])->all = bits;
    }
  };
  warp_collective(mask, name, &vote, count, where);
  return vote.all;
}

}  // namespace simt

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, simt::Where where = simt::Where::current()) {
  return simt::shuffle(mask, value, source & 31, "__shfl_sync", where);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, simt::Where where = simt::Where::current()) {
  const int lane = static_cast<int>(simt::linear_thread() % 32);
  return simt::shuffle(mask, value, (lane ^ lanes) & 31, "__shfl_xor_sync", where);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int by, simt::Where where = simt::Where::current()) {
  const int lane = static_cast<int>(simt::thread_idx().x % 32);
  return simt::shuffle(mask, value, lane < by ? lane : lane - by, "__shfl_up_sync", where);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int by, simt::Where where = simt::Where::current()) {
  const int lane = static_cast<int>(simt::linear_thread() % 32);
  return simt::shuffle(mask, value, lane + by > 31 ? lane : lane + by, "__shfl_down_sync", where);
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate, simt::Where where = simt::Where::current()) {
  return simt::ballot(mask, predicate, "__ballot_sync", where);
}
inline bool __any_sync(uint32_t mask, bool predicate, simt::Where where = simt::Where::current()) {
  return simt::ballot(mask, predicate, "__any_sync", where) != 0;
}

namespace lk {

template <class T>
using Global = simt::Pointer<T>;
template <class T>
using Shared = simt::Pointer<T>;

template <class To, class From>
simt::Pointer<To> cast(const simt::Pointer<From>& p) {
  return simt::pointer_cast<To>(p);
}

}  // namespace lk

#define LK_DYNAMIC_SHARED(name) ::lk::Shared<char> name = ::simt::dynamic_shared()

namespace lk::cuda {

struct LaunchShape {
  unsigned grid_x, grid_y, grid_z;
  unsigned threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
};

// The message of the last failure on this thread, for Python.
inline std::string& last_error() {
  thread_local std::string text;
  return text;
}

// What the launchers see; tests choose which architecture's route they take.
struct DeviceInfo {
  int multiprocessors, capability;
};
inline DeviceInfo& pretended_device() {
  static DeviceInfo device{4, 80};
  return device;
}
inline DeviceInfo device_info() { return pretended_device(); }

// Why a device of this compute capability refuses a launch; empty where it does not (CUDA C++ Programming
// Guide, "Technical Specifications per Compute Capability").
inline std::string why_no_launch(const LaunchShape& shape, int capability) {
  const bool most = capability == 90 || (capability >= 100 && capability < 120);  // of shared memory
  const size_t most_shared = size_t{most ? 227u : capability == 80 || capability == 87 ? 163u : 99u} << 10;
  const auto too_many = [](const char* what, size_t got, size_t limit) {
    return std::to_string(got) + " " + what + ", at most " + std::to_string(limit);
  };
  if (shape.shared_bytes > most_shared)
    return too_many("bytes of shared memory", shape.shared_bytes, most_shared);
  if (shape.threads > 1024) return too_many("threads", shape.threads, 1024);
  if (shape.cluster > 8) return too_many("blocks in a cluster", shape.cluster, 8);
  if (shape.grid_x > 0x7fffffffu) return too_many("blocks along x", shape.grid_x, 0x7fffffffu);
  if (shape.grid_y > 0xffffu) return too_many("blocks along y", shape.grid_y, 0xffffu);
  if (shape.grid_z > 0xffffu) return too_many("blocks along z", shape.grid_z, 0xffffu);
  return {};
}

template <class... Parameters, class... Arguments>
int launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, void*,
           Arguments&&... arguments) {
  if (const std::string why = why_no_launch(shape, pretended_device().capability); !why.empty()) {
    last_error() = std::string("kernel ") + name + ": no such launch: " + why;
    return LK_LAUNCH_FAILED;
  }
  const simt::LaunchConfig config{name,
                                  {shape.grid_x, shape.grid_y, shape.grid_z},
                                  {shape.threads, 1, 1},
                                  shape.shared_bytes,
                                  shape.cluster};
  try {
    simt::launch(config, [&] { kernel(static_cast<Parameters>(arguments)...); });
  } catch (const simt::Error& error) {
    last_error() = error.what();
    return LK_LAUNCH_FAILED;
  }
  return LK_OK;
}

}  // namespace lk::cuda
