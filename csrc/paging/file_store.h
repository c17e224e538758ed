// The CPU's device: resident pages are anonymous mappings, the others lie in a file, page n at byte n *
// page_bytes.
//
// The file has no name (O_TMPFILE, or mkstemp and unlink): however the process ends, nothing is left behind,
// and any number of processes can use one directory. Its space is reserved before a page comes to be, so that
// a full disk is an error of allocate() and not, much later, of a write; it is read and written by pread and
// pwrite only, never mapped, so that a truncated file is an error and not a SIGBUS, and a child after fork()
// cannot disturb the file's position.
//
// Pages bypass the system's page cache (O_DIRECT): who asks for a budget means it, and a memory limit (a
// cgroup's) counts the cache too. Where the file system has no O_DIRECT, what is read is dropped from the
// cache at once and what is written kCachedBytes later. Pages of 2 MiB of random bytes on a virtual disk,
// GB/s, one at a time:
//
//                                          written      read in order   read in any order
//   O_DIRECT                               2.3 to 2.8   1.5 to 1.9      1.4 to 1.5
//   dropped from the cache, no readahead   2.2 to 2.9   0.5 to 1.0      0.6
//   dropped from the cache, readahead      likewise     2.2 to 2.9      0.5 to 0.6, and leaves strangers in
//   the cache
//
// (Where everything fits into the cache, 6 and 10: the file is then a second copy of the state in RAM.) A
// fork during a direct read is harmless: nobody touches a frame while it is read.
#pragma once
#include <atomic>
#include <deque>
#include <mutex>
#include <optional>
#include <set>
#include <string>

#include "errors.h"
#include "store.h"

namespace lk::paging {

class MappedMemory : public PageMemory {
 public:
  explicit MappedMemory(std::size_t page_bytes) : page_bytes_(page_bytes) {}
  std::shared_ptr<Frame> take() override;
  bool frames_are_zero() const override { return true; }
  void zero(Frame& frame) override;
  void begin_use(Frame&, Stream) override {}
  void end_use(Frame&, Stream) override {}
  std::function<void()> copies() override {
    return [] {};
  }
  bool busy(Frame&) override { return false; }
  double stalled_seconds() override { return 0; }
  void reset_stalled() override {}

 private:
  std::size_t page_bytes_;
};

class FileStore : public BackingStore {
 public:
  // Of pages in `directory`; nullopt: TMPDIR, else /tmp. The file comes to be here if `now`, else when it is
  // needed.
  FileStore(std::int64_t page_bytes, std::optional<std::string> directory, bool now);
  ~FileStore() override;

  void reserve(int page) override;
  void release(int page) override;
  std::int64_t reserved_bytes() const override;
  bool busy(int) override { return false; }
  std::uint64_t write(int page, Frame& frame) override;
  void read(int page, Frame& frame, std::uint64_t checksum) override;
  void abandon() override;

 private:
  void open();
  int allocate(std::int64_t begin, std::int64_t bytes);  // errno
  void keep_out_of_cache(std::int64_t begin);
  void leave_direct();
  bool resize(std::int64_t pages);
  IoError error(int number, const std::string& action, int page, const std::string& why = "") const;

  const std::int64_t page_bytes_;
  std::string directory_;
  int file_ = -1;
  std::atomic<bool> direct_ = false;

  // Changed under the pager's lock only. Every page below end_ has room but the holes.
  std::set<int> used_;
  std::set<int> holes_;
  std::int64_t end_ = 0;  // the file's size, in pages

  std::mutex cached_mutex_;
  std::deque<std::int64_t> cached_;  // where pages begin that were written and may be in the page cache
};

Device cpu_device(std::int64_t page_bytes, std::optional<std::string> directory, bool budget);

}  // namespace lk::paging
