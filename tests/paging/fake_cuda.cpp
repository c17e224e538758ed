// A CUDA driver without a GPU, for the pager's CUDA store: what csrc/paging/cuda_driver.h asks for,
// asynchronous for real. Device memory is host memory; every stream is a queue with a thread, and each
// operation takes a while.
//
// It judges its user. Each operation remembers, when it is enqueued, the unfinished operations of other
// streams that touch the same bytes, one of the two writing; when it runs, all of those must be finished, or
// a wait is missing: that, memory freed while an operation uses it, and addresses that nobody allocated are
// counted as violations. fake_*: what the tests control and read. The functions a driver need not have under
// test are not there.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Clock = std::chrono::steady_clock;
constexpr int kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kInvalidContext = 201, kNotReady = 600;

struct Range {
  std::uintptr_t begin;
  std::size_t bytes;
  bool writes;
};

// An operation in a stream; `after` are events' points, which are operations too.
struct Operation {
  std::function<void()> run;
  std::vector<Range> ranges;
  std::vector<std::shared_ptr<Operation>> conflicts;  // unfinished when this was enqueued
  std::shared_ptr<Operation> after;
  bool done = false;
  int result = kSuccess;
  Clock::time_point finished;
};
using OperationPtr = std::shared_ptr<Operation>;

struct Event {
  OperationPtr point;  // null: not recorded
};

struct Queue {
  std::deque<OperationPtr> operations;  // the first may be running
  std::thread thread;
  bool ending = false;
};

struct Machine {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<void*, std::unique_ptr<Queue>> streams;
  std::map<std::uintptr_t, std::size_t> device, pinned;
  std::set<Event*> events;
  std::size_t device_bytes = 0, pinned_bytes = 0, device_limit = SIZE_MAX, pinned_limit = SIZE_MAX;
  int contexts = 0, violations = 0, delay_us = 0, next_stream = 1;
  std::string first_violation;
  std::map<std::string, std::pair<int, int>> failures;  // function -> (calls until it fails, result)
};

Machine& machine() {
  static auto& it = *new Machine;
  return it;
}

thread_local std::vector<void*> contexts;
int the_context;

void violation(const std::string& what) {  // under the lock
  if (machine().violations++ == 0) machine().first_violation = what;
}

bool overlap(const Operation& a, const Operation& b) {
  for (const Range& x : a.ranges) {
    for (const Range& y : b.ranges) {
      if ((x.writes || y.writes) && x.begin < y.begin + y.bytes && y.begin < x.begin + x.bytes) return true;
    }
  }
  return false;
}

void serve(Queue& queue) {
  Machine& m = machine();
  std::unique_lock lock(m.mutex);
  for (;;) {
    m.changed.wait(lock, [&] { return queue.ending || !queue.operations.empty(); });
    if (queue.operations.empty()) return;
    const OperationPtr operation = queue.operations.front();
    m.changed.wait(lock, [&] { return !operation->after || operation->after->done; });
    for (const OperationPtr& other : operation->conflicts) {
      if (!other->done)
        violation("an operation runs before another, on the same memory, that was enqueued earlier");
    }
    if (operation->run) {
      const int delay = m.delay_us;
      lock.unlock();
      if (delay > 0) std::this_thread::sleep_for(std::chrono::microseconds(delay));
      operation->run();
      lock.lock();
    }
    operation->done = true;
    operation->finished = Clock::now();
    operation->conflicts.clear();
    operation->after.reset();
    queue.operations.pop_front();
    m.changed.notify_all();
  }
}

Queue& stream(void* handle) {  // under the lock; handle 0 exists from its first use on
  Machine& m = machine();
  std::unique_ptr<Queue>& queue = m.streams[handle];
  if (!queue) {
    queue = std::make_unique<Queue>();
    queue->thread = std::thread(serve, std::ref(*queue));
  }
  return *queue;
}

bool known(const Range& range) {  // under the lock
  for (const auto* memory : {&machine().device, &machine().pinned}) {
    const auto after = memory->upper_bound(range.begin);
    if (after == memory->begin()) continue;
    const auto [begin, bytes] = *std::prev(after);
    if (range.begin + range.bytes <= begin + bytes) return true;
  }
  return false;
}

