// The pager: pages of fixed size, of which a bounded number is resident and the others lie in the backing
// store.
//
//   pin(page)         resident? else a frame: a new one within the budget, or the least recently used page's
//     victim          written out if dirty, by the thread that pins
//     read            by the thread that pins
//   unpin(page)       evictable again
//   prefetch(page)    the same as pin up to the end of the reading, by the background thread
//   write_back(page)  by the background thread; afterwards the page can be evicted without a write
//
// One lock for all of it, never held while a file is read or written; `changed_` is notified when a page has
// arrived, left, or could not. A victim is chosen when a page is asked for, prefetches included, and only by
// the order of use: the same calls by one thread evict the same pages, however fast the disk is.
//
// On a device ordered by streams (CUDA) there is no thread: everything is enqueued by the caller, and pin()
// makes the stream wait. See store.h.
#pragma once
#include <sys/types.h>

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "page_table.h"
#include "store.h"

namespace lk::paging {

struct PageInfo {
  int number;
  const char* state;  // "resident", "host", "in flight"
  int pins;
  std::int64_t references;
  bool dirty;
};

struct Stats {
  std::int64_t resident_bytes, peak_resident_bytes, host_bytes, pages, pinned, faults, evictions, bytes_read,
      bytes_written;
  double stalled_s;
};

class Pager {
 public:
  // Throws std::invalid_argument for a page size, budget or device that cannot be.
  static std::shared_ptr<Pager> make(const std::string& device, std::int64_t page_bytes,
                                     std::optional<std::int64_t> resident_bytes,
                                     std::optional<std::string> directory);
  ~Pager();

  std::int64_t room(std::int64_t arena);
  std::pair<int, std::int64_t> allocate(std::int64_t arena, std::int64_t bytes);
  void free(std::int64_t page, std::int64_t offset);

  void pin(std::int64_t page, Stream stream);
  void unpin(std::int64_t page, bool dirty, Stream stream);
  std::uintptr_t address(std::int64_t page);

  void prefetch(std::int64_t page);
  void write_back(std::int64_t page);
  std::int64_t evict();
  void wait();

  std::vector<PageInfo> pages();
  Stats stats();
  void reset_stats();
  std::int64_t page_bytes() const { return page_bytes_; }
  std::optional<std::int64_t> resident_limit() const;
  const std::string& device() const { return device_.name; }
  bool closed();
  void close();

  // The memory of a pinned page for a view of it, which is one more pin until drop_view().
  std::shared_ptr<Frame> add_view(std::int64_t page);
  void drop_view(int page) noexcept;

 private:
  static constexpr std::int64_t kNoLimit = INT64_MAX;
  using Lock = std::unique_lock<std::mutex>;

  // What the background has to do: write back `page`, or bring it in, in the place of `victim` or of nobody.
  struct Job {
    enum class Kind { write, read } kind;
    Page* page;
    Page* victim;
  };

  Pager(Device device, std::int64_t page_bytes, std::int64_t limit);
  Lock enter();  // locks; throws where the pager is closed or another process's
  void check_process() const;
  Page& get(std::int64_t number);
  void wait_for_change(Lock& lock);
  bool anything_moves();
  void raise_error_of(Page& page);

  bool has_room() const { return frames_ + promised_ < limit_; }
  void start_thread();
  std::optional<Job> unqueue(Page& page);  // takes back what is queued for this page
  void run(Lock& lock, const Job& job);    // what the background does
  template <class F>
  void unlocked(Lock& lock, F&& blocking);
  // False: the system refused memory, and nothing has changed. Throws, and says whose error it was.
  bool bring_in(Lock& lock, Page& page, Page* victim, Page** culprit = nullptr);
  void write(Lock& lock, Page& page);  // leaves it clean
  void drop_frame(Page& page);
  void work();  // the background thread

  const pid_t process_;
  const std::int64_t page_bytes_;
  const std::int64_t limit_;  // frames
  Device device_;

  std::mutex mutex_;
  std::condition_variable changed_;  // a page or the queue has
  std::condition_variable work_;     // there is work for the background, or no more
  PageTable table_;
  std::deque<Job> queue_;
  std::thread thread_;
  bool running_ = false;  // the background is at a job
  bool closed_ = false;
  bool torn_down_ = false;

  std::int64_t frames_ = 0;    // that exist
  std::int64_t promised_ = 0;  // to queued prefetches
  std::int64_t peak_frames_ = 0;
  std::int64_t faults_ = 0, evictions_ = 0, bytes_read_ = 0, bytes_written_ = 0;
  double stalled_ = 0;
};

}  // namespace lk::paging
