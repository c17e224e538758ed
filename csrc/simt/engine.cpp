#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <random>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the stand-in switches fibers in x86-64 assembly"
#endif

// Saves the callee-saved registers on the old stack, stores its pointer, and goes on with those of the new
// one.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

namespace simt {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kGuardBytes = 4 << 10;
constexpr int kNamedBarriers = 16;
constexpr size_t kSharedAlignment = 1024;
constexpr uint32_t kLeastPriority = 1 << 16;  // of a warp that has something to do

// ---- randomness
// --------------------------------------------------------------------------------------------

uint64_t base_seed = 0x9e3779b97f4a7c15ull, launches = 0, launch_seed = 0;

struct Random {  // splitmix64: small state, any seed is a good one
  uint64_t state = 0;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }
};
Random rng;

// How a launch treats what hardware leaves open. Each is drawn from the seed.
enum class Completion { random, eager, lazy } completion;  // of asynchronous operations
bool by_priority;                                          // warps: strict priorities, or uniformly at random

// ---- threads, warps, blocks
// --------------------------------------------------------------------------------

struct Block;

struct CopyPiece {
  PendingPtr pending;
  std::function<void()> arrived;
};

struct Range {
  Region* region;
  size_t offset, bytes;
};

struct Fiber {
  void* stack_pointer = nullptr;
  Block* block = nullptr;
  unsigned thread = 0;
  bool done = false;
  bool polling = false;           // it gave way without having done anything
  unsigned cluster_arrivals = 0;  // generations of the cluster barrier that it has arrived at
  const char* waiting_for = nullptr;
  Where where;
  std::vector<std::vector<CopyPiece>> groups;  // of cp.async, oldest first; the last one is open
  std::vector<Range> unfenced;                 // its stores to shared memory since its last fence.proxy.async
  char* stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

struct Gathering {  // of the lanes of a collective
  uint32_t mask = 0, arrived = 0;
  const char* name = nullptr;
  Where where;
  std::array<void*, 32> arguments{};
};

struct Warp {
  Block* block = nullptr;
  unsigned index = 0;
  uint32_t ready = 0;
  uint32_t priority = 0;
  uint64_t looked = 0;  // in vain, in which epoch
  std::vector<Gathering> gatherings;
};

struct Warpgroup {
  unsigned arrived = 0;
  const char* name = nullptr;
  std::array<void*, kWarpgroup> arguments{};
  std::array<bool, kWarpgroup> here{};
};

struct Barrier {
  unsigned count = 0, arrived = 0;
  Where where;
  std::vector<Fiber*> waiting;
};

struct Write {  // to global memory, not published yet
  Range range;
  unsigned thread;
  uint64_t epoch;
};

struct Cluster;

struct Block {
  Dim3 index;
  int64_t linear = 0;
  unsigned rank = 0;
  Cluster* cluster = nullptr;
  Region shared;
  std::vector<char> storage;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::array<Barrier, kNamedBarriers> barriers;
  std::vector<PendingPtr> pending;
  std::vector<Write> writes;
  uint64_t epoch = 0;  // barriers of the whole block so far
  unsigned alive = 0;
  bool tracks_proxy = false;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned arrived = 0, generation = 0, alive = 0;
};

std::mutex engine_mutex;
const LaunchConfig* config = nullptr;
const std::function<void()>* body = nullptr;
Fiber* current = nullptr;
void* scheduler_stack = nullptr;
std::string failure;  // of the running launch
std::vector<std::unique_ptr<Cluster>> residents;
std::vector<Warp*> all_warps;

std::vector<std::unique_ptr<Region>> registry;  // sorted by base
std::vector<char*> free_stacks;

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;
void* scheduler_fake = nullptr;
#endif

char* take_stack() {
  if (!free_stacks.empty()) {
    char* stack = free_stacks.back();
    free_stacks.pop_back();
#if defined(__SANITIZE_ADDRESS__)
    // A thread that was stopped in the middle has left its frames marked.
    __asan_unpoison_memory_region(stack + kGuardBytes, kStackBytes - kGuardBytes);
#endif
    return stack;
  }
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  mprotect(stack, kGuardBytes, PROT_NONE);  // an overflow stops at once
  return static_cast<char*>(stack);
}

void to_scheduler() {
  Fiber* self = current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(self->done ? nullptr : &self->fake_stack, scheduler_bottom, scheduler_size);
#endif
  simt_switch(&self->stack_pointer, scheduler_stack);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_bottom, &scheduler_size);
#endif
}

