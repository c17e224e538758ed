#include "file_store.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "checksum.h"
#include "errors.h"

namespace lk::paging {
namespace {

constexpr std::int64_t kReserveBytes = 16 << 20;  // by which the file grows, where the disk has that much
constexpr std::int64_t kCachedBytes = 8 << 20;    // of written pages that may be in the page cache

class MappedFrame : public Frame {
 public:
  MappedFrame(void* memory, std::size_t bytes) : bytes_(bytes) {
    address_ = reinterpret_cast<std::uintptr_t>(memory);
  }
  ~MappedFrame() override { munmap(reinterpret_cast<void*>(address_), bytes_); }

 private:
  std::size_t bytes_;
};

std::string temporary_directory() {
  const char* named = std::getenv("TMPDIR");
  return named != nullptr && *named != '\0' ? named : "/tmp";
}

std::string hex(std::uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace

// A page of 2 MiB lies in one huge page where the system has one: a step reads and writes all of it, and with
// small ones waits for the TLB.
std::shared_ptr<Frame> MappedMemory::take() {
  constexpr std::size_t kHuge = 2 << 20;
  const auto bytes = static_cast<std::size_t>(page_bytes_);
  const std::size_t slack = bytes >= kHuge ? kHuge : 0;  // to begin at a multiple of it
  void* memory = mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  auto begin = reinterpret_cast<std::uintptr_t>(memory);
  if (slack > 0) {
    const std::size_t before = (kHuge - begin % kHuge) % kHuge;
    if (before > 0) munmap(memory, before);
    begin += before;
    if (slack > before) munmap(reinterpret_cast<void*>(begin + bytes), slack - before);
    madvise(reinterpret_cast<void*>(begin), bytes, MADV_HUGEPAGE);
  }
  return std::make_shared<MappedFrame>(reinterpret_cast<void*>(begin), page_bytes_);
}

void MappedMemory::zero(Frame& frame) {
  std::memset(reinterpret_cast<void*>(frame.address()), 0, page_bytes_);
}

FileStore::FileStore(std::int64_t page_bytes, std::optional<std::string> directory, bool now)
    : page_bytes_(page_bytes), directory_(directory ? std::move(*directory) : temporary_directory()) {
  if (now) open();
}

FileStore::~FileStore() {
  if (file_ >= 0) close(file_);
}

void FileStore::open() {
#ifdef O_TMPFILE
  do {
    file_ = ::open(directory_.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  } while (file_ < 0 && errno == EINTR);
#endif
  if (file_ < 0) {
    // A file system without O_TMPFILE says EOPNOTSUPP, an old kernel EISDIR; other errors will come again.
    const std::string pattern = directory_ + "/lora_kernels-pages-XXXXXX";
    std::vector<char> name(pattern.c_str(), pattern.c_str() + pattern.size() + 1);
    file_ = mkostemp(name.data(), O_CLOEXEC);
    if (file_ < 0) throw system_error(errno, "no backing file can be created in directory " + directory_);
    unlink(name.data());
  }
  direct_ = fcntl(file_, F_SETFL, O_RDWR | O_DIRECT) == 0;
  // No reading ahead, which would fill the cache with other pages.
  posix_fadvise(file_, 0, 0, POSIX_FADV_RANDOM);
}

// The answer to EINVAL, which O_DIRECT gives where a transfer is not whole blocks: behind a partial one, at
// the end of a truncated file, below a limit on the file's size. Without it the same call says what is the
// matter.
void FileStore::leave_direct() {
  fcntl(file_, F_SETFL, O_RDWR);
  direct_ = false;
}

IoError FileStore::error(int number, const std::string& action, int page, const std::string& why) const {
  return system_error(number, "page " + std::to_string(page) + " (bytes " +
                                  std::to_string(page * page_bytes_) + " to " +
                                  std::to_string((page + 1) * page_bytes_) + ") cannot be " + action +
                                  " the backing file in " + directory_ + why);
}

int FileStore::allocate(std::int64_t begin, std::int64_t bytes) {
  int number;
  do {
    number = posix_fallocate(file_, begin, bytes);
  } while (number == EINTR);
  return number;
}

void FileStore::reserve(int page) {
  if (file_ < 0) open();
  if (page < end_) {
    if (holes_.count(page) != 0) {
      if (const int number = allocate(page * page_bytes_, page_bytes_)) {
        throw error(number, "given room in", page);
      }
      holes_.erase(page);
    }
  } else {
    // From the end on: a step, or, where the disk does not have that, what this page needs.
    const std::int64_t begin = end_ * page_bytes_;
    const std::int64_t need = (page + 1 - end_) * page_bytes_;
    std::int64_t got = std::max(need, kReserveBytes / page_bytes_ * page_bytes_);
    int number = allocate(begin, got);
    if (number != 0 && got > need) {
      got = need;
      number = allocate(begin, got);
    }
    if (number != 0) {
      resize(end_);  // what a refused step has added
      throw error(number, "given room in", page);
    }
    end_ += got / page_bytes_;
  }
  used_.insert(page);
}

void FileStore::release(int page) {
  used_.erase(page);
  const std::int64_t last = used_.empty() ? -1 : *used_.rbegin();
  if (page > last) {
    if (!resize(last + 1)) return;  // the space stays, for later pages
    end_ = last + 1;
    holes_.erase(holes_.lower_bound(static_cast<int>(end_)), holes_.end());
  } else if (fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page * page_bytes_, page_bytes_) ==
             0) {
    holes_.insert(page);
  }
}

bool FileStore::resize(std::int64_t pages) {
  int done;
  do {
    done = ftruncate(file_, pages * page_bytes_);
  } while (done != 0 && errno == EINTR);
  return done == 0;
}

std::int64_t FileStore::reserved_bytes() const {
  return static_cast<std::int64_t>(used_.size()) * page_bytes_;
}

std::uint64_t FileStore::write(int page, Frame& frame) {
  const auto* from = reinterpret_cast<const char*>(frame.address());
  const std::uint64_t sum = checksum(from, page_bytes_);
  const std::int64_t begin = page * page_bytes_;
  for (std::int64_t done = 0; done < page_bytes_;) {
    const bool direct = direct_;
    const ssize_t n = pwrite(file_, from + done, page_bytes_ - done, begin + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EINVAL && direct) {
      leave_direct();
      continue;
    }
    if (n <= 0) throw error(n < 0 ? errno : EIO, "written to", page);
    done += n;
  }
  if (!direct_) keep_out_of_cache(begin);
  return sum;
}

void FileStore::read(int page, Frame& frame, std::uint64_t expected) {
  auto* to = reinterpret_cast<char*>(frame.address());
  const std::int64_t begin = page * page_bytes_;
  for (std::int64_t done = 0; done < page_bytes_;) {
    const bool direct = direct_;
    const ssize_t n = pread(file_, to + done, page_bytes_ - done, begin + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EINVAL && direct) {
      leave_direct();
      continue;
    }
    if (n < 0) throw error(errno, "read from", page);
    if (n == 0) {
      throw error(EIO, "read from", page,
                  ", which somebody has truncated: it ends at byte " + std::to_string(begin + done));
    }
    done += n;
  }
  if (!direct_) posix_fadvise(file_, begin, page_bytes_, POSIX_FADV_DONTNEED);
  if (const std::uint64_t sum = checksum(to, page_bytes_); sum != expected) {
    throw error(EIO, "read from", page,
                ", which somebody has altered: its checksum is " + hex(sum) + ", what was written had " +
                    hex(expected));
  }
}

void FileStore::keep_out_of_cache(std::int64_t begin) {
  sync_file_range(file_, begin, page_bytes_, SYNC_FILE_RANGE_WRITE);
  std::vector<std::int64_t> old;
  {
    const std::lock_guard lock(cached_mutex_);
    cached_.push_back(begin);
    while (static_cast<std::int64_t>(cached_.size()) * page_bytes_ > std::max(kCachedBytes, page_bytes_)) {
      old.push_back(cached_.front());
      cached_.pop_front();
    }
  }
  for (const std::int64_t page : old) {
    // What could not reach the disk stays in the cache, its only place.
    if (sync_file_range(file_, page, page_bytes_,
                        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER) ==
        0) {
      posix_fadvise(file_, page, page_bytes_, POSIX_FADV_DONTNEED);
    }
  }
}

void FileStore::abandon() {
  if (file_ >= 0) close(file_);
  file_ = -1;
}

Device cpu_device(std::int64_t page_bytes, std::optional<std::string> directory, bool budget) {
  Device device;
  device.name = "cpu";
  device.synchronous = true;
  device.memory = std::make_unique<MappedMemory>(page_bytes);
  device.store = std::make_unique<FileStore>(page_bytes, std::move(directory), budget);
  return device;
}

}  // namespace lk::paging
