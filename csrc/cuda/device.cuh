// What every kernel file includes first: pointers that know their address space, dynamic shared memory, and
// the one way to launch. Compiled by nvcc for a device, and with LK_SIMT by the host compiler for csrc/simt,
// where the same kernel text runs with every access checked.
//
//   lk::Global<T>, lk::Shared<T>   T* on a device, a checked pointer on the stand-in. Elements are read and
//                                  written whole (p[i] = v); lk::cast<U>(p) looks at them as another type
//   LK_DYNAMIC_SHARED(name)        the block's dynamic shared memory: Shared<char>, aligned to 1024 bytes
//   lk::cuda::launch(...)          returns an lk_status
#pragma once
#include <cstddef>
#include <cstdint>

#include "../api.h"

#ifdef LK_SIMT
#include "../simt/device.h"
#else

namespace lk {

template <class T>
using Global = T*;
template <class T>
using Shared = T*;

template <class To, class From>
__device__ __forceinline__ To* cast(From* p) {
  return reinterpret_cast<To*>(p);
}

}  // namespace lk

#define LK_DYNAMIC_SHARED(name)                               \
  extern __shared__ __align__(1024) char lk_dynamic_shared[]; \
  ::lk::Shared<char> name = lk_dynamic_shared

namespace lk::cuda {

struct LaunchShape {
  unsigned grid_x, grid_y, grid_z;
  unsigned threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks along x that share a cluster; sm_90 and later
};

// Starts `kernel` on `stream`. `name` is what an error calls it.
template <class... Parameters, class... Arguments>
int launch([[maybe_unused]] const char* name, void (*kernel)(Parameters...), const LaunchShape& shape,
           void* stream, Arguments&&... arguments) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shape.shared_bytes > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return LK_LAUNCH_FAILED + static_cast<int>(error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.grid_x, shape.grid_y, shape.grid_z);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {shape.cluster, 1, 1};
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  return error == cudaSuccess ? LK_OK : LK_LAUNCH_FAILED + static_cast<int>(error);
}

// The device's streaming multiprocessors and compute capability (10 * major + minor); asked once per device.
struct DeviceInfo {
  int multiprocessors, capability;
};
inline DeviceInfo device_info() {
  constexpr int kMost = 64;
  static DeviceInfo known[kMost] = {};  // written with the same values by whoever comes first
  int device = 0;
  cudaGetDevice(&device);
  DeviceInfo info = device < kMost ? known[device] : DeviceInfo{};
  if (info.multiprocessors == 0) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    info.capability = 10 * major + minor;
    if (device < kMost) known[device] = info;
  }
  return info;
}

}  // namespace lk::cuda
#endif