void fiber_entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  try {
    (*body)();
  } catch (const Error& error) {
    if (failure.empty()) failure = error.what();
  }
  current->done = true;
  to_scheduler();
  __builtin_trap();
}

void resume(Fiber& fiber) {
  current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake, fiber.stack, kStackBytes);
#endif
  simt_switch(&scheduler_stack, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
  current = nullptr;
}

Warp& warp_of(Fiber& f) { return f.block->warps[f.thread / kWarp]; }
uint32_t lane_bit(const Fiber& f) { return 1u << (f.thread % kWarp); }

void make_ready(Fiber& f) { warp_of(f).ready |= lane_bit(f); }

void sleep(const char* what, const Where& where) {
  current->waiting_for = what;
  current->where = where;
  warp_of(*current).ready &= ~lane_bit(*current);
  to_scheduler();
}

std::string thread_name(const Fiber& f) {
  char text[128];
  const Dim3 b = f.block->index;
  std::snprintf(text, sizeof text, "block (%u,%u,%u), thread %u (warp %u, lane %u)", b.x, b.y, b.z, f.thread,
                f.thread / kWarp, f.thread % kWarp);
  return text;
}

const char* file_name(const Where& where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  return slash == nullptr ? where.file_name() : slash + 1;
}

void start_block(Block& b, int64_t linear, unsigned rank, Cluster& cluster) {
  const Dim3 g = config->grid;
  b.linear = linear;
  b.index = {static_cast<unsigned>(linear % g.x), static_cast<unsigned>(linear / g.x % g.y),
             static_cast<unsigned>(linear / g.x / g.y)};
  b.rank = rank;
  b.cluster = &cluster;
  // Exactly as large as asked for: the byte behind it is out of bounds.
  b.storage.assign(config->shared_bytes + kSharedAlignment, static_cast<char>(0xff));
  const auto address = reinterpret_cast<uintptr_t>(b.storage.data());
  b.shared.base = b.storage.data() + (kSharedAlignment - address % kSharedAlignment) % kSharedAlignment;
  b.shared.bytes = config->shared_bytes;
  b.shared.name = "shared memory";
  b.shared.shared = true;
  b.shared.block = static_cast<int>(rank);
  b.shared.state.assign(config->shared_bytes, kUndefined);
  b.shared.unfenced.assign(config->shared_bytes, 0);
  const unsigned threads = config->block.x * config->block.y * config->block.z;
  b.fibers = std::vector<Fiber>(threads);
  b.warps = std::vector<Warp>((threads + kWarp - 1) / kWarp);
  b.warpgroups = std::vector<Warpgroup>((threads + kWarpgroup - 1) / kWarpgroup);
  b.alive = threads;
  for (unsigned w = 0; w < b.warps.size(); ++w) {
    b.warps[w].block = &b;
    b.warps[w].index = w;
    b.warps[w].priority = kLeastPriority + rng.below(1u << 30);
    const unsigned lanes = std::min<unsigned>(kWarp, threads - w * kWarp);
    b.warps[w].ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
    all_warps.push_back(&b.warps[w]);
  }
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& f = b.fibers[t];
    f.block = &b;
    f.thread = t;
    f.groups.resize(1);
    f.stack = take_stack();
    auto top = reinterpret_cast<uintptr_t>(f.stack + kStackBytes) & ~uintptr_t{15};
    void** sp = reinterpret_cast<void**>(top);
    *--sp = nullptr;                                // where entry would return to
    *--sp = reinterpret_cast<void*>(&fiber_entry);  // popped by ret
    for (int i = 0; i < 6; ++i) *--sp = nullptr;    // the saved registers
    f.stack_pointer = sp;
  }
}

// What is still under way ends with its block: it may be written to, but nobody looks any more.
void end_cluster(Cluster& c, bool failed) {
  for (auto& b : c.blocks) {
    for (size_t i = 0; !failed && i < b->pending.size(); ++i) b->pending[i]->finish();
    std::erase_if(all_warps, [&](Warp* w) { return w->block == b.get(); });
    for (auto& f : b->fibers) free_stacks.push_back(f.stack);
  }
}

