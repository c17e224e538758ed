// What a pager needs of a device: memory for resident pages, and a place for the others.
//
// A device is either synchronous (the CPU: file_store.h) or ordered by streams (CUDA: cuda_store.h).
//   synchronous   read() and write() block until done. The pager calls them without its lock, from any
//   thread,
//                 never two at once for one page.
//   by streams    read() and write() only enqueue; the frame remembers the events that whoever touches it
//   next
//                 must wait for. Everything is called under the pager's lock but the function that copies()
//                 returns.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace lk::paging {

using Stream = std::uintptr_t;  // a cudaStream_t; 0 is the legacy default stream, and all that a CPU has

// The memory of one resident page. Its destructor gives it back to the system, after the work that uses it.
class Frame {
 public:
  virtual ~Frame() = default;
  Frame(const Frame&) = delete;
  Frame& operator=(const Frame&) = delete;
  std::uintptr_t address() const { return address_; }

 protected:
  Frame() = default;
  std::uintptr_t address_ = 0;
};

class PageMemory {
 public:
  virtual ~PageMemory() = default;

  virtual std::shared_ptr<Frame> take() = 0;  // a new one; null where the system has no memory left
  virtual bool frames_are_zero() const = 0;
  virtual void zero(Frame& frame) = 0;

  // Work that is enqueued on `stream` from now on finds the frame's content complete.
  virtual void begin_use(Frame& frame, Stream stream) = 0;
  // Nothing overwrites, copies or frees the frame before what `stream` holds now is done.
  virtual void end_use(Frame& frame, Stream stream) = 0;

  // A function that blocks, called without the lock, until every copy enqueued so far is done; it throws what
  // went wrong with one.
  virtual std::function<void()> copies() = 0;
  virtual bool busy(Frame& frame) = 0;  // whether a copy is under way

  // Seconds for which streams had to wait for copies (CUDA); the host's own waits are the pager's to count.
  virtual double stalled_seconds() = 0;
  virtual void reset_stalled() = 0;
};

class BackingStore {
 public:
  virtual ~BackingStore() = default;

  virtual void reserve(
      int page) = 0;  // room for this page; throws IoError or OutOfMemory, and nothing has changed
  virtual void release(int page) = 0;  // really given back
  virtual std::int64_t reserved_bytes() const = 0;
  virtual bool busy(int page) = 0;  // whether a copy to it is under way

  // Both throw IoError. write() returns the checksum that read() verifies (0 where the store keeps none).
  virtual std::uint64_t write(int page, Frame& frame) = 0;
  virtual void read(int page, Frame& frame, std::uint64_t checksum) = 0;

  // In a child after fork(): lets go of what the child inherited, without touching any lock or thread.
  virtual void abandon() = 0;
};

struct Device {
  std::string name;         // "cpu", "cuda:0"
  bool synchronous = true;  // see above
  std::unique_ptr<BackingStore> store;
  std::unique_ptr<PageMemory> memory;
};

}  // namespace lk::paging
