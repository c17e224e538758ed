// The part of the CUDA driver API that the pager uses, found at run time: _paging builds and loads anywhere.
//
// The library is libcuda.so.1, or what the environment variable LORA_KERNELS_CUDA_DRIVER names (the tests
// have a small driver of their own). Types and values are those of cuda.h, written down here.
#pragma once
#include <cstddef>
#include <string>

namespace lk::paging::cuda {

using Result = int;
using Ordinal = int;
using Context = void*;
using Pointer = unsigned long long;
using StreamHandle = void*;
using EventHandle = void*;

inline constexpr Result kSuccess = 0, kOutOfMemory = 2, kNotReady = 600;
inline constexpr unsigned kStreamNonBlocking = 1;  // not ordered with the legacy default stream
inline constexpr unsigned kEventDisableTiming = 2;
inline constexpr unsigned kHostAllocPortable = 1;  // pinned for every context

struct Driver {
  Result (*cuInit)(unsigned);
  Result (*cuDeviceGetCount)(int*);
  Result (*cuDeviceGet)(Ordinal*, int);
  Result (*cuDevicePrimaryCtxRetain)(Context*, Ordinal);
  Result (*cuDevicePrimaryCtxRelease_v2)(Ordinal);
  Result (*cuCtxPushCurrent_v2)(Context);
  Result (*cuCtxPopCurrent_v2)(Context*);
  Result (*cuMemAlloc_v2)(Pointer*, std::size_t);
  Result (*cuMemFree_v2)(Pointer);
  Result (*cuMemHostAlloc)(void**, std::size_t, unsigned);
  Result (*cuMemFreeHost)(void*);
  Result (*cuMemcpyHtoDAsync_v2)(Pointer, const void*, std::size_t, StreamHandle);
  Result (*cuMemcpyDtoHAsync_v2)(void*, Pointer, std::size_t, StreamHandle);
  Result (*cuMemsetD8Async)(Pointer, unsigned char, std::size_t, StreamHandle);
  Result (*cuStreamCreate)(StreamHandle*, unsigned);
  Result (*cuStreamDestroy_v2)(StreamHandle);
  Result (*cuStreamSynchronize)(StreamHandle);
  Result (*cuStreamWaitEvent)(StreamHandle, EventHandle, unsigned);
  Result (*cuEventCreate)(EventHandle*, unsigned);
  Result (*cuEventDestroy_v2)(EventHandle);
  Result (*cuEventRecord)(EventHandle, StreamHandle);
  Result (*cuEventQuery)(EventHandle);
  Result (*cuEventSynchronize)(EventHandle);
  Result (*cuEventElapsedTime)(float*, EventHandle, EventHandle);
  Result (*cuGetErrorName)(Result, const char**);
  Result (*cuGetErrorString)(Result, const char**);

  // "CUDA_ERROR_INVALID_VALUE (invalid argument)"
  std::string explain(Result result) const;
};

// Loaded and initialised; throws std::runtime_error where there is no driver or it does not start.
const Driver& driver();

}  // namespace lk::paging::cuda
