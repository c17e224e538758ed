// What the allocator throws; bindings.cpp turns each into the Python exception named here.
//   std::invalid_argument  ValueError     an argument that cannot be
//   std::runtime_error     RuntimeError   a call out of turn: closed, not pinned, after a fork
//   OutOfMemory            MemoryError
//   IoError                OSError with errno
#pragma once
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace lk::paging {

class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

class IoError : public std::runtime_error {
 public:
  IoError(int number, const std::string& message) : std::runtime_error(message), number_(number) {}
  int number() const noexcept { return number_; }

 private:
  int number_;  // as in errno
};

// "<what>: No space left on device"
inline IoError system_error(int number, const std::string& what) {
  return {number, what + ": " + std::strerror(number)};
}

}  // namespace lk::paging
