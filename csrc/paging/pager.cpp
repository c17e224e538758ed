#include "pager.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "cuda_store.h"
#include "errors.h"
#include "file_store.h"

namespace lk::paging {
namespace {

constexpr std::int64_t kLeastPageBytes = 64 << 10;
constexpr std::int64_t kMostPageBytes = std::int64_t{1} << 40;

// Adds the time from the first start() to its own end to `total`; to be destroyed under the lock.
class StallTimer {
 public:
  explicit StallTimer(double& total) : total_(total) {}
  ~StallTimer() {
    if (started_) total_ += std::chrono::duration<double>(Clock::now() - begin_).count();
  }
  void start() {
    if (!started_) begin_ = Clock::now();
    started_ = true;
  }

 private:
  using Clock = std::chrono::steady_clock;
  double& total_;
  bool started_ = false;
  Clock::time_point begin_;
};

Device make_device(const std::string& name, std::int64_t page_bytes, std::optional<std::string> directory,
                   bool budget) {
  if (name == "cpu") return cpu_device(page_bytes, std::move(directory), budget);
  int index = -1, end = 0;
  if (std::sscanf(name.c_str(), "cuda:%d%n", &index, &end) == 1 && index >= 0 &&
      name == "cuda:" + std::to_string(index)) {
    return cuda_device(index, page_bytes);
  }
  throw std::invalid_argument("device: got '" + name + "'; it may be 'cpu' or 'cuda:N'");
}

}  // namespace

std::shared_ptr<Pager> Pager::make(const std::string& device, std::int64_t page_bytes,
                                   std::optional<std::int64_t> resident_bytes,
                                   std::optional<std::string> directory) {
  if (page_bytes < kLeastPageBytes || page_bytes > kMostPageBytes || (page_bytes & (page_bytes - 1)) != 0) {
    throw std::invalid_argument("page_bytes: got " + std::to_string(page_bytes) +
                                "; it may be a power of two from 65536 to 2**40");
  }
  std::int64_t limit = kNoLimit;
  if (resident_bytes) {
    if (*resident_bytes <= 0) {
      throw std::invalid_argument("resident_bytes: got " + std::to_string(*resident_bytes) +
                                  "; it may be a positive number of bytes, or None for no limit");
    }
    limit = std::max<std::int64_t>(2, (*resident_bytes - 1) / page_bytes + 1);
  }
  Device made = make_device(device, page_bytes, std::move(directory), limit != kNoLimit);
  const auto destroy = [](Pager* pager) {
    if (pager->process_ == getpid()) {
      delete pager;
    } else if (pager->device_.store) {
      // After fork() the lock may be held for ever and the thread is not there: all is left as it is, but the
      // file.
      pager->device_.store->abandon();
    }
  };
  return {new Pager(std::move(made), page_bytes, limit), destroy};
}

Pager::Pager(Device device, std::int64_t page_bytes, std::int64_t limit)
    : process_(getpid()),
      page_bytes_(page_bytes),
      limit_(limit),
      device_(std::move(device)),
      table_(page_bytes) {}

Pager::~Pager() { close(); }

void Pager::check_process() const {
  if (process_ != getpid()) {
    throw std::runtime_error("this pager belongs to process " + std::to_string(process_) +
                             ": after a fork a child cannot use it; create one in the child");
  }
}

Pager::Lock Pager::enter() {
  check_process();
  Lock lock(mutex_);
  if (closed_) throw std::runtime_error("the pager is closed");
  return lock;
}

bool Pager::closed() {
  check_process();
  const Lock lock(mutex_);
  return closed_;
}

Page& Pager::get(std::int64_t number) {
  Page* page = table_.find(number);
  if (page == nullptr)
    throw std::invalid_argument("page: got " + std::to_string(number) + "; there is no such page");
  return *page;
}

void Pager::wait_for_change(Lock& lock) {
  changed_.wait(lock);
  if (closed_) throw std::runtime_error("the pager was closed by another thread");
}

bool Pager::anything_moves() {
  const auto pages = table_.all();
  return std::any_of(pages.begin(), pages.end(), [](const Page* p) { return p->moving() || p->writing; });
}

void Pager::raise_error_of(Page& page) {
  if (page.error) std::rethrow_exception(std::exchange(page.error, nullptr));
}

// Allocation ------------------------------------------------------------------------------------------------

std::int64_t Pager::room(std::int64_t arena) {
  const Lock lock = enter();
  return table_.room(arena);
}

std::pair<int, std::int64_t> Pager::allocate(std::int64_t arena, std::int64_t bytes) {
  const std::int64_t most = page_bytes_ - kHeaderBytes;
  if (bytes <= 0 || bytes > most) {
    throw std::invalid_argument("bytes: got " + std::to_string(bytes) + "; it may be from 1 to " +
                                std::to_string(most) + ", which is what a page holds");
  }
  const Lock lock = enter();
  Page* page = table_.open_page(arena, bytes);
  if (page == nullptr) {
    // With a budget the page will have to leave one day, and then it must not be too late to find that it
    // cannot.
    const bool reserve = limit_ != kNoLimit;
    if (reserve) device_.store->reserve(table_.next_number());
    page = &table_.add(arena);
    page->reserved = reserve;
  }
  return {page->number, table_.place(*page, bytes)};
}

void Pager::free(std::int64_t number, std::int64_t offset) {
  Lock lock = enter();
  for (;; wait_for_change(lock)) {
    Page& page = get(number);
    if (page.allocations.count(offset) == 0) {
      throw std::invalid_argument("offset: got " + std::to_string(offset) +
                                  "; nothing is allocated there in page " + std::to_string(number));
    }
    if (page.allocations.size() > 1) {
      page.allocations.erase(offset);
      return;
    }
    if (page.pins > 0) {
      throw std::runtime_error("page " + std::to_string(number) +
                               " is pinned: its last allocation cannot be freed");
    }
    unqueue(page);
    if (page.writing || page.moving()) continue;
    if (page.frame) drop_frame(page);
    if (page.reserved) device_.store->release(page.number);
    table_.remove(page);
    changed_.notify_all();
    return;
  }
}

// Pins ------------------------------------------------------------------------------------------------------

void Pager::pin(std::int64_t number, Stream stream) {
  Lock lock = enter();
  StallTimer stall(stalled_);
  bool refused = false;  // by the system, a frame: then somebody has to give up theirs
  for (;;) {
    Page& page = get(number);
    raise_error_of(page);
    // What the background has not begun: this thread does it, or it need not be done.
    const std::optional<Job> queued = unqueue(page);
    if (page.writing || page.moving()) {
      stall.start();
      wait_for_change(lock);
      continue;
    }
    if (page.frame) {
      device_.memory->begin_use(*page.frame, stream);
      ++page.pins;
      table_.touch(page);
      table_.refresh(page);
      return;
    }
    stall.start();
    Page* victim = nullptr;
    if (queued && queued->kind == Job::Kind::read && queued->page == &page) {
      victim = queued->victim;
    }
    if (victim == nullptr && (refused || !has_room())) {
      victim = table_.victim();
      if (victim == nullptr) {
        if (anything_moves()) {
          wait_for_change(lock);
          continue;
        }
        const std::string resident =
            std::to_string(frames_) + " pages of " + std::to_string(page_bytes_) + " bytes";
        throw OutOfMemory("page " + std::to_string(number) + " cannot be made resident: " +
                          (refused ? "the system has no memory for it beside " + resident + " that are pinned"
                                   : "all that fit into the budget, " + resident + ", are pinned"));
      }
    }
    if (victim != nullptr) {
      unqueue(*victim);
      if (victim->writing) {
        wait_for_change(lock);
        continue;
      }
    }
    if (bring_in(lock, page, victim)) {
      ++faults_;
    } else {
      refused = true;
    }
  }
}

void Pager::unpin(std::int64_t number, bool dirty, Stream stream) {
  const Lock lock = enter();
  Page& page = get(number);
  if (page.pins == page.views) throw std::runtime_error("page " + std::to_string(number) + " is not pinned");
  device_.memory->end_use(*page.frame, stream);
  page.dirty |= dirty;
  --page.pins;
  table_.refresh(page);
}

std::uintptr_t Pager::address(std::int64_t number) {
  const Lock lock = enter();
  const Page& page = get(number);
  if (page.pins == 0) throw std::runtime_error("page " + std::to_string(number) + " is not pinned");
  return page.frame->address();
}

std::shared_ptr<Frame> Pager::add_view(std::int64_t number) {
  const Lock lock = enter();
  Page& page = get(number);
  if (!device_.synchronous)
    throw std::runtime_error("pages on " + device_.name + " have no view on the host");
  if (page.pins == 0) throw std::runtime_error("page " + std::to_string(number) + " is not pinned");
  ++page.pins;
  ++page.views;
  return page.frame;
}

void Pager::drop_view(int number) noexcept {
  if (process_ != getpid()) return;
  const Lock lock(mutex_);
  if (closed_) return;
  Page& page = *table_.find(number);
  --page.pins;
  --page.views;
  table_.refresh(page);
}

// Movement --------------------------------------------------------------------------------------------------

template <class F>
void Pager::unlocked(Lock& lock, F&& blocking) {
  if (!device_.synchronous) return blocking();
  lock.unlock();
  try {
    blocking();
  } catch (...) {
    lock.lock();
    throw;
  }
  lock.lock();
}

void Pager::write(Lock& lock, Page& page) {
  if (!page.reserved) {
    device_.store->reserve(page.number);
    page.reserved = true;
  }
  std::uint64_t sum = 0;
  unlocked(lock, [&] { sum = device_.store->write(page.number, *page.frame); });
  page.checksum = sum;
  page.stored = true;
  page.dirty = false;
  page.error = nullptr;
  bytes_written_ += page_bytes_;
}

void Pager::drop_frame(Page& page) {
  page.frame.reset();
  --frames_;
  table_.refresh(page);
}

bool Pager::bring_in(Lock& lock, Page& page, Page* victim, Page** culprit) {
  std::shared_ptr<Frame> frame;
  page.activity = Activity::reading;
  if (victim != nullptr) {
    victim->activity = Activity::evicting;
    table_.refresh(*victim);
  }
  try {
    bool zero = false;
    if (victim != nullptr) {
      if (culprit != nullptr) *culprit = victim;
      if (victim->dirty) write(lock, *victim);
      frame = std::move(victim->frame);
      victim->activity = Activity::idle;
      table_.refresh(*victim);
      ++evictions_;
      changed_.notify_all();
    } else {
      frame = device_.memory->take();
      if (frame == nullptr) {
        page.activity = Activity::idle;
        changed_.notify_all();
        return false;
      }
      ++frames_;
      peak_frames_ = std::max(peak_frames_, frames_);
      zero = device_.memory->frames_are_zero();
    }
    if (culprit != nullptr) *culprit = &page;
    if (page.stored) {
      unlocked(lock, [&] { device_.store->read(page.number, *frame, page.checksum); });
      bytes_read_ += page_bytes_;
    } else if (!zero) {
      unlocked(lock, [&] { device_.memory->zero(*frame); });
    }
  } catch (...) {
    if (frame) {
      frame.reset();
      --frames_;
    }
    if (victim != nullptr && victim->activity == Activity::evicting) {
      victim->activity = Activity::idle;
      table_.refresh(*victim);
    }
    page.activity = Activity::idle;
    changed_.notify_all();
    throw;
  }
  page.frame = std::move(frame);
  page.activity = Activity::idle;
  table_.refresh(page);
  changed_.notify_all();
  return true;
}

// Background ------------------------------------------------------------------------------------------------

void Pager::start_thread() {
  if (thread_.joinable()) return;
  // The process's signals are for its other threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread([this] { work(); });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

std::optional<Pager::Job> Pager::unqueue(Page& page) {
  const auto found = std::find_if(queue_.begin(), queue_.end(), [&page](const Job& job) {
    return job.page == &page || job.victim == &page;
  });
  if (found == queue_.end()) return std::nullopt;
  const Job job = *found;
  queue_.erase(found);
  if (job.kind == Job::Kind::write) {
    job.page->write_queued = false;
  } else {
    job.page->activity = Activity::idle;
    if (job.victim == nullptr) {
      --promised_;
    } else {
      job.victim->activity = Activity::idle;
      table_.refresh(*job.victim);
    }
  }
  changed_.notify_all();
  return job;
}

void Pager::run(Lock& lock, const Job& job) {
  Page* culprit = job.page;
  try {
    if (job.kind == Job::Kind::write) {
      job.page->writing = true;
      write(lock, *job.page);
    } else {
      bring_in(lock, *job.page, job.victim, &culprit);
    }
  } catch (...) {
    culprit->error = std::current_exception();
  }
  job.page->writing = false;
}

void Pager::work() {
  Lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [this] { return closed_ || !queue_.empty(); });
    if (closed_) return;
    const Job job = *unqueue(*queue_.front().page);
    running_ = true;
    run(lock, job);
    running_ = false;
    changed_.notify_all();
  }
}