// Completes one asynchronous operation at random; false where there is none.
bool complete_one(Block& b) {
  while (!b.pending.empty()) {
    const uint32_t i = rng.below(static_cast<uint32_t>(b.pending.size()));
    PendingPtr p = b.pending[i];
    b.pending[i] = b.pending.back();
    b.pending.pop_back();
    if (p->done) continue;
    p->finish();
    return true;
  }
  return false;
}

bool complete_any() {
  for (auto& c : residents) {
    for (auto& b : c->blocks) {
      if (complete_one(*b)) return true;
    }
  }
  return false;
}

[[noreturn]] void deadlock() {
  std::string text = "deadlock: every thread that has not ended waits:";
  int shown = 0;
  std::string last;
  for (auto& c : residents) {
    for (auto& b : c->blocks) {
      for (auto& f : b->fibers) {
        if (f.done) continue;
        char line[256];
        std::snprintf(line, sizeof line, "%s at %s:%u", f.waiting_for ? f.waiting_for : "nothing",
                      file_name(f.where), f.where.line());
        if (last == line) continue;
        last = line;
        if (++shown > 8) break;
        text += "\n  " + thread_name(f) + " (and those after it): " + line;
      }
    }
  }
  throw Error(text);
}

Warp* choose_warp() {
  const auto count = static_cast<uint32_t>(all_warps.size());
  if (count == 0) return nullptr;
  if (!by_priority) {
    const uint32_t first = rng.below(count);
    for (uint32_t i = 0; i < count; ++i) {
      Warp* w = all_warps[(first + i) % count];
      if (w->ready != 0) return w;
    }
    return nullptr;
  }
  Warp* best = nullptr;
  for (Warp* w : all_warps) {
    if (w->ready != 0 && (best == nullptr || w->priority > best->priority)) best = w;
  }
  // A new order now and then, or one that runs ahead would never be overtaken.
  if (best != nullptr && rng.below(32) == 0) best->priority = kLeastPriority + rng.below(1u << 30);
  return best;
}

void run_residents(const std::function<bool()>& refill) {
  uint64_t epoch = 1;  // of events: what a thread waits for can only come true by one
  uint32_t turn = 0;
  while (!residents.empty()) {
    Warp* w = choose_warp();
    if (w == nullptr) {
      if (!complete_any()) deadlock();
      continue;
    }
    const uint32_t factor = 2 * rng.below(16) + 1, shift = rng.below(32);
    bool progress = false;
    Block& b = *w->block;
    const uint32_t ready = w->ready;
    for (uint32_t i = 0; i < 32; ++i) {
      const uint32_t lane = (i * factor + shift) & 31;
      if ((ready & w->ready & (1u << lane)) == 0) continue;
      Fiber& f = b.fibers[w->index * kWarp + lane];
      f.polling = false;
      resume(f);
      if (!failure.empty()) throw Error(failure);
      if (!f.polling) progress = true;
      if (f.done) {
        w->ready &= ~(1u << lane);
        if (--b.alive == 0 && b.shared.twins != nullptr) b.shared.twins->ended();
        --b.cluster->alive;
      }
    }
    if (completion == Completion::random && rng.below(2) == 0 && complete_one(b)) progress = true;
    if (progress) {
      ++epoch;
    } else {
      w->priority = kLeastPriority - 1 - turn++ % kLeastPriority;  // it only waits: behind all that do not
      w->looked = epoch;
      // Nothing has happened since every thread that could go on has looked for what it waits for.
      const bool stuck =
          std::ranges::all_of(all_warps, [&](Warp* o) { return o->ready == 0 || o->looked == epoch; });
      if (stuck) {
        if (!complete_any()) deadlock();
        ++epoch;
      }
    }
    if (b.cluster->alive == 0) {
      Cluster* ended = b.cluster;
      end_cluster(*ended, false);
      std::erase_if(residents, [&](auto& c) { return c.get() == ended; });
      refill();
    }
  }
}

bool states_are(const uint8_t* state, size_t n, uint8_t value) {
  const uint64_t all = 0x0101010101010101ull * value;
  for (; n >= 8; n -= 8, state += 8) {
    uint64_t eight;
    std::memcpy(&eight, state, 8);
    if (eight != all) return false;
  }
  for (; n > 0; --n, ++state) {
    if (*state != value) return false;
  }
  return true;
}

