#include "cuda_store.h"

#include <cerrno>
#include <deque>
#include <functional>
#include <map>
#include <utility>

#include "cuda_driver.h"
#include "errors.h"

namespace lk::paging {
namespace {

using namespace cuda;

StreamHandle handle(Stream stream) { return reinterpret_cast<StreamHandle>(stream); }

// The device's primary context, which is torch's too, and the pager's streams.
class Gpu {
 public:
  explicit Gpu(int index) : api(driver()) {
    int count = 0;
    check(api.cuDeviceGetCount(&count), "cuDeviceGetCount");
    if (index >= count) {
      throw std::invalid_argument("device: got 'cuda:" + std::to_string(index) + "'; there are " +
                                  std::to_string(count) + " CUDA devices");
    }
    check(api.cuDeviceGet(&ordinal_, index), "cuDeviceGet");
    check(api.cuDevicePrimaryCtxRetain(&context_, ordinal_), "cuDevicePrimaryCtxRetain");
    try {
      const Current current(*this);
      check(api.cuStreamCreate(&in, kStreamNonBlocking), "cuStreamCreate");
      check(api.cuStreamCreate(&out, kStreamNonBlocking), "cuStreamCreate");
    } catch (...) {
      leave();
      throw;
    }
  }
  ~Gpu() { leave(); }
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  // Makes the context the thread's for a scope: the caller's own device comes back afterwards.
  class Current {
   public:
    explicit Current(const Gpu& gpu) : gpu_(gpu) {
      gpu.check(gpu.api.cuCtxPushCurrent_v2(gpu.context_), "cuCtxPushCurrent");
    }
    ~Current() {
      Context popped;
      gpu_.api.cuCtxPopCurrent_v2(&popped);
    }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

   private:
    const Gpu& gpu_;
  };

  void check(Result result, const std::string& what) const {
    if (result != kSuccess) throw IoError(EIO, what + ": " + api.explain(result));
  }

  const Driver& api;
  StreamHandle in = nullptr, out = nullptr;

 private:
  void leave() {
    if (api.cuCtxPushCurrent_v2(context_) == kSuccess) {
      if (in != nullptr) api.cuStreamDestroy_v2(in);
      if (out != nullptr) api.cuStreamDestroy_v2(out);
      Context popped;
      api.cuCtxPopCurrent_v2(&popped);
    }
    api.cuDevicePrimaryCtxRelease_v2(ordinal_);
  }