void Pager::prefetch(std::int64_t number) {
  Lock lock = enter();
  Page& page = get(number);
  if (page.moving()) return;
  if (page.frame) {
    if (page.pins == 0) {
      table_.touch(page);
      table_.refresh(page);
    }
    return;
  }
  Page* victim = nullptr;
  if (!has_room()) {
    victim = table_.victim();
    if (victim == nullptr) return;
    unqueue(*victim);
  }
  table_.touch(page);
  const Job job{Job::Kind::read, &page, victim};
  if (!device_.synchronous) return run(lock, job);
  start_thread();
  page.activity = Activity::read_queued;
  if (victim == nullptr) {
    ++promised_;
  } else {
    victim->activity = Activity::evict_queued;
    table_.refresh(*victim);
  }
  queue_.push_back(job);
  work_.notify_one();
}

void Pager::write_back(std::int64_t number) {
  Lock lock = enter();
  Page& page = get(number);
  if (limit_ == kNoLimit || !page.frame || !page.dirty || page.pins > 0) return;
  if (page.moving() || page.writing || page.write_queued) return;
  const Job job{Job::Kind::write, &page, nullptr};
  if (!device_.synchronous) return run(lock, job);
  start_thread();
  page.write_queued = true;
  queue_.push_back(job);
  work_.notify_one();
}