void check_bounds(Region* region, const void* p, size_t n, size_t align, const char* what,
                  const Where& where) {
  if (region == nullptr) {
    fail(where, "%s through a %s", what,
         p == nullptr ? "null pointer" : "pointer to no memory of this launch");
  }
  if (!region->holds(p, n)) {
    fail(where, "%s out of bounds: %zu bytes at offset %td of %s, which has %zu", what, n,
         static_cast<const char*>(p) - region->base, region->name, region->bytes);
  }
  // Shared memory starts on a multiple of 1024; tensors are where torch put them, as on a device.
  if (reinterpret_cast<uintptr_t>(p) % align != 0) {
    fail(where, "misaligned %s: %zu bytes at offset %zu of %s, alignment %zu needed", what, n,
         region->offset(p), region->name, align);
  }
}

}  // namespace

// ---- failing
// -----------------------------------------------------------------------------------------------

void fail(const Where& where, const char* format, ...) {
  char reason[512], place[64];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(reason, sizeof reason, format, arguments);
  va_end(arguments);
  std::snprintf(place, sizeof place, "%s:%u", file_name(where), where.line());
  std::string text = std::string(reason) + ", at " + place;
  if (current != nullptr) text += ", in " + thread_name(*current);
  throw Error(text);
}

// ---- memory
// ------------------------------------------------------------------------------------------------

Region* find_region(const void* p) {
  auto after = std::upper_bound(registry.begin(), registry.end(), static_cast<const char*>(p),
                                [](const char* at, const auto& r) { return at < r->base; });
  if (after == registry.begin()) return nullptr;
  Region* region = std::prev(after)->get();
  return static_cast<const char*>(p) <= region->base + region->bytes ? region : nullptr;
}

void add_memory(const char* name, void* p, size_t bytes, Use use) {
  if (p == nullptr) return;
  auto region = std::make_unique<Region>();
  region->base = static_cast<char*>(p);
  region->bytes = bytes;
  region->name = name;
  region->writable = use != Use::input;
  if (use != Use::input) {
    region->state.assign(bytes, use == Use::output ? kUndefined : kDefined);
    region->writer.assign(bytes, -1);
    if (use == Use::output) std::memset(p, 0xff, bytes);
  }
  auto at = std::upper_bound(registry.begin(), registry.end(), region->base,
                             [](const char* base, const auto& r) { return base < r->base; });
  registry.insert(at, std::move(region));
}

void check_outputs_written() {
  for (auto& r : registry) {
    if (!r->writable || std::strcmp(r->name, "workspace") == 0) continue;
    for (size_t i = 0; i < r->bytes; ++i) {
      if (r->state[i] == kUndefined) {
        throw Error("byte " + std::to_string(i) + " of " + std::to_string(r->bytes) + " of the output " +
                    r->name + " was never written");
      }
    }
  }
}

void clear_memory() { registry.clear(); }

void check_read(Region* region, const void* p, size_t n, size_t align, const Where& where) {
  check_bounds(region, p, n, align, "read", where);
  if (region->state.empty()) return;
  const size_t at = region->offset(p);
  const uint8_t* state = region->state.data() + at;
  if (states_are(state, n, kDefined)) return;
  for (size_t i = 0; i < n; ++i) {
    if (state[i] == kUndefined) {
      fail(where, "read of %s at offset %zu, which nobody has written", region->name, at + i);
    }
    if (state[i] == kInFlight) {
      fail(where, "read of %s at offset %zu, which an asynchronous operation is still writing", region->name,
           at + i);
    }
    if (state[i] == kBarrier) fail(where, "read of an mbarrier at offset %zu as if it were data", at + i);
    if (state[i] == kUnpublished && current != nullptr && region->writer[at + i] != current->block->linear) {
      fail(where, "read of %s at offset %zu, which block %d wrote without a fence since", region->name,
           at + i, region->writer[at + i]);
    }
  }
}