OperationPtr enqueue(void* handle, std::vector<Range> ranges, std::function<void()> run) {  // under the lock
  Queue& queue = stream(handle);
  auto operation = std::make_shared<Operation>();
  operation->ranges = std::move(ranges);
  operation->run = std::move(run);
  for (const Range& range : operation->ranges) {
    if (!known(range)) violation("an operation on memory that is not allocated");
  }
  for (const auto& [other_handle, other] : machine().streams) {
    if (other.get() == &queue) continue;
    for (const OperationPtr& earlier : other->operations) {
      if (overlap(*operation, *earlier)) operation->conflicts.push_back(earlier);
    }
  }
  queue.operations.push_back(operation);
  machine().changed.notify_all();
  return operation;
}

// Of every call: the context must be current, and the test may have asked for a failure.
int begin(const char* name, bool needs_context = true) {
  if (needs_context && contexts.empty()) return kInvalidContext;
  const auto found = machine().failures.find(name);
  if (found == machine().failures.end() || --found->second.first > 0) return kSuccess;
  const int result = found->second.second;
  machine().failures.erase(found);
  return result;
}

#define BEGIN(...)                        \
  std::unique_lock lock(machine().mutex); \
  if (const int failure = begin(__VA_ARGS__)) return failure

int allocate(std::map<std::uintptr_t, std::size_t>& memory, std::size_t& used, std::size_t limit,
             std::size_t bytes, std::uintptr_t& address) {
  if (used + bytes > limit) return kOutOfMemory;
  void* block = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  if (block == nullptr) return kOutOfMemory;
  std::memset(block, 0xcd, bytes);  // nobody may count on zeros
  address = reinterpret_cast<std::uintptr_t>(block);
  memory[address] = bytes;
  used += bytes;
  return kSuccess;
}

int release(std::map<std::uintptr_t, std::size_t>& memory, std::size_t& used, std::uintptr_t address) {
  const auto found = memory.find(address);
  if (found == memory.end()) return kInvalidValue;
  Operation all;
  all.ranges = {{address, found->second, true}};
  bool in_use = false;
  for (const auto& [handle, queue] : machine().streams) {
    for (const OperationPtr& operation : queue->operations) in_use |= overlap(all, *operation);
  }
  if (in_use) violation("memory freed while an operation uses it");
  used -= found->second;
  memory.erase(found);
  // Not to the system, where an operation still writes: the violation is to be told, not to crash the test.
  if (!in_use) std::free(reinterpret_cast<void*>(address));
  return kSuccess;
}

}  // namespace

EXPORT int cuInit(unsigned) {
  BEGIN("cuInit", false);
  return kSuccess;
}

EXPORT int cuDeviceGetCount(int* count) {
  BEGIN("cuDeviceGetCount", false);
  *count = 2;
  return kSuccess;
}

EXPORT int cuDeviceGet(int* device, int index) {
  BEGIN("cuDeviceGet", false);
  *device = index;
  return kSuccess;
}

EXPORT int cuDevicePrimaryCtxRetain(void** context, int) {
  BEGIN("cuDevicePrimaryCtxRetain", false);
  ++machine().contexts;
  *context = &the_context;
  return kSuccess;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int) {
  BEGIN("cuDevicePrimaryCtxRelease", false);
  --machine().contexts;
  return kSuccess;
}

EXPORT int cuCtxPushCurrent_v2(void* context) {
  BEGIN("cuCtxPushCurrent", false);
  contexts.push_back(context);
  return kSuccess;
}

EXPORT int cuCtxPopCurrent_v2(void** context) {
  BEGIN("cuCtxPopCurrent");
  *context = contexts.back();
  contexts.pop_back();
  return kSuccess;
}

EXPORT int cuMemAlloc_v2(unsigned long long* pointer, std::size_t bytes) {
  BEGIN("cuMemAlloc");
  std::uintptr_t address;
  Machine& m = machine();
  const int result = allocate(m.device, m.device_bytes, m.device_limit, bytes, address);
  if (result == kSuccess) *pointer = address;
  return result;
}