std::int64_t Pager::evict() {
  Lock lock = enter();
  StallTimer stall(stalled_);
  stall.start();
  for (;; wait_for_change(lock)) {
    while (!queue_.empty()) unqueue(*queue_.front().page);
    if (!running_) break;
  }

  std::exception_ptr error;
  std::vector<Page*> leaving = table_.unpinned();
  const auto keep = [&](Page& page) {
    if (!error) error = std::current_exception();
    page.activity = Activity::idle;
    table_.refresh(page);
    changed_.notify_all();
  };
  for (Page* page : leaving) {
    page->activity = Activity::evicting;
    table_.refresh(*page);
  }
  for (Page*& page : leaving) {
    try {
      if (page->dirty) write(lock, *page);
    } catch (...) {
      keep(*page);
      page = nullptr;
    }
  }
  leaving.erase(std::remove(leaving.begin(), leaving.end(), nullptr), leaving.end());
  try {
    const std::function<void()> copies = device_.memory->copies();
    lock.unlock();
    copies();
    lock.lock();
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    for (Page* page : leaving) {
      page->dirty = true;  // perhaps: which copy failed is not known
      keep(*page);
    }
    leaving.clear();
  }
  std::int64_t bytes = 0;
  for (Page* page : leaving) {
    page->activity = Activity::idle;
    drop_frame(*page);
    ++evictions_;
    bytes += page_bytes_;
  }
  changed_.notify_all();
  if (error) std::rethrow_exception(error);
  return bytes;
}

