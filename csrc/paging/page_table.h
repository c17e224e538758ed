// The page table: which pages there are, what lies in them, and which resident page has to make room next.
// Pure logic: no memory, no file, no thread; the pager calls it under its lock.
//
//   page    | header 64 B | allocation | allocation | ... | never handed out |
//                          offsets are multiples of 64, ^ filled
//
// An arena (a kind of state) fills one page at a time. Each allocation is a reference; what is freed inside a
// page is not handed out again, so new allocations are zero without anybody clearing them, and a page goes
// back as soon as its last reference does.
//
// How a page gets about (Activity), beside its frame:
//
//   idle + frame: resident        idle, no frame: on the host
//   read_queued, reading          on its way in
//   evict_queued, evicting        on its way out, to make room for another
//   writing (a flag)              the background writes it; it stays resident
#pragma once
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <set>
#include <unordered_set>
#include <utility>
#include <vector>

#include "store.h"

namespace lk::paging {

inline constexpr std::int64_t kHeaderBytes = 64;
inline constexpr std::int64_t kAlignment = 64;

enum class Activity { idle, read_queued, reading, evict_queued, evicting };

struct Page {
  int number = 0;
  std::int64_t arena = 0;
  std::int64_t filled = kHeaderBytes;
  std::unordered_set<std::int64_t> allocations;  // offsets

  std::shared_ptr<Frame> frame;  // null: not resident
  Activity activity = Activity::idle;
  bool write_queued = false;
  bool writing = false;
  int pins = 0;  // views included
  int views = 0;
  bool dirty = false;          // the frame has what the store does not have
  bool stored = false;         // the store has a content; otherwise the page is zero
  bool reserved = false;       // the store has room for it
  std::uint64_t checksum = 0;  // of what is stored
  std::uint64_t last_use = 0;  // the time of the last pin or prefetch; unique
  std::exception_ptr error;    // of background work, until somebody has been told

  bool moving() const { return activity != Activity::idle; }
};

class PageTable {
 public:
  explicit PageTable(std::int64_t page_bytes) : page_bytes_(page_bytes) {}

  std::int64_t room(std::int64_t arena) const;
  // The arena's open page, if `bytes` fit in it.
  Page* open_page(std::int64_t arena, std::int64_t bytes);
  // A new page, with the smallest number that is free; it becomes the arena's open one.
  Page& add(std::int64_t arena);
  int next_number() const { return free_numbers_.empty() ? size_ : *free_numbers_.begin(); }
  std::int64_t place(Page& page, std::int64_t bytes);  // hands out the next `bytes`, returns the offset
  void remove(Page& page);

  Page* find(std::int64_t number);  // null: no such page
  std::vector<Page*> all();
  std::size_t count() const { return static_cast<std::size_t>(size_) - free_numbers_.size(); }

  // To be called when a page has been used, and whenever frame, pins or activity have changed.
  void touch(Page& page);
  void refresh(Page& page);
  // The least recently used of the resident pages that are neither pinned nor on their way; null: there is
  // none.
  Page* victim();
  std::vector<Page*> unpinned();  // all of those, in the order in which they would be evicted

 private:
  std::int64_t page_bytes_;
  std::vector<std::unique_ptr<Page>> pages_;
  std::set<int> free_numbers_;
  int size_ = 0;
  std::map<std::int64_t, int> open_;  // arena -> page
  std::map<std::uint64_t, Page*> by_use_;
  std::uint64_t clock_ = 0;
};

}  // namespace lk::paging