EXPORT int cuMemFree_v2(unsigned long long pointer) {
  BEGIN("cuMemFree");
  return release(machine().device, machine().device_bytes, pointer);
}

EXPORT int cuMemHostAlloc(void** pointer, std::size_t bytes, unsigned) {
  BEGIN("cuMemHostAlloc");
  std::uintptr_t address;
  Machine& m = machine();
  const int result = allocate(m.pinned, m.pinned_bytes, m.pinned_limit, bytes, address);
  if (result == kSuccess) *pointer = reinterpret_cast<void*>(address);
  return result;
}

EXPORT int cuMemFreeHost(void* pointer) {
  BEGIN("cuMemFreeHost");
  return release(machine().pinned, machine().pinned_bytes, reinterpret_cast<std::uintptr_t>(pointer));
}

static int copy(void* to, const void* from, std::size_t bytes, void* handle) {
  enqueue(handle,
          {{reinterpret_cast<std::uintptr_t>(to), bytes, true},
           {reinterpret_cast<std::uintptr_t>(from), bytes, false}},
          [=] { std::memcpy(to, from, bytes); });
  return kSuccess;
}

EXPORT int cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, std::size_t bytes, void* handle) {
  BEGIN("cuMemcpyHtoDAsync");
  return copy(reinterpret_cast<void*>(to), from, bytes, handle);
}

EXPORT int cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, std::size_t bytes, void* handle) {
  BEGIN("cuMemcpyDtoHAsync");
  return copy(to, reinterpret_cast<void*>(from), bytes, handle);
}

EXPORT int cuMemsetD8Async(unsigned long long to, unsigned char value, std::size_t bytes, void* handle) {
  BEGIN("cuMemsetD8Async");
  enqueue(handle, {{to, bytes, true}}, [=] { std::memset(reinterpret_cast<void*>(to), value, bytes); });
  return kSuccess;
}

EXPORT int cuStreamCreate(void** handle, unsigned) {
  BEGIN("cuStreamCreate");
  *handle = reinterpret_cast<void*>(static_cast<std::uintptr_t>(0x1000 + machine().next_stream++));
  stream(*handle);
  return kSuccess;
}

EXPORT int cuStreamDestroy_v2(void* handle) {
  BEGIN("cuStreamDestroy");
  const auto found = machine().streams.find(handle);
  if (found == machine().streams.end()) return kInvalidValue;
  found->second->ending = true;
  machine().changed.notify_all();
  lock.unlock();
  found->second->thread.join();  // what is in the queue is done first
  lock.lock();
  machine().streams.erase(handle);
  return kSuccess;
}

EXPORT int cuStreamSynchronize(void* handle) {
  BEGIN("cuStreamSynchronize");
  Queue& queue = stream(handle);
  machine().changed.wait(lock, [&] { return queue.operations.empty(); });
  return kSuccess;
}

EXPORT int cuStreamWaitEvent(void* handle, void* event, unsigned) {
  BEGIN("cuStreamWaitEvent");
  const OperationPtr point = static_cast<Event*>(event)->point;
  if (point && !point->done) enqueue(handle, {}, nullptr)->after = point;
  return kSuccess;
}

EXPORT int cuEventCreate(void** event, unsigned) {
  BEGIN("cuEventCreate");
  auto* made = new Event;
  machine().events.insert(made);
  *event = made;
  return kSuccess;
}

EXPORT int cuEventDestroy_v2(void* event) {
  BEGIN("cuEventDestroy", false);
  if (machine().events.erase(static_cast<Event*>(event)) == 0) return kInvalidValue;
  delete static_cast<Event*>(event);
  return kSuccess;
}

EXPORT int cuEventRecord(void* event, void* handle) {
  BEGIN("cuEventRecord");
  static_cast<Event*>(event)->point = enqueue(handle, {}, nullptr);
  return kSuccess;
}

EXPORT int cuEventQuery(void* event) {
  BEGIN("cuEventQuery");
  const OperationPtr& point = static_cast<Event*>(event)->point;
  return !point || point->done ? kSuccess : kNotReady;
}