void Pager::wait() {
  Lock lock = enter();
  StallTimer stall(stalled_);
  stall.start();
  while (!queue_.empty() || running_) wait_for_change(lock);
  if (!device_.synchronous) {
    const std::function<void()> copies = device_.memory->copies();
    lock.unlock();
    std::exception_ptr error;
    try {
      copies();
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error) std::rethrow_exception(error);
  }
  for (Page* page : table_.all()) raise_error_of(*page);
}

// Properties, and the end -----------------------------------------------------------------------------------

std::vector<PageInfo> Pager::pages() {
  const Lock lock = enter();
  std::vector<PageInfo> found;
  for (const Page* page : table_.all()) {
    const bool moving = page->moving() || (page->frame && device_.memory->busy(*page->frame)) ||
                        device_.store->busy(page->number);
    found.push_back({page->number,
                     moving        ? "in flight"
                     : page->frame ? "resident"
                                   : "host",
                     page->pins, static_cast<std::int64_t>(page->allocations.size()), page->dirty});
  }
  return found;
}

Stats Pager::stats() {
  const Lock lock = enter();
  std::int64_t pinned = 0;
  for (const Page* page : table_.all()) pinned += page->pins > 0;
  return {frames_ * page_bytes_,
          peak_frames_ * page_bytes_,
          device_.store->reserved_bytes(),
          static_cast<std::int64_t>(table_.count()),
          pinned,
          faults_,
          evictions_,
          bytes_read_,
          bytes_written_,
          stalled_ + device_.memory->stalled_seconds()};
}

void Pager::reset_stats() {
  const Lock lock = enter();
  peak_frames_ = frames_;
  faults_ = evictions_ = bytes_read_ = bytes_written_ = 0;
  stalled_ = 0;
  device_.memory->reset_stalled();
}

std::optional<std::int64_t> Pager::resident_limit() const {
  if (limit_ == kNoLimit) return std::nullopt;
  return limit_ * page_bytes_;
}

void Pager::close() {
  check_process();
  Lock lock(mutex_);
  if (closed_) {
    changed_.wait(lock, [this] { return torn_down_; });
    return;
  }
  closed_ = true;
  while (!queue_.empty()) unqueue(*queue_.front().page);
  work_.notify_all();
  changed_.notify_all();
  if (thread_.joinable()) {
    lock.unlock();
    thread_.join();
    lock.lock();
  }
  // Other threads may be reading or writing a page for a pin of theirs.
  changed_.wait(lock, [this] { return !anything_moves(); });
  for (Page* page : table_.all()) {
    if (page->frame) drop_frame(*page);
  }
  table_ = PageTable(page_bytes_);
  device_.store.reset();
  device_.memory.reset();
  torn_down_ = true;
  changed_.notify_all();
}

}  // namespace lk::paging
