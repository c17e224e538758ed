// Memory as a kernel sees it on the stand-in: regions with a state for every byte, and checked pointers.
//
// A kernel's pointers are lk::Global<T> and lk::Shared<T> (csrc/cuda/ptx.cuh): plain T* on a device,
// Pointer<T> here. Every access is checked: inside its region, aligned to its type, not a read of bytes that
// nobody wrote, that an asynchronous copy is still writing, or that another block wrote and has not
// published.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <source_location>
#include <type_traits>
#include <vector>

namespace simt {

using Where = std::source_location;

// Stops the kernel with a message that names the thread and the line; never returns.
[[noreturn]] void fail(const Where& where, const char* format, ...) __attribute__((format(printf, 2, 3)));

enum ByteState : uint8_t {
  kUndefined = 0,  // nobody wrote it
  kDefined = 1,
  kInFlight = 2,     // an asynchronous operation writes it, and nobody has waited for that
  kBarrier = 4,      // shared: an mbarrier's own bytes, which only its instructions may touch
  kUnpublished = 3,  // global: written by a block that has not fenced since; others must not read it
};

// What the twins of some instructions keep for a block; `ended` is called when its last thread has.
struct BlockState {
  virtual ~BlockState() = default;
  virtual void ended() = 0;
};

struct Region {
  char* base = nullptr;
  size_t bytes = 0;
  const char* name = "";
  bool writable = true;
  bool shared = false;
  int block = -1;               // shared: its block's rank within the resident ones
  std::vector<uint8_t> state;   // ByteState of every byte; empty: all defined (an input)
  std::vector<int32_t> writer;  // global: the block (linear index in the grid) that wrote an unpublished byte
  std::vector<uint8_t> unfenced;  // shared: 1 where the generic proxy wrote and no fence.proxy.async followed

  std::unique_ptr<BlockState> twins;  // shared: of its block

  size_t offset(const void* p) const { return static_cast<size_t>(static_cast<const char*>(p) - base); }
  bool holds(const void* p, size_t n) const {
    const char* at = static_cast<const char*>(p);
    return at >= base && n <= bytes && at <= base + (bytes - n);
  }
};

// The registered region that holds p, or null. Launchers turn raw pointers into Global ones by this.
Region* find_region(const void* p);

// The checks, and for writes the new state. `align` is what the access needs.
void check_read(Region* region, const void* p, size_t n, size_t align, const Where& where);
void check_write(Region* region, const void* p, size_t n, size_t align, const Where& where);

template <class T>
class Pointer;

template <class T>
class Reference {
  using Value = std::remove_const_t<T>;

 public:
  Reference(T* at, Region* region, Where where) : at_(at), region_(region), where_(where) {}
  Reference(const Reference&) = default;
  operator Value() const {
    check_read(region_, at_, sizeof(T), alignof(T), where_);
    Value value;
    std::memcpy(&value, at_, sizeof value);
    return value;
  }
  const Reference& operator=(const Value& value) const {
    static_assert(!std::is_const_v<T>, "a store through a pointer to const");
    check_write(region_, at_, sizeof(T), alignof(T), where_);
    std::memcpy(at_, &value, sizeof value);
    return *this;
  }
  const Reference& operator=(const Reference& other) const { return *this = static_cast<Value>(other); }
  const Reference& operator+=(const Value& value) const {
    return *this = static_cast<Value>(static_cast<Value>(*this) + value);
  }
  Pointer<T> operator&() const;

 private:
  T* at_;
  Region* region_;
  Where where_;
};

template <class T>
class Pointer {
 public:
  Pointer() = default;
  Pointer(std::nullptr_t) {}
  explicit Pointer(T* raw) : at_(raw), region_(raw == nullptr ? nullptr : find_region(raw)) {}
  Pointer(T* at, Region* region) : at_(at), region_(region) {}
  template <class U>
    requires(std::is_same_v<const U, T> || (std::is_void_v<T> && !std::is_const_v<U>) ||
             (std::is_void_v<std::remove_const_t<T>> && std::is_const_v<T>))
  Pointer(const Pointer<U>& other) : at_(other.raw()), region_(other.region()) {}

  T* raw() const { return at_; }
  Region* region() const { return region_; }
  explicit operator bool() const { return at_ != nullptr; }
  bool operator==(std::nullptr_t) const { return at_ == nullptr; }
  bool operator==(const Pointer& other) const { return at_ == other.at_; }
  bool operator<(const Pointer& other) const { return at_ < other.at_; }

  // The index carries the line of the access along: p[i] is checked where it stands in the kernel.
  struct Index {
    int64_t value;
    Where where;
    template <class I>
      requires std::is_integral_v<I>
    Index(I i, Where w = Where::current()) : value(static_cast<int64_t>(i)), where(w) {}
  };
  auto operator[](Index i) const { return Reference<T>(at_ + i.value, region_, i.where); }
  auto operator*() const { return Reference<T>(at_, region_, Where::current()); }
  Pointer operator+(int64_t n) const { return {at_ + n, region_}; }
  Pointer operator-(int64_t n) const { return {at_ - n, region_}; }
  Pointer& operator+=(int64_t n) { return at_ += n, *this; }
  int64_t operator-(const Pointer& other) const { return at_ - other.at_; }

 private:
  T* at_ = nullptr;
  Region* region_ = nullptr;
};

template <class T>
Pointer<T> Reference<T>::operator&() const {
  return {at_, region_};
}

template <class To, class From>
Pointer<To> pointer_cast(const Pointer<From>& p) {
  using Void = std::conditional_t<std::is_const_v<To>, const void, void>;
  return {static_cast<To*>(static_cast<Void*>(p.raw())), p.region()};
}

}  // namespace simt