  Ordinal ordinal_ = 0;
  Context context_ = nullptr;
};

// A point in a stream. The context must be current, but for the destructor, and for synchronize() and the
// like.
class Event {
 public:
  Event(std::shared_ptr<const Gpu> gpu, StreamHandle stream, bool timing = false) : gpu_(std::move(gpu)) {
    gpu_->check(gpu_->api.cuEventCreate(&event_, timing ? 0 : kEventDisableTiming), "cuEventCreate");
    try {
      record(stream);
    } catch (...) {
      gpu_->api.cuEventDestroy_v2(event_);
      throw;
    }
  }
  ~Event() { gpu_->api.cuEventDestroy_v2(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(StreamHandle stream) { gpu_->check(gpu_->api.cuEventRecord(event_, stream), "cuEventRecord"); }
  void hold(StreamHandle stream) const {
    gpu_->check(gpu_->api.cuStreamWaitEvent(stream, event_, 0), "cuStreamWaitEvent");
  }
  bool pending() const { return gpu_->api.cuEventQuery(event_) == kNotReady; }
  Result synchronize() const { return gpu_->api.cuEventSynchronize(event_); }
  double seconds_since(const Event& begin) const {
    float milliseconds = 0;
    if (gpu_->api.cuEventElapsedTime(&milliseconds, begin.event_, event_) != kSuccess) return 0;
    return milliseconds / 1e3;
  }

 private:
  std::shared_ptr<const Gpu> gpu_;
  EventHandle event_ = nullptr;
};

using EventPtr = std::shared_ptr<Event>;

// The point behind a copy that has just been enqueued. Without it nobody could wait for the copy, so then it
// is waited for here.
EventPtr mark(const std::shared_ptr<const Gpu>& gpu, StreamHandle stream) {
  try {
    return std::make_shared<Event>(gpu, stream);
  } catch (...) {
    gpu->api.cuStreamSynchronize(stream);
    throw;
  }
}

bool pending(const EventPtr& event) { return event && event->pending(); }

class DeviceFrame : public Frame {
 public:
  DeviceFrame(std::shared_ptr<const Gpu> gpu, Pointer memory) : gpu_(std::move(gpu)) {
    address_ = static_cast<std::uintptr_t>(memory);
  }
  ~DeviceFrame() override {
    try {
      const Gpu::Current current(*gpu_);
      for (const auto& [stream, use] : uses) use->synchronize();
      if (arrived) arrived->synchronize();
      if (saved) saved->synchronize();
      gpu_->api.cuMemFree_v2(pointer());
    } catch (const std::exception&) {
      // The context is gone, and the memory with it.
    }
  }

  Pointer pointer() const { return address_; }

  // `stream` continues when all that anybody has done with the frame is done.
  void hold(StreamHandle stream) const {
    for (const auto& [user, use] : uses) {
      if (user != stream) use->hold(stream);
    }
    if (arrived && stream != gpu_->in) arrived->hold(stream);
    if (saved && stream != gpu_->out) saved->hold(stream);
  }

  // A copy or a memset of the whole frame has been enqueued: nothing before it matters any more.
  void overwritten(EventPtr by) {
    uses.clear();
    saved.reset();
    arrived = std::move(by);
  }

  std::map<StreamHandle, EventPtr> uses;  // the end of the last use by each stream
  EventPtr arrived;                       // the last copy in, or memset
  EventPtr saved;                         // the last copy out

 private:
  std::shared_ptr<const Gpu> gpu_;
};

class DeviceMemory : public PageMemory {
 public:
  DeviceMemory(std::shared_ptr<const Gpu> gpu, std::size_t page_bytes)
      : gpu_(std::move(gpu)), page_bytes_(page_bytes) {}

  std::shared_ptr<Frame> take() override {
    const Gpu::Current current(*gpu_);
    Pointer memory = 0;
    const Result result = gpu_->api.cuMemAlloc_v2(&memory, page_bytes_);
    if (result == kOutOfMemory) return nullptr;
    gpu_->check(result, "cuMemAlloc");
    return std::make_shared<DeviceFrame>(gpu_, memory);
  }

  bool frames_are_zero() const override { return false; }

  void zero(Frame& base) override {
    auto& frame = static_cast<DeviceFrame&>(base);
    const Gpu::Current current(*gpu_);
    frame.hold(gpu_->in);
    gpu_->check(gpu_->api.cuMemsetD8Async(frame.pointer(), 0, page_bytes_, gpu_->in), "cuMemsetD8Async");
    frame.overwritten(mark(gpu_, gpu_->in));
  }

  void begin_use(Frame& base, Stream stream) override {
    auto& frame = static_cast<DeviceFrame&>(base);
    const Gpu::Current current(*gpu_);
    if (!pending(frame.arrived) && !pending(frame.saved)) {
      frame.hold(handle(stream));
      return;
    }
    // The stream may have to wait: for how long, it will say itself.
    stalled_seconds();
    auto begin = std::make_unique<Event>(gpu_, handle(stream), true);
    frame.hold(handle(stream));
    stalls_.emplace_back(std::move(begin), std::make_unique<Event>(gpu_, handle(stream), true));
  }

  void end_use(Frame& base, Stream stream) override {
    auto& frame = static_cast<DeviceFrame&>(base);
    const Gpu::Current current(*gpu_);
    EventPtr& use = frame.uses[handle(stream)];
    if (use) {
      use->record(handle(stream));
      return;
    }
    try {
      use = std::make_shared<Event>(gpu_, handle(stream));
    } catch (...) {
      frame.uses.erase(handle(stream));
      throw;
    }
  }

  std::function<void()> copies() override {
    const Gpu::Current current(*gpu_);
    return [gpu = gpu_, in = std::make_shared<Event>(gpu_, gpu_->in),
            out = std::make_shared<Event>(gpu_, gpu_->out)] {
      const Gpu::Current here(*gpu);
      gpu->check(in->synchronize(), "a copy to the device");
      gpu->check(out->synchronize(), "a copy from the device");
    };
  }

  bool busy(Frame& base) override {
    auto& frame = static_cast<DeviceFrame&>(base);
    const Gpu::Current current(*gpu_);
    return pending(frame.arrived) || pending(frame.saved);
  }

  double stalled_seconds() override {
    const Gpu::Current current(*gpu_);
    while (!stalls_.empty() && !stalls_.front().second->pending()) {
      stalled_ += stalls_.front().second->seconds_since(*stalls_.front().first);
      stalls_.pop_front();
    }
    return stalled_;
  }

  void reset_stalled() override {
    stalls_.clear();
    stalled_ = 0;
  }

 private:
  std::shared_ptr<const Gpu> gpu_;
  std::size_t page_bytes_;
  std::deque<std::pair<std::unique_ptr<Event>, std::unique_ptr<Event>>> stalls_;  // begin and end
  double stalled_ = 0;
};

class PinnedStore : public BackingStore {
 public:
  PinnedStore(std::shared_ptr<const Gpu> gpu, std::size_t page_bytes)
      : gpu_(std::move(gpu)), page_bytes_(page_bytes) {}
  ~PinnedStore() override {
    while (!slots_.empty()) release(slots_.begin()->first);
  }

  void reserve(int page) override {
    const Gpu::Current current(*gpu_);
    void* memory = nullptr;
    const Result result = gpu_->api.cuMemHostAlloc(&memory, page_bytes_, kHostAllocPortable);
    if (result == kOutOfMemory) {
      throw OutOfMemory("the system refuses " + std::to_string(page_bytes_) +
                        " bytes of pinned host memory for page " + std::to_string(page) + ", beside " +
                        std::to_string(slots_.size()) + " pages that have it");
    }
    gpu_->check(result, "cuMemHostAlloc");
    slots_[page].memory = memory;
  }

  void release(int page) override {
    const auto slot = slots_.find(page);
    try {
      const Gpu::Current current(*gpu_);
      if (slot->second.written) slot->second.written->synchronize();
      if (slot->second.read) slot->second.read->synchronize();
      gpu_->api.cuMemFreeHost(slot->second.memory);
    } catch (const std::exception&) {
      // The context is gone, and the memory with it.
    }
    slots_.erase(slot);
  }

  std::int64_t reserved_bytes() const override {
    return static_cast<std::int64_t>(slots_.size() * page_bytes_);
  }

  std::uint64_t write(int page, Frame& base) override {
    auto& frame = static_cast<DeviceFrame&>(base);
    Slot& slot = slots_.at(page);
    const Gpu::Current current(*gpu_);
    frame.hold(gpu_->out);
    gpu_->check(gpu_->api.cuMemcpyDtoHAsync_v2(slot.memory, frame.pointer(), page_bytes_, gpu_->out),
                "page " + std::to_string(page) + " cannot be copied to the host: cuMemcpyDtoHAsync");
    frame.saved = slot.written = mark(gpu_, gpu_->out);
    return 0;
  }

  void read(int page, Frame& base, std::uint64_t) override {
    auto& frame = static_cast<DeviceFrame&>(base);
    Slot& slot = slots_.at(page);
    const Gpu::Current current(*gpu_);
    frame.hold(gpu_->in);
    if (slot.written) slot.written->hold(gpu_->in);
    gpu_->check(gpu_->api.cuMemcpyHtoDAsync_v2(frame.pointer(), slot.memory, page_bytes_, gpu_->in),
                "page " + std::to_string(page) + " cannot be copied to the device: cuMemcpyHtoDAsync");
    slot.read = mark(gpu_, gpu_->in);
    frame.overwritten(slot.read);
  }

  bool busy(int page) override {
    const auto slot = slots_.find(page);
    if (slot == slots_.end()) return false;
    const Gpu::Current current(*gpu_);
    return pending(slot->second.written);
  }

  void abandon() override {}

 private:
  struct Slot {
    void* memory = nullptr;
    EventPtr written, read;
  };

  std::shared_ptr<const Gpu> gpu_;
  std::size_t page_bytes_;
  std::map<int, Slot> slots_;
};

}  // namespace

Device cuda_device(int index, std::int64_t page_bytes) {
  const auto gpu = std::make_shared<const Gpu>(index);
  Device device;
  device.name = "cuda:" + std::to_string(index);
  device.synchronous = false;
  device.store = std::make_unique<PinnedStore>(gpu, page_bytes);
  device.memory = std::make_unique<DeviceMemory>(gpu, page_bytes);
  return device;
}

}  // namespace lk::paging
