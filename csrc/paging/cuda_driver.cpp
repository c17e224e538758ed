#include "cuda_driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

namespace lk::paging::cuda {
namespace {

std::unique_ptr<Driver> load(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(std::string("there is no CUDA driver: ") + dlerror());
  auto loaded = std::make_unique<Driver>();
  const auto find = [library, &path](auto& function, const char* name) {
    void* symbol = dlsym(library, name);
    if (symbol == nullptr)
      throw std::runtime_error("the CUDA driver " + path + " is too old: it has no " + name);
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
  };
#define LK_FIND(name) find(loaded->name, #name)
  LK_FIND(cuInit);
  LK_FIND(cuDeviceGetCount);
  LK_FIND(cuDeviceGet);
  LK_FIND(cuDevicePrimaryCtxRetain);
  LK_FIND(cuDevicePrimaryCtxRelease_v2);
  LK_FIND(cuCtxPushCurrent_v2);
  LK_FIND(cuCtxPopCurrent_v2);
  LK_FIND(cuMemAlloc_v2);
  LK_FIND(cuMemFree_v2);
  LK_FIND(cuMemHostAlloc);
  LK_FIND(cuMemFreeHost);
  LK_FIND(cuMemcpyHtoDAsync_v2);
  LK_FIND(cuMemcpyDtoHAsync_v2);
  LK_FIND(cuMemsetD8Async);
  LK_FIND(cuStreamCreate);
  LK_FIND(cuStreamDestroy_v2);
  LK_FIND(cuStreamSynchronize);
  LK_FIND(cuStreamWaitEvent);
  LK_FIND(cuEventCreate);
  LK_FIND(cuEventDestroy_v2);
  LK_FIND(cuEventRecord);
  LK_FIND(cuEventQuery);
  LK_FIND(cuEventSynchronize);
  LK_FIND(cuEventElapsedTime);
  LK_FIND(cuGetErrorName);
  LK_FIND(cuGetErrorString);
#undef LK_FIND
  if (const Result result = loaded->cuInit(0)) {
    throw std::runtime_error("the CUDA driver does not start: " + loaded->explain(result));
  }
  return loaded;
}

}  // namespace

std::string Driver::explain(Result result) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (cuGetErrorName(result, &name) != kSuccess || name == nullptr) return "error " + std::to_string(result);
  if (cuGetErrorString(result, &text) != kSuccess || text == nullptr) return name;
  return std::string(name) + " (" + text + ")";
}

const Driver& driver() {
  static std::mutex mutex;
  static auto& loaded = *new std::map<std::string, std::unique_ptr<Driver>>;  // never unloaded
  const char* named = std::getenv("LORA_KERNELS_CUDA_DRIVER");
  const std::string path = named != nullptr && *named != '\0' ? named : "libcuda.so.1";
  const std::lock_guard lock(mutex);
  std::unique_ptr<Driver>& found = loaded[path];
  if (!found) found = load(path);
  return *found;
}

}  // namespace lk::paging::cuda
