// Threads on one pager, for ThreadSanitizer and AddressSanitizer (test_sanitizers.py builds and runs it).
//
//   stress cpu DIRECTORY    pages in a file
//   stress cuda             on the fake driver that LORA_KERNELS_CUDA_DRIVER names; every thread has a stream
//
// Each page has a mutex and a count: who holds the mutex pins the page, checks that its bytes are the count,
// perhaps counts on, and unpins. Around it the threads prefetch, write back, evict, wait, read statistics,
// allocate and free. In the end everything is checked again, and pagers are closed while threads use them.
#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/paging/errors.h"
#include "../../csrc/paging/pager.h"

using namespace lk::paging;

namespace {

constexpr std::int64_t kPage = 1 << 16;
constexpr int kThreads = 4;

#define REQUIRE(condition)                                                         \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::_Exit(1);                                                               \
    }                                                                              \
  } while (0)

struct Fake {
  void* (*stream)();
  void (*end_stream)(void*);
  void (*write)(void*, unsigned long long, const void*, std::size_t, int);
  void (*read)(void*, void*, unsigned long long, std::size_t, int);
  void (*synchronize)(void*);
  void (*limits)(std::size_t, std::size_t, int);
  int (*violations)(char*, std::size_t);
};

Fake fake{};

void load_fake() {
  void* library = dlopen(std::getenv("LORA_KERNELS_CUDA_DRIVER"), RTLD_NOW);
  REQUIRE(library != nullptr);
  const auto find = [library](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    REQUIRE(function != nullptr);
  };
  find(fake.stream, "fake_stream");
  find(fake.end_stream, "fake_end_stream");
  find(fake.write, "fake_write");
  find(fake.read, "fake_read");
  find(fake.synchronize, "fake_synchronize");
  find(fake.limits, "fake_limits");
  find(fake.violations, "fake_violations");
}

bool on_cuda() { return fake.stream != nullptr; }

void check(Pager& pager, int page, unsigned char value, void* stream) {
  std::vector<unsigned char> expected(kPage, value);
  std::vector<unsigned char> copy(kPage);
  if (on_cuda()) {
    fake.read(stream, copy.data(), pager.address(page), kPage, 0);
    fake.synchronize(stream);
  } else {
    std::memcpy(copy.data(), reinterpret_cast<void*>(pager.address(page)), kPage);
  }
  REQUIRE(copy == expected);
}

void fill(Pager& pager, int page, unsigned char value, void* stream) {
  if (on_cuda()) {
    const std::vector<unsigned char> bytes(kPage, value);
    fake.write(stream, pager.address(page), bytes.data(), kPage, 50);
  } else {
    std::memset(reinterpret_cast<void*>(pager.address(page)), value, kPage);
  }
}

struct Shared {
  std::mutex mutex;
  int page;
  int count = 0;
};

void hammer(Pager& pager, std::vector<Shared>& pages, int seed, int turns) {
  std::mt19937 draw(seed);
  void* stream = on_cuda() ? fake.stream() : nullptr;
  const auto handle = reinterpret_cast<Stream>(stream);
  for (int turn = 0; turn < turns; ++turn) {
    Shared& shared = pages[draw() % pages.size()];
    const unsigned kind = draw() % 100;
    if (kind < 45) {
      const std::lock_guard lock(shared.mutex);
      pager.pin(shared.page, handle);
      if (draw() % 2) check(pager, shared.page, static_cast<unsigned char>(shared.count), stream);
      const bool dirty = draw() % 2;
      if (dirty) fill(pager, shared.page, static_cast<unsigned char>(++shared.count), stream);
      pager.unpin(shared.page, dirty, handle);
    } else if (kind < 65) {
      pager.prefetch(shared.page);
    } else if (kind < 85) {
      pager.write_back(shared.page);
    } else if (kind < 87) {
      pager.evict();
    } else if (kind < 89) {
      pager.wait();
    } else if (kind < 94) {
      const Stats stats = pager.stats();
      REQUIRE(stats.resident_bytes <= *pager.resident_limit());
      for (const PageInfo& page : pager.pages()) REQUIRE(page.references > 0 && page.pins <= kThreads);
    } else {
      const auto [page, offset] = pager.allocate(seed, 30000);
      pager.prefetch(page);
      pager.free(page, offset);
    }
  }
  if (stream != nullptr) {
    fake.synchronize(stream);
    fake.end_stream(stream);
  }
}

void stress(const std::string& device, const std::optional<std::string>& directory, int turns) {
  const auto pager = Pager::make(device, kPage, 7 * kPage, directory);
  std::vector<Shared> pages(16);
  for (Shared& shared : pages) shared.page = pager->allocate(0, kPage - kHeaderBytes).first;
  std::vector<std::thread> threads;
  for (int seed = 1; seed <= kThreads; ++seed) {
    threads.emplace_back([&, seed] { hammer(*pager, pages, seed, turns); });
  }
  for (std::thread& thread : threads) thread.join();
  pager->wait();
  for (Shared& shared : pages) {
    pager->pin(shared.page, 0);
    check(*pager, shared.page, static_cast<unsigned char>(shared.count), nullptr);
    pager->unpin(shared.page, false, 0);
  }
  const Stats stats = pager->stats();
  REQUIRE(stats.pages == 16 && stats.pinned == 0 && stats.peak_resident_bytes <= 7 * kPage);
  REQUIRE(stats.faults > 0 && stats.evictions > 0 && stats.bytes_read > 0 && stats.bytes_written > 0);
}

// Closing in the middle: the threads end with an exception, and the views' memory lives on.
void close_early(const std::string& device, const std::optional<std::string>& directory) {
  const auto pager = Pager::make(device, kPage, 3 * kPage, directory);
  std::vector<int> pages;
  for (int i = 0; i < 9; ++i) pages.push_back(pager->allocate(0, kPage - kHeaderBytes).first);
  std::atomic<int> told{0};
  std::vector<std::thread> threads;
  for (int first = 0; first < 3; ++first) {
    threads.emplace_back([&, first] {
      for (int i = first;; ++i) {
        const int page = pages[i % 9];
        try {
          pager->prefetch(pages[(i + 2) % 9]);
          pager->pin(page, 0);
          pager->unpin(page, true, 0);
          pager->write_back(page);
          if (i % 50 == 0) pager->evict();
          if (i % 70 == 0) pager->wait();
        } catch (const OutOfMemory&) {
          continue;  // the others have everything pinned
        } catch (const std::runtime_error&) {
          ++told;
          return;
        }
      }
    });
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  std::thread second([&] { pager->close(); });
  pager->close();
  second.join();
  for (std::thread& thread : threads) thread.join();
  REQUIRE(told == 3);
}

}  // namespace

int main(int argc, char** argv) {
  REQUIRE(argc >= 2);
  const std::string kind = argv[1];
  std::optional<std::string> directory;
  if (kind == "cuda") {
    load_fake();
    fake.limits(SIZE_MAX, SIZE_MAX, 20);
  } else {
    REQUIRE(argc == 3);
    directory = argv[2];
  }
  const std::string device = kind == "cuda" ? "cuda:0" : "cpu";
  stress(device, directory, kind == "cuda" ? 400 : 1500);
  for (int i = 0; i < 10; ++i) close_early(device, directory);
  if (kind == "cuda") {
    char text[200];
    if (fake.violations(text, sizeof text) != 0) {
      std::fprintf(stderr, "%s\n", text);
      return 1;
    }
  }
  return 0;
}
