// The programs of twins_kernels.cuh behind two plain C functions, for test_twins.py and test_simt_twins.py.
//
//   nvcc -std=c++20 -arch=... -DLK_TWINS_ARCH=90 -shared -Xcompiler -fPIC twins.cu              on the device
//   g++ -std=c++20 -ffp-contract=off -DLK_SIMT -DLK_TWINS_ARCH=90 -shared -fPIC -x c++ twins.cu
//   csrc/simt/engine.cpp
#include <cstring>
#include <string>
#include <vector>

#include "twins_kernels.cuh"

namespace {

std::string error;

const twins::Program* find_program(const char* name) {
  for (const twins::Program& program : twins::kPrograms) {
    if (std::strcmp(program.name, name) == 0) return &program;
  }
  error = std::string("no program ") + name;
  return nullptr;
}

}  // namespace

// Why the last twin_run did not return 0.
extern "C" const char* twin_error() { return error.c_str(); }

#ifdef LK_SIMT

extern "C" int twin_run(const char* name, twins::Buffer* buffers, int count, const int64_t* numbers,
                        uint64_t seed) {
  const twins::Program* program = find_program(name);
  if (program == nullptr) return -1;
  simt::set_seed(seed);
  simt::clear_memory();
  for (int i = 0; i < count; ++i) {
    simt::add_memory("buffer", buffers[i].data, static_cast<size_t>(buffers[i].bytes),
                     static_cast<simt::Use>(buffers[i].use));
  }
  int status = program->run(buffers, numbers);
  if (status != LK_OK) error = lk::cuda::last_error();
  if (status == LK_OK) {
    try {
      simt::check_outputs_written();
    } catch (const simt::Error& unwritten) {
      error = unwritten.what();
      status = LK_LAUNCH_FAILED;
    }
  }
  simt::clear_memory();
  return status;
}

#else

namespace {

constexpr int kInput = 0, kOutput = 1;  // of Buffer::use

int check(cudaError_t result) {
  if (result == cudaSuccess) return 0;
  error = cudaGetErrorString(result);
  return LK_LAUNCH_FAILED + static_cast<int>(result);
}

}  // namespace

extern "C" int twin_run(const char* name, twins::Buffer* buffers, int count, const int64_t* numbers,
                        uint64_t) {
  const twins::Program* program = find_program(name);
  if (program == nullptr) return -1;
  std::vector<twins::Buffer> on_device(buffers, buffers + count);
  int status = 0;
  for (twins::Buffer& b : on_device) {
    const void* from = b.data;
    const auto bytes = static_cast<size_t>(b.bytes);
    b.data = nullptr;
    if (status == 0) status = check(cudaMalloc(&b.data, bytes));
    if (status == 0 && b.use == kOutput) status = check(cudaMemset(b.data, 0xff, bytes));
    if (status == 0 && b.use != kOutput)
      status = check(cudaMemcpy(b.data, from, bytes, cudaMemcpyHostToDevice));
  }
  if (status == 0) {
    status = program->run(on_device.data(), numbers);
    if (status != 0) error = "launch: status " + std::to_string(status);
  }
  if (status == 0) status = check(cudaDeviceSynchronize());
  for (int i = 0; i < count; ++i) {
    const twins::Buffer& b = on_device[static_cast<size_t>(i)];
    if (status == 0 && b.use != kInput) {
      status =
          check(cudaMemcpy(buffers[i].data, b.data, static_cast<size_t>(b.bytes), cudaMemcpyDeviceToHost));
    }
    cudaFree(b.data);
  }
  return status;
}

#endif