void check_write(Region* region, const void* p, size_t n, size_t align, const Where& where) {
  check_bounds(region, p, n, align, "write", where);
  if (!region->writable) fail(where, "write to the input %s", region->name);
  const size_t at = region->offset(p);
  uint8_t* state = region->state.data() + at;
  for (size_t i = 0; i < n; ++i) {
    if (state[i] == kBarrier) fail(where, "write over an mbarrier at offset %zu of %s", at + i, region->name);
    if (state[i] == kInFlight) {
      fail(where, "write to %s at offset %zu, which an asynchronous operation is still writing", region->name,
           at + i);
    }
  }
  if (region->shared) {
    std::memset(state, kDefined, n);
    if (current != nullptr && current->block->tracks_proxy) {
      std::memset(region->unfenced.data() + at, 1, n);
      auto& list = current->unfenced;
      if (!list.empty() && list.back().region == region && list.back().offset + list.back().bytes == at) {
        list.back().bytes += n;
      } else {
        list.push_back({region, at, n});
      }
    }
    return;
  }
  Block& b = *current->block;
  std::memset(state, kUnpublished, n);
  std::fill_n(region->writer.begin() + static_cast<std::ptrdiff_t>(at), n, static_cast<int32_t>(b.linear));
  b.writes.push_back({{region, at, n}, current->thread, b.epoch});
}

void check_atomic(Region* region, const void* p, size_t n, const Where& where) {
  check_bounds(region, p, n, n, "atomic access", where);
  if (!region->writable) fail(where, "atomic access to the input %s", region->name);
  uint8_t* state = region->state.data() + region->offset(p);
  if (!states_are(state, n, kDefined)) {
    fail(where,
         "atomic access to %s at offset %zu, which is not initialised or was written without a fence since",
         region->name, region->offset(p));
  }
}

void publish_global_writes() {
  Block& b = *current->block;
  std::erase_if(b.writes, [&](const Write& w) {
    if (w.thread != current->thread && w.epoch >= b.epoch) return false;
    for (size_t i = 0; i < w.range.bytes; ++i) {
      uint8_t& state = w.range.region->state[w.range.offset + i];
      if (state == kUnpublished && w.range.region->writer[w.range.offset + i] == b.linear) state = kDefined;
    }
    return true;
  });
}

void track_async_proxy() { current->block->tracks_proxy = true; }

void fence_proxy_async() {
  for (const Range& r : current->unfenced) std::memset(r.region->unfenced.data() + r.offset, 0, r.bytes);
  current->unfenced.clear();
}

void check_async_read(Region* region, const void* p, size_t n, const Where& where) {
  check_read(region, p, n, 1, where);
  if (!region->shared) return;
  const size_t at = region->offset(p);
  for (size_t i = 0; i < n; ++i) {
    if (region->unfenced[at + i] != 0) {
      fail(where,
           "the asynchronous proxy reads shared memory at offset %zu, which a store wrote without a "
           "fence.proxy.async since",
           at + i);
    }
  }
}

void mark_in_flight(Region* region, const void* p, size_t n, const Where& where) {
  check_bounds(region, p, n, 1, "asynchronous write", where);
  uint8_t* state = region->state.data() + region->offset(p);
  for (size_t i = 0; i < n; ++i) {
    if (state[i] == kInFlight)
      fail(where, "two asynchronous operations write the same bytes of %s", region->name);
    state[i] = kInFlight;
  }
}

void mark_arrived(Region* region, const void* p, size_t n) {
  std::memset(region->state.data() + region->offset(p), kDefined, n);
}

void write_async(void* to, const void* from, size_t n) { std::memcpy(to, from, n); }

// ---- what a thread knows
// -----------------------------------------------------------------------------------

Dim3 thread_idx() {
  const Dim3 d = config->block;
  const unsigned t = current->thread;
  return {t % d.x, t / d.x % d.y, t / d.x / d.y};
}
Dim3 block_idx() { return current->block->index; }
Dim3 block_dim() { return config->block; }
Dim3 grid_dim() { return config->grid; }
unsigned cluster_rank() { return current->block->rank; }
unsigned cluster_size() { return config->cluster; }
unsigned linear_thread() { return current->thread; }

Pointer<char> dynamic_shared() { return {current->block->shared.base, &current->block->shared}; }