EXPORT int cuEventSynchronize(void* event) {
  BEGIN("cuEventSynchronize");
  const OperationPtr point = static_cast<Event*>(event)->point;
  machine().changed.wait(lock, [&] { return !point || point->done; });
  return kSuccess;
}

EXPORT int cuEventElapsedTime(float* milliseconds, void* from, void* to) {
  BEGIN("cuEventElapsedTime");
  const OperationPtr &a = static_cast<Event*>(from)->point, &b = static_cast<Event*>(to)->point;
  if (!a || !b) return kInvalidValue;
  if (!a->done || !b->done) return kNotReady;
  *milliseconds = std::chrono::duration<float, std::milli>(b->finished - a->finished).count();
  return kSuccess;
}

EXPORT int cuGetErrorName(int result, const char** name) {
  *name = result == kOutOfMemory ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_FAKE";
  return kSuccess;
}

EXPORT int cuGetErrorString(int result, const char** text) {
  *text = result == kOutOfMemory ? "out of memory" : "asked for by a test";
  return kSuccess;
}

// What tests control and read ----------------------------------------------------------------------

// The `nth` call of `function` from now on fails with `result`.
EXPORT void fake_fail(const char* function, int nth, int result) {
  const std::lock_guard lock(machine().mutex);
  machine().failures[function] = {nth, result};
}

EXPORT void fake_limits(std::size_t device_bytes, std::size_t pinned_bytes, int delay_us) {
  const std::lock_guard lock(machine().mutex);
  machine().device_limit = device_bytes;
  machine().pinned_limit = pinned_bytes;
  machine().delay_us = delay_us;
}

// live: device allocations, pinned allocations, streams (without 0), events, contexts, contexts of this
// thread
EXPORT void fake_live(int live[6]) {
  Machine& m = machine();
  const std::lock_guard lock(m.mutex);
  live[0] = static_cast<int>(m.device.size());
  live[1] = static_cast<int>(m.pinned.size());
  live[2] = static_cast<int>(m.streams.size() - m.streams.count(nullptr));
  live[3] = static_cast<int>(m.events.size());
  live[4] = m.contexts;
  live[5] = static_cast<int>(contexts.size());
}

// The number of violations since the last call, and the first of them.
EXPORT int fake_violations(char* text, std::size_t bytes) {
  Machine& m = machine();
  const std::lock_guard lock(m.mutex);
  std::strncpy(text, m.first_violation.c_str(), bytes - 1);
  text[bytes - 1] = '\0';
  m.first_violation.clear();
  return std::exchange(m.violations, 0);
}

// A user's stream, and kernels on it, that read or fill device memory and take `delay_us`.
EXPORT void* fake_stream() {
  contexts.push_back(&the_context);
  void* handle = nullptr;
  cuStreamCreate(&handle, 0);
  contexts.pop_back();
  return handle;
}

EXPORT void fake_end_stream(void* handle) {
  contexts.push_back(&the_context);
  cuStreamDestroy_v2(handle);
  contexts.pop_back();
}

EXPORT void fake_write(void* handle, unsigned long long to, const void* from, std::size_t bytes,
                       int delay_us) {
  const std::lock_guard lock(machine().mutex);
  const auto* data = static_cast<const unsigned char*>(from);
  std::vector<unsigned char> copied(data, data + bytes);
  enqueue(handle, {{to, bytes, true}}, [=, copied = std::move(copied)] {
    std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
    std::memcpy(reinterpret_cast<void*>(to), copied.data(), bytes);
  });
}

EXPORT void fake_read(void* handle, void* to, unsigned long long from, std::size_t bytes, int delay_us) {
  const std::lock_guard lock(machine().mutex);
  enqueue(handle, {{from, bytes, false}}, [=] {
    std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
    std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  });
}

EXPORT void fake_synchronize(void* handle) {
  std::unique_lock lock(machine().mutex);
  Queue& queue = stream(handle);
  machine().changed.wait(lock, [&] { return queue.operations.empty(); });
}