Pointer<char> cluster_shared(Pointer<char> mine, unsigned rank, const Where& where) {
  Cluster& c = *current->block->cluster;
  if (rank >= c.blocks.size()) fail(where, "rank %u in a cluster of %zu blocks", rank, c.blocks.size());
  if (mine.region() != &current->block->shared) fail(where, "not a pointer to this block's shared memory");
  Region& other = c.blocks[rank]->shared;
  if (c.blocks[rank]->alive == 0)
    fail(where, "the block of rank %u has ended: its shared memory is gone", rank);
  return {other.base + mine.region()->offset(mine.raw()), &other};
}

uint32_t random(uint32_t below) { return rng.below(below); }

// ---- waiting
// -----------------------------------------------------------------------------------------------

void yield() {
  current->polling = false;
  to_scheduler();
}

void wait_until(const std::function<bool()>& condition, const char* what, const Where& where) {
  current->waiting_for = what;
  current->where = where;
  // It has got here, which others may wait for: only a second look in vain is one in which nothing has
  // happened.
  for (bool looked = false; !condition(); looked = true) {
    current->polling = looked;
    to_scheduler();
  }
}

void barrier(int id, unsigned count, bool wait, const Where& where) {
  Block& b = *current->block;
  if (id < 0 || id >= kNamedBarriers) fail(where, "barrier %d: there are barriers 0 to 15", id);
  if (count == 0) count = static_cast<unsigned>(b.fibers.size());
  if (id != 0 && count % kWarp != 0) fail(where, "barrier %d of %u threads: not a multiple of 32", id, count);
  if (count > b.fibers.size())
    fail(where, "barrier %d of %u threads in a block of %zu", id, count, b.fibers.size());
  Barrier& barrier = b.barriers[static_cast<size_t>(id)];
  if (barrier.arrived == 0) {
    barrier.count = count;
    barrier.where = where;
  } else if (barrier.count != count) {
    fail(where, "barrier %d of %u threads here, of %u threads at %s:%u", id, count, barrier.count,
         file_name(barrier.where), barrier.where.line());
  }
  if (++barrier.arrived < barrier.count) {
    if (!wait) return;
    barrier.waiting.push_back(current);
    sleep(id == 0 ? "__syncthreads" : "a named barrier", where);
    return;
  }
  barrier.arrived = 0;
  if (count == b.fibers.size()) ++b.epoch;
  for (Fiber* f : barrier.waiting) make_ready(*f);
  barrier.waiting.clear();
}

void cluster_arrive(const Where& where) {
  Cluster& c = *current->block->cluster;
  if (current->cluster_arrivals > c.generation)
    fail(where, "a second arrival at the cluster barrier without a wait");
  current->cluster_arrivals = c.generation + 1;
  unsigned all = 0;
  for (auto& b : c.blocks) all += static_cast<unsigned>(b->fibers.size());
  publish_global_writes();
  if (++c.arrived == all) {
    c.arrived = 0;
    ++c.generation;
    for (auto& b : c.blocks) ++b->epoch;
  }
}

void cluster_wait(const Where& where) {
  Cluster& c = *current->block->cluster;
  if (current->cluster_arrivals == 0) fail(where, "a wait at the cluster barrier without an arrival");
  wait_until([&] { return c.generation >= current->cluster_arrivals; }, "a cluster barrier", where);
}

void warp_collective(uint32_t mask, const char* name, void* argument, Collective op, const Where& where) {
  Warp& w = warp_of(*current);
  const uint32_t bit = lane_bit(*current);
  if ((mask & bit) == 0) fail(where, "%s: this lane is not in the mask 0x%08x that it passed", name, mask);
  Gathering* mine = nullptr;
  for (auto& c : w.gatherings) {
    if (c.arrived == 0 || (c.mask & mask) == 0) continue;
    if (c.mask != mask || std::strcmp(c.name, name) != 0) {
      fail(where, "%s with mask 0x%08x, but lanes of this warp are in %s with mask 0x%08x at %s:%u", name,
           mask, c.name, c.mask, file_name(c.where), c.where.line());
    }
    mine = &c;
  }
  if (mine == nullptr) {
    for (auto& c : w.gatherings) {
      if (c.arrived == 0) mine = &c;
    }
    if (mine == nullptr) mine = &w.gatherings.emplace_back();
    mine->mask = mask;
    mine->name = name;
    mine->where = where;
  }
  mine->arguments[current->thread % kWarp] = argument;
  mine->arrived |= bit;
  if (mine->arrived != mask) return sleep(name, where);
  const std::array<void*, 32> arguments = mine->arguments;
  mine->arrived = 0;
  op(const_cast<void**>(arguments.data()));
  w.ready |= mask;
}

void warpgroup_collective(const char* name, void* argument, Collective op, const Where& where) {
  Warpgroup& g = current->block->warpgroups[current->thread / kWarpgroup];
  const unsigned i = current->thread % kWarpgroup;
  if (g.arrived > 0 && std::strcmp(g.name, name) != 0) {
    fail(where, "%s, but other threads of this warpgroup are in %s", name, g.name);
  }
  g.name = name;
  g.arguments[i] = argument;
  if (++g.arrived < kWarpgroup) return sleep(name, where);
  g.arrived = 0;
  const std::array<void*, kWarpgroup> arguments = g.arguments;
  op(const_cast<void**>(arguments.data()));
  for (unsigned w = 0; w < 4; ++w) current->block->warps[current->thread / kWarpgroup * 4 + w].ready = ~0u;
}

// ---- operations that complete later
// ------------------------------------------------------------------------

PendingPtr start_async(std::function<void()> complete, const Where& where) {
  auto pending = std::make_shared<Pending>(std::move(complete), where);
  if (completion == Completion::eager) {
    pending->finish();
  } else {
    current->block->pending.push_back(pending);
  }
  return pending;
}

void cp_async_add(PendingPtr pending, std::function<void()> arrived) {
  current->groups.back().push_back({std::move(pending), std::move(arrived)});
}

void cp_async_commit() { current->groups.emplace_back(); }

void cp_async_wait(int allowed) {
  auto& groups = current->groups;  // the last one is not committed
  while (static_cast<int>(groups.size()) - 1 > allowed) {
    for (CopyPiece& piece : groups.front()) {
      piece.pending->finish();
      piece.arrived();
    }
    groups.erase(groups.begin());
  }
}

// ---- launching
// ---------------------------------------------------------------------------------------------

void set_seed(uint64_t seed) {
  base_seed = seed;
  launches = 0;
}

void launch(const LaunchConfig& launch_config, const std::function<void()>& thread_body) {
  const std::lock_guard lock(engine_mutex);
  config = &launch_config;
  body = &thread_body;
  launch_seed = base_seed + 0x632be59bd9b4e019ull * ++launches;
  rng.state = launch_seed;
  completion = static_cast<Completion>(rng.below(3));
  by_priority = rng.below(2) == 0;
  failure.clear();

  const int64_t blocks = int64_t{config->grid.x} * config->grid.y * config->grid.z;
  const unsigned cluster = std::max(1u, config->cluster);
  const auto clean_up = [&] {
    for (auto& c : residents) end_cluster(*c, true);
    residents.clear();
    all_warps.clear();
    current = nullptr;
    for (auto& r : registry) {  // the end of a launch publishes everything
      for (auto& s : r->state) {
        if (s == kUnpublished) s = kDefined;
      }
    }
  };
  try {
    if (blocks == 0 || config->grid.x % cluster != 0)
      throw Error("the grid is empty or no multiple of the cluster");
    std::vector<int64_t> order(static_cast<size_t>(blocks / cluster));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    for (size_t i = order.size(); i > 1; --i)
      std::swap(order[i - 1], order[rng.below(static_cast<uint32_t>(i))]);
    const size_t at_once = 1 + rng.below(4);
    size_t next = 0;
    const auto refill = [&] {
      while (residents.size() < at_once && next < order.size()) {
        auto& c = *residents.emplace_back(std::make_unique<Cluster>());
        for (unsigned rank = 0; rank < cluster; ++rank) {
          start_block(*c.blocks.emplace_back(std::make_unique<Block>()),
                      order[next] * static_cast<int64_t>(cluster) + rank, rank, c);
          c.alive += c.blocks.back()->alive;
        }
        ++next;
      }
      return !residents.empty();
    };
    refill();
    run_residents(refill);
    clean_up();
  } catch (const Error& error) {
    const std::string text = std::string("kernel ") + config->kernel + ": " + error.what() + " (seed " +
                             std::to_string(base_seed) + ", launch " + std::to_string(launches) + ")";
    clean_up();
    throw Error(text);
  }
}

}  // namespace simt
