// Host twins of csrc/cuda/ptx_sm90.cuh: what each instruction does, from the PTX ISA, and when its effects
// may be seen. Documented there; here is what they check beyond that:
//   - an mbarrier lives in its own eight bytes, which nothing else may touch; too many arrivals or bytes, use
//     before init, and init that nobody fenced fail;
//   - TMA moves bytes at a random time; who reads, overwrites or leaves them before that fails;
//   - wgmma reads its operands, as the descriptor's bits say, at a random time that each warp of the group
//     has of its own, in order; accumulators are NaNs until a wait that names them; registers of a and
//     accumulators must be named by a fence first and left alone until then;
//   - now and then a thread is held up, so that others get as far ahead as the program lets them.
#pragma once
#include <algorithm>
#include <array>
#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "ptx.h"

namespace lk {

struct TensorMap {
  char* base;
  int64_t rows, cols, row_stride;  // in elements
  int box_rows, box_cols, swizzle_bytes, element_bytes;
};

}  // namespace lk

namespace simt::sm90 {

// ---- what is kept for a block -----------------------------------------------------------------------------

struct Piece {  // of global memory
  Region* region;
  char* at;
  size_t bytes;
};

struct BulkStore {
  std::vector<char> tile;
  PendingPtr read, written;
  std::vector<Piece> pieces;
  Where where;
};
using BulkStorePtr = std::shared_ptr<BulkStore>;

struct BulkGroup {
  std::vector<BulkStorePtr> stores;
  bool known_read = false;
};

struct Thread {
  std::vector<uint64_t*> fresh_barriers;               // initialised, and no fence since
  std::vector<BulkStorePtr> open_stores;               // not committed
  std::deque<BulkGroup> store_groups;                  // oldest first
  std::map<const void*, std::vector<uint32_t>> named;  // by wgmma_fence, with what they held
  std::array<char, 120> waits_for{};
};

struct Accumulators {  // in flight
  int n;
  std::array<float*, kWarpgroup> registers;
  std::vector<float> values;       // [64, n]
  std::array<int, 4> in_flight{};  // each warp's multiplies that it has not waited for
  std::array<bool, 4> handed_back{};
  Where where;  // the last multiply
};

struct Multiply {
  std::shared_ptr<Accumulators> d;
  std::vector<const uint32_t*> a_registers;  // of each thread; none: a is in shared memory
  std::vector<std::array<uint32_t, 4>> a_values;
  uint64_t a, b;  // descriptors
  bool transpose_a, transpose_b, accumulate;
  float (*to_float)(uint16_t);
  Region* shared;
  Where where;
};

struct WarpQueue {
  std::deque<std::shared_ptr<Multiply>> multiplies;  // issued and not waited for
  uint64_t first = 0;                                // the number of the first of them
  size_t computed = 0;                               // how many of them are done
  std::deque<uint64_t> group_ends;  // committed groups: the number behind their last multiply
};

struct Warpgroup {
  std::array<WarpQueue, 4> warps;
  std::vector<std::shared_ptr<Accumulators>> in_flight;
};

struct State : BlockState {
  std::vector<Thread> threads;
  std::vector<Warpgroup> warpgroups;
  std::vector<uint32_t> elected;  // lane of each warp
  std::vector<PendingPtr> loads;  // to this block's shared memory

  void ended() override {
    for (const Thread& t : threads) {
      if (!t.open_stores.empty()) {
        fail(t.open_stores.front()->where, "the block ended without a bulk_commit of this");
      }
      for (const BulkGroup& group : t.store_groups) {
        if (group.known_read || group.stores.empty()) continue;
        fail(group.stores.front()->where, "the block ended without a bulk_wait or bulk_wait_read for this");
      }
    }
    for (const PendingPtr& load : loads) {
      if (!load->done) fail(load->where, "the block ended while this copy to shared memory was in flight");
    }
    for (const Warpgroup& group : warpgroups) {
      for (const WarpQueue& warp : group.warps) {
        if (warp.multiplies.empty()) continue;
        fail(warp.multiplies.front()->where, "the block ended without a wgmma_wait for this");
      }
    }
  }
};

inline Region* own_shared() { return dynamic_shared().region(); }

inline State& state_of(Region* region) {
  if (region->twins == nullptr) {
    auto made = std::make_unique<State>();
    const Dim3 d = block_dim();
    const unsigned threads = d.x * d.y * d.z;
    made->threads.resize(threads);
    made->warpgroups.resize((threads + kWarpgroup - 1) / kWarpgroup);
    for (unsigned w = 0; w < (threads + kWarp - 1) / kWarp; ++w) {
      made->elected.push_back(random(std::min<uint32_t>(kWarp, threads - w * kWarp)));
    }
    region->twins = std::move(made);
  }
  return static_cast<State&>(*region->twins);
}
inline State& state() { return state_of(own_shared()); }

inline Thread& thread_state() { return state().threads[linear_thread()]; }

inline void check_shared(const Region* region, const void* p, size_t align, const char* what,
                         const Where& where) {
  if (region == nullptr || !region->shared) fail(where, "%s: not a pointer to shared memory", what);
  if (region != own_shared()) fail(where, "%s: a pointer to the shared memory of another block", what);
  if (region->offset(p) % align != 0) {
    fail(where, "%s: offset %zu in shared memory is no multiple of %zu", what, region->offset(p), align);
  }
}

// Holds a thread up, once in `times`, where a program has just told others that they may go on, or is about
// to use what it was told: until a random time, like an asynchronous operation, so that in some runs
// everybody else gets as far ahead as the program lets them.
inline void maybe_pause(uint32_t times, const Where& where) {
  if (random(times) != 0) return;
  const auto over = std::make_shared<bool>(false);
  start_async([over] { *over = true; }, where);
  wait_until([over] { return *over; }, "nothing: it is held up", where);
}
inline void maybe_pause_warp(uint32_t times, const Where& where) {
  if (linear_thread() % kWarp == 0) maybe_pause(times, where);
}

// ---- mbarriers --------------------------------------------------------------------------------------------

struct Mbarrier {
  uint64_t pending : 20, count : 20;  // arrivals: still to come in this phase, and of every phase
  int64_t bytes : 21;                 // expected and not there yet; negative: there and not expected yet
  uint64_t parity : 1;                // of this phase
  uint64_t fenced : 1;                // its init may be seen by TMA and other blocks
  uint64_t unnoticed : 1;             // nobody has waited for the phase before this one
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));
constexpr uint32_t kMostArrivals = (1u << 20) - 1;
constexpr int64_t kMostBytes = (1 << 20) - 1;

inline Mbarrier load_mbarrier(const Region* region, const void* p, const char* what, const Where& where) {
  if (region == nullptr || !region->shared || !region->holds(p, sizeof(Mbarrier)) ||
      region->offset(p) % 8 != 0) {
    fail(where, "%s: not eight aligned bytes of shared memory", what);
  }
  for (size_t i = 0; i < sizeof(Mbarrier); ++i) {
    if (region->state[region->offset(p) + i] != kBarrier) {
      fail(where, "%s: there is no initialised mbarrier at offset %zu of shared memory", what,
           region->offset(p));
    }
  }
  Mbarrier barrier;
  std::memcpy(&barrier, p, sizeof barrier);
  return barrier;
}

// Expects `expected` more bytes, counts `arrived` bytes and `arrivals`; ends the phase if that completes it.
inline void update_mbarrier(Region* region, void* p, uint32_t expected, uint32_t arrived, uint32_t arrivals,
                            const char* what, const Where& where) {
  Mbarrier barrier = load_mbarrier(region, p, what, where);
  const size_t at = region->offset(p);
  const int64_t bytes = barrier.bytes + int64_t{expected} - int64_t{arrived};
  if (bytes > kMostBytes || bytes < -kMostBytes) {
    fail(where, "%s: the mbarrier cannot count so many bytes", what);
  }
  barrier.bytes = bytes;
  if (arrivals > barrier.pending) {
    fail(
        where,
        "%s: over-arrival at the mbarrier at offset %zu: all %u arrivals of this phase have come, only bytes "
        "are missing",
        what, at, static_cast<unsigned>(barrier.count));
  }
  barrier.pending -= arrivals;
  if (barrier.pending == 0 && bytes < 0) {
    fail(where, "%s: the mbarrier at offset %zu got %d bytes more than were expected in this phase", what, at,
         static_cast<int>(-bytes));
  }
  if (barrier.pending == 0 && bytes == 0) {
    if (barrier.unnoticed) {
      fail(
          where,
          "%s: the mbarrier at offset %zu completes a second phase before anybody waited for the first: more "
          "arrivals than its count of %u?",
          what, at, static_cast<unsigned>(barrier.count));
    }
    barrier.unnoticed = 1;
    barrier.parity ^= 1;
    barrier.pending = barrier.count;
  }
  std::memcpy(p, &barrier, sizeof barrier);
}

// For TMA and other blocks.
inline void check_fenced(const Region* region, const void* p, const char* what, const Where& where) {
  if (!load_mbarrier(region, p, what, where).fenced) {
    fail(where, "%s: nobody has called fence_mbarrier_init since this mbarrier's init", what);
  }
}

inline void fence_fresh_barriers() {
  Thread& t = thread_state();
  for (uint64_t* p : t.fresh_barriers) {
    Mbarrier barrier;
    std::memcpy(&barrier, p, sizeof barrier);
    barrier.fenced = 1;
    std::memcpy(p, &barrier, sizeof barrier);
  }
  t.fresh_barriers.clear();
}

// ---- copies -----------------------------------------------------------------------------------------------

// Offset in shared memory -> where the swizzle puts it.
inline size_t swizzled(size_t offset, int swizzle_bytes) {
  const size_t rows = swizzle_bytes == 0 ? 0 : static_cast<size_t>(swizzle_bytes) / 16 - 1;
  return offset ^ ((offset >> 7 & rows) << 4);
}

// The part of a tile's row that lies in the matrix: `bytes` at `global`, `skipped` bytes into the row.
struct RowPart {
  char* global;
  size_t skipped, bytes;
};
inline RowPart row_part(const lk::TensorMap& map, int row, int col) {
  if (row < 0 || row >= map.rows) return {nullptr, 0, 0};
  const int64_t from = std::max<int64_t>(col, 0),
                to = std::min<int64_t>(int64_t{col} + map.box_cols, map.cols);
  if (from >= to) return {nullptr, 0, 0};
  const auto size = static_cast<size_t>(map.element_bytes);
  return {map.base + static_cast<size_t>(row * map.row_stride + from) * size,
          static_cast<size_t>(from - col) * size, static_cast<size_t>(to - from) * size};
}

// A copy of `bytes` to [at, at + bytes) of each target's shared memory.
struct Target {
  Region* region;
  char* at;
  void* barrier;
};

inline void check_target(const Target& target, size_t bytes, const char* what, const Where& where) {
  check_fenced(target.region, target.barrier, what, where);
  const size_t at = target.region->offset(target.at);
  for (size_t i = at; i < std::min(at + bytes, target.region->bytes); ++i) {
    if (target.region->state[i] == kBarrier) fail(where, "%s over an mbarrier at offset %zu", what, i);
  }
  mark_in_flight(target.region, target.at, bytes, where);
  const uint8_t* unfenced = target.region->unfenced.data() + at;
  if (std::any_of(unfenced, unfenced + bytes, [](uint8_t u) { return u != 0; })) {
    fail(where, "%s overwrites shared memory that a store wrote without a fence.proxy.async since", what);
  }
}

// `copy` moves the bytes.
inline void start_load(const Target& target, size_t bytes, std::function<void()> copy, const char* what,
                       const Where& where) {
  State& s = state_of(target.region);
  std::erase_if(s.loads, [](const PendingPtr& load) { return load->done; });
  const auto complete = [=] {
    copy();
    mark_arrived(target.region, target.at, bytes);
    update_mbarrier(target.region, target.barrier, 0, static_cast<uint32_t>(bytes), 0, what, where);
  };
  s.loads.push_back(start_async(complete, where));
}

inline size_t tile_bytes(const lk::TensorMap& map) {
  return static_cast<size_t>(map.box_rows) * static_cast<size_t>(map.box_cols * map.element_bytes);
}
inline size_t tile_alignment(const lk::TensorMap& map) {
  return map.swizzle_bytes == 0 ? 128 : static_cast<size_t>(8 * map.swizzle_bytes);
}

inline void tma_load(Pointer<void> to, const lk::TensorMap& tensor_map, Pointer<uint64_t> barrier, int col,
                     int row, uint32_t blocks, const char* what, const Where& where) {
  const lk::TensorMap map = tensor_map;  // the caller's may be gone when the copy completes
  check_shared(to.region(), to.raw(), tile_alignment(map), what, where);
  check_shared(barrier.region(), barrier.raw(), 8, what, where);
  if (blocks == 0 || blocks >> cluster_size() != 0) {
    fail(where, "%s to blocks 0x%x of a cluster of %u", what, blocks, cluster_size());
  }
  std::vector<Target> targets;
  for (unsigned rank = 0; rank < cluster_size(); ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    const auto there = cluster_shared(pointer_cast<char>(to), rank, where);
    const auto barrier_there = cluster_shared(pointer_cast<char>(barrier), rank, where);
    targets.push_back({there.region(), there.raw(), barrier_there.raw()});
    check_target(targets.back(), tile_bytes(map), what, where);
  }
  Region* source = find_region(map.base);
  for (int i = 0; i < map.box_rows; ++i) {
    const RowPart part = row_part(map, row + i, col);
    if (part.bytes > 0) check_read(source, part.global, part.bytes, 1, where);
  }
  for (const Target& target : targets) {
    const auto copy = [=] {
      const auto row_bytes = static_cast<size_t>(map.box_cols * map.element_bytes);
      std::vector<char> line(row_bytes);
      for (int i = 0; i < map.box_rows; ++i) {
        std::fill(line.begin(), line.end(), char{0});
        const RowPart part = row_part(map, row + i, col);
        if (part.bytes > 0) std::memcpy(line.data() + part.skipped, part.global, part.bytes);
        const size_t start = target.region->offset(target.at) + static_cast<size_t>(i) * row_bytes;
        for (size_t chunk = 0; chunk < row_bytes; chunk += 16) {
          std::memcpy(target.region->base + swizzled(start + chunk, map.swizzle_bytes), line.data() + chunk,
                      16);
        }
      }
    };
    start_load(target, tile_bytes(map), copy, what, where);
  }
  maybe_pause(4, where);
}

inline void bulk_load(Pointer<void> to, Pointer<const void> from, uint32_t bytes, Pointer<uint64_t> barrier,
                      const Where& where) {
  constexpr const char* kWhat = "bulk_load";
  check_shared(to.region(), to.raw(), 16, kWhat, where);
  check_shared(barrier.region(), barrier.raw(), 8, kWhat, where);
  if (bytes == 0 || bytes % 16 != 0) fail(where, "bulk_load of %u bytes: not a multiple of 16", bytes);
  check_read(from.region(), from.raw(), bytes, 16, where);
  if (from.region()->shared) fail(where, "bulk_load from shared memory");
  const Target target{to.region(), static_cast<char*>(to.raw()), barrier.raw()};
  check_target(target, bytes, kWhat, where);
  const void* source = from.raw();
  start_load(target, bytes, [=] { std::memcpy(target.at, source, bytes); }, kWhat, where);
  maybe_pause(4, where);
}

// Reading the tile and writing it are two operations: bulk_wait_read waits for the first alone.
inline void tma_store(const lk::TensorMap& tensor_map, Pointer<const void> from, int col, int row,
                      const Where& where) {
  const lk::TensorMap map = tensor_map;
  Region* shared = from.region();
  check_shared(shared, from.raw(), tile_alignment(map), "tma_store_2d", where);
  check_async_read(shared, from.raw(), tile_bytes(map), where);
  auto store = std::make_shared<BulkStore>();
  store->where = where;
  Region* target = find_region(map.base);
  for (int i = 0; i < map.box_rows; ++i) {
    const RowPart part = row_part(map, row + i, col);
    if (part.bytes == 0) continue;
    check_write(target, part.global, part.bytes, 1, where);
    mark_in_flight(target, part.global, part.bytes, where);
    store->pieces.push_back({target, part.global, part.bytes});
  }
  const size_t start = shared->offset(from.raw());
  const auto read = [=, raw = store.get()] {
    check_async_read(shared, shared->base + start, tile_bytes(map), where);
    raw->tile.resize(tile_bytes(map));
    for (size_t offset = 0; offset < tile_bytes(map); offset += 16) {
      std::memcpy(raw->tile.data() + offset, shared->base + swizzled(start + offset, map.swizzle_bytes), 16);
    }
  };
  const auto write = [=, raw = store.get()] {
    raw->read->finish();
    const auto row_bytes = static_cast<size_t>(map.box_cols * map.element_bytes);
    for (int i = 0; i < map.box_rows; ++i) {
      const RowPart part = row_part(map, row + i, col);
      if (part.bytes == 0) continue;
      std::memcpy(part.global, raw->tile.data() + static_cast<size_t>(i) * row_bytes + part.skipped,
                  part.bytes);
      // Other blocks may not read it before the thread that stored it has waited and published it.
      std::memset(target->state.data() + target->offset(part.global), kUnpublished, part.bytes);
    }
    raw->tile = {};
  };
  store->read = start_async(read, where);
  store->written = start_async(write, where);
  thread_state().open_stores.push_back(std::move(store));
}

inline void bulk_wait(size_t allowed, bool only_read) {
  Thread& t = thread_state();
  for (size_t i = 0; i + allowed < t.store_groups.size(); ++i) {
    BulkGroup& group = t.store_groups[i];
    for (const BulkStorePtr& store : group.stores) {
      store->read->finish();
      if (only_read) continue;
      store->written->finish();
      for (const Piece& piece : store->pieces) {
        // Now this thread's own write, which its next fence publishes.
        const uint8_t* s = piece.region->state.data() + piece.region->offset(piece.at);
        if (std::all_of(s, s + piece.bytes, [](uint8_t b) { return b == kUnpublished; })) {
          check_write(piece.region, piece.at, piece.bytes, 1, store->where);
        }
      }
    }
    group.known_read = true;
  }
  if (only_read) return;
  while (t.store_groups.size() > allowed) t.store_groups.pop_front();
}

// ---- wgmma ------------------------------------------------------------------------------------------------

// Where hardware puts dynamic shared memory; a descriptor of zeros then points outside it.
constexpr uint32_t kSharedStart = 1024;

constexpr uint32_t kInFlightBits = 0x7fc0f119u;  // a NaN that nothing else computes

// An operand tile through its descriptor.
class Operand {
 public:
  Operand(uint64_t descriptor, bool transposed, const Multiply& multiply)
      : start_(field(descriptor)),
        leading_(field(descriptor >> 16)),
        stride_(field(descriptor >> 32)),
        transposed_(transposed),
        multiply_(multiply) {
    constexpr int kSwizzle[4] = {0, 128, 64, 32};
    swizzle_ = kSwizzle[descriptor >> 62];
    constexpr uint64_t kUsed = 0x3fff | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62;
    if ((descriptor & ~kUsed) != 0) {
      fail(multiply.where, "descriptor 0x%016llx: base offset and unused bits must be zero here",
           static_cast<unsigned long long>(descriptor));
    }
    if (swizzle_ != 0 && start_ % static_cast<size_t>(8 * swizzle_) >= static_cast<size_t>(swizzle_)) {
      fail(multiply.where,
           "descriptor: a tile of %d-byte swizzle starts at address 0x%zx, not in the first of eight "
           "rows",
           swizzle_, start_);
    }
  }

  // Sixteen bytes: K-major: row `mn`, k from `k`; MN-major: rows from `mn`, column `k`.
  std::array<uint16_t, 8> chunk(size_t mn, size_t k) const {
    const size_t width = swizzle_ == 0 ? 16 : static_cast<size_t>(swizzle_), across = width / 16;
    size_t offset;
    if (transposed_) {
      const size_t i = mn / 8;
      const size_t along_m = swizzle_ == 0 ? i * stride_ : i % across * 16 + i / across * leading_;
      offset = along_m + k % 8 * width + k / 8 * (swizzle_ == 0 ? leading_ : stride_);
    } else {
      offset = mn % 8 * width + mn / 8 * stride_ + k / 8 * (swizzle_ == 0 ? leading_ : 16);
    }
    const size_t address = swizzled(start_ + offset, swizzle_);
    const char* p =
        multiply_.shared->base + (static_cast<std::ptrdiff_t>(address) - std::ptrdiff_t{kSharedStart});
    check_async_read(multiply_.shared, p, 16, multiply_.where);
    std::array<uint16_t, 8> elements;
    std::memcpy(elements.data(), p, sizeof elements);
    return elements;
  }

  // Elements [mn, mn + count) x [0, 16) to out[k * count + mn], as floats.
  void load(size_t mn, size_t count, float* out) const {
    for (size_t i = 0; i < count; i += transposed_ ? 8 : 1) {
      for (size_t k = 0; k < 16; k += transposed_ ? 1 : 8) {
        const auto elements = chunk(mn + i, k);
        for (size_t e = 0; e < 8; ++e) {
          out[transposed_ ? k * count + i + e : (k + e) * count + i] = multiply_.to_float(elements[e]);
        }
      }
    }
  }

 private:
  static size_t field(uint64_t bits) { return static_cast<size_t>(bits & 0x3fff) << 4; }
  size_t start_, leading_, stride_;
  int swizzle_;
  bool transposed_;
  const Multiply& multiply_;
};

// One warp's sixteen rows of d.
inline void multiply_rows(const Multiply& m, size_t warp) {
  constexpr size_t kK = 16, kRows = 16, kMostColumns = 256, kVector = 8;
  using Vector = float __attribute__((vector_size(kVector * sizeof(float))));
  alignas(32) float a[kK * kRows], b[kK * kMostColumns];
  const auto n = static_cast<size_t>(m.d->n);
  Operand(m.b, m.transpose_b, m).load(0, n, b);
  if (m.a_registers.empty()) {
    Operand(m.a, m.transpose_a, m).load(kRows * warp, kRows, a);
  } else {
    for (size_t lane = 0; lane < kWarp; ++lane) {
      const auto& values = m.a_values[warp * kWarp + lane];
      for (size_t i = 0; i < 4; ++i) {
        const size_t row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
        a[k * kRows + row] = m.to_float(static_cast<uint16_t>(values[i]));
        a[(k + 1) * kRows + row] = m.to_float(static_cast<uint16_t>(values[i] >> 16));
      }
    }
  }
  for (size_t row = 0; row < kRows; ++row) {
    float* sums = m.d->values.data() + (kRows * warp + row) * n;
    for (size_t column = 0; column < n; column += kVector) {
      Vector sum{};
      if (m.accumulate) std::memcpy(&sum, sums + column, sizeof sum);
      for (size_t k = 0; k < kK; ++k) {
        Vector line;
        std::memcpy(&line, b + k * n + column, sizeof line);
        sum += a[k * kRows + row] * line;
      }
      std::memcpy(sums + column, &sum, sizeof sum);
    }
  }
}

inline void compute_through(WarpQueue& queue, size_t warp, uint64_t number) {
  while (queue.first + queue.computed <= number) {
    const auto multiply = queue.multiplies[queue.computed++];
    multiply_rows(*multiply, warp);
  }
}

// Register i of lane l of a warp -> its place in [16, n].
inline size_t accumulator_place(size_t lane, size_t i, size_t n) {
  return (lane / 4 + i / 2 % 2 * 8) * n + i / 4 * 8 + lane % 4 * 2 + i % 2;
}

struct Issue {
  float* d;
  const uint32_t* a_registers;
  uint64_t a, b;
  int n;
  bool transpose_a, transpose_b, accumulate;
  float (*to_float)(uint16_t);
  Thread* thread;
  Warpgroup* group;
  Where where;
};

inline bool named_and_unchanged(const Thread& thread, const void* registers, size_t bytes) {
  const auto found = thread.named.find(registers);
  return found != thread.named.end() && found->second.size() * sizeof(uint32_t) == bytes &&
         std::memcmp(found->second.data(), registers, bytes) == 0;
}

// Accumulators that come into flight: their values are taken and NaNs left in their place.
inline std::shared_ptr<Accumulators> take_accumulators(void** threads, const Issue& first) {
  auto taken = std::make_shared<Accumulators>();
  taken->n = first.n;
  const size_t n = static_cast<size_t>(first.n), count = n / 2;
  taken->values.assign(64 * n, 0.0f);
  for (size_t t = 0; t < kWarpgroup; ++t) {
    auto& mine = *static_cast<Issue*>(threads[t]);
    taken->registers[t] = mine.d;
    const bool named = mine.thread->named.contains(mine.d);
    if (!named || (mine.accumulate && !named_and_unchanged(*mine.thread, mine.d, count * sizeof(float)))) {
      fail(mine.where,
           "wgmma without a wgmma_fence that names its accumulators since they were last touched (thread "
           "%zu of the warpgroup)",
           t);
    }
    mine.thread->named.erase(mine.d);
    for (size_t i = 0; i < count; ++i) {
      taken->values[t / kWarp * 16 * n + accumulator_place(t % kWarp, i, n)] = mine.d[i];
      mine.d[i] = std::bit_cast<float>(kInFlightBits);
    }
  }
  for (const auto& other : first.group->in_flight) {
    const float* begin = other->registers[0];
    if (first.d < begin + other->n / 2 && begin < first.d + count) {
      fail(first.where, "wgmma on accumulators that overlap others in flight");
    }
  }
  return taken;
}

inline void issue_multiply(void** threads) {
  const Issue& first = *static_cast<Issue*>(threads[0]);
  Warpgroup& group = *first.group;
  auto multiply = std::make_shared<Multiply>();
  for (const auto& d : group.in_flight) {
    if (d->registers[0] == first.d) multiply->d = d;
  }
  for (size_t t = 0; t < kWarpgroup; ++t) {
    const Issue& mine = *static_cast<Issue*>(threads[t]);
    if (mine.n != first.n || mine.a != first.a || mine.b != first.b || mine.accumulate != first.accumulate) {
      fail(mine.where, "wgmma whose shape, descriptors or `accumulate` differ between threads 0 and %zu", t);
    }
    if (multiply->d != nullptr && (multiply->d->n != mine.n || multiply->d->registers[t] != mine.d)) {
      fail(mine.where, "wgmma of another shape on accumulators in flight");
    }
    if (mine.a_registers != nullptr) {
      if (!named_and_unchanged(*mine.thread, mine.a_registers, sizeof(uint32_t[4]))) {
        fail(mine.where,
             "wgmma without a wgmma_fence that names a's registers since they were last written (thread "
             "%zu of the warpgroup)",
             t);
      }
      multiply->a_registers.push_back(mine.a_registers);
      auto& values = multiply->a_values.emplace_back();
      std::copy_n(mine.a_registers, 4, values.begin());
    }
  }
  if (multiply->d == nullptr) {
    multiply->d = take_accumulators(threads, first);
    group.in_flight.push_back(multiply->d);
  }
  for (const bool back : multiply->d->handed_back) {
    if (back) fail(first.where, "only some warps named these accumulators in their wgmma_wait");
  }
  multiply->a = first.a;
  multiply->b = first.b;
  multiply->transpose_a = first.transpose_a;
  multiply->transpose_b = first.transpose_b;
  multiply->accumulate = first.accumulate;
  multiply->to_float = first.to_float;
  multiply->shared = own_shared();
  multiply->where = multiply->d->where = first.where;
  for (size_t warp = 0; warp < 4; ++warp) {
    WarpQueue& queue = group.warps[warp];
    const uint64_t number = queue.first + queue.multiplies.size();
    queue.multiplies.push_back(multiply);
    ++multiply->d->in_flight[warp];
    start_async([&queue, warp, number] { compute_through(queue, warp, number); }, first.where);
  }
}

inline Warpgroup& warpgroup_state() { return state().warpgroups[linear_thread() / kWarpgroup]; }
inline size_t warp_in_group() { return linear_thread() % kWarpgroup / kWarp; }

struct Wait {
  std::vector<const float*> named;
  size_t allowed;
};

inline void hand_back(Accumulators& d, size_t warp, void** lanes) {
  if (d.in_flight[warp] > 0) {
    fail(d.where,
         "a wgmma_wait names the accumulators of this wgmma, which it leaves in flight: not committed, or "
         "one of those allowed");
  }
  const size_t n = static_cast<size_t>(d.n);
  for (size_t lane = 0; lane < kWarp; ++lane) {
    const size_t t = warp * kWarp + lane;
    const auto& mine = *static_cast<Wait*>(lanes[lane]);
    if (std::find(mine.named.begin(), mine.named.end(), d.registers[t]) == mine.named.end()) {
      fail(d.where, "a wgmma_wait names the accumulators of this wgmma in lane 0 and not in lane %zu", lane);
    }
    for (size_t i = 0; i < n / 2; ++i) {
      if (std::bit_cast<uint32_t>(d.registers[t][i]) != kInFlightBits) {
        fail(d.where, "accumulator %zu of lane %zu was written while this wgmma worked on it", i, lane);
      }
      d.registers[t][i] = d.values[warp * 16 * n + accumulator_place(lane, i, n)];
    }
    state().threads[linear_thread() / kWarpgroup * kWarpgroup + t].named.erase(d.registers[t]);
  }
  d.handed_back[warp] = true;
}

inline void wait_for_multiplies(void** lanes) {
  const Wait& first = *static_cast<Wait*>(lanes[0]);
  Warpgroup& group = warpgroup_state();
  const size_t warp = warp_in_group();
  WarpQueue& queue = group.warps[warp];
  uint64_t end = queue.first;
  while (queue.group_ends.size() > first.allowed) {
    end = queue.group_ends.front();
    queue.group_ends.pop_front();
  }
  if (end > queue.first) compute_through(queue, warp, end - 1);
  for (; queue.first < end; ++queue.first, --queue.computed, queue.multiplies.pop_front()) {
    const Multiply& m = *queue.multiplies.front();
    --m.d->in_flight[warp];
    for (size_t t = warp * kWarp; t < (warp + 1) * kWarp && !m.a_registers.empty(); ++t) {
      if (std::memcmp(m.a_registers[t], m.a_values[t].data(), sizeof m.a_values[t]) != 0) {
        fail(m.where, "a's registers of this wgmma were changed before the wgmma_wait for it (lane %zu)",
             t % kWarp);
      }
    }
  }
  for (const auto& d : group.in_flight) {
    if (d->handed_back[warp]) continue;
    for (const float* named : first.named) {
      if (named == d->registers[warp * kWarp]) hand_back(*d, warp, lanes);
    }
  }
  std::erase_if(group.in_flight, [](const auto& d) {
    return std::all_of(d->handed_back.begin(), d->handed_back.end(), [](bool back) { return back; });
  });
}

template <class T, int kCount>
void name_registers(T (&registers)[kCount]) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  std::vector<uint32_t> bits(kCount);
  std::memcpy(bits.data(), registers, sizeof registers);
  thread_state().named[registers] = std::move(bits);
}

inline void issue(const char* name, Issue mine) {
  mine.thread = &thread_state();
  mine.group = &warpgroup_state();
  warpgroup_collective(name, &mine, issue_multiply, mine.where);
}

// ---- reductions -------------------------------------------------------------------------------------------

// fp32 sums in global memory lose subnormal inputs and results.
inline float add_flushed(float x, float y) {
  const auto flush = [](float v) { return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.0f, v) : v; };
  return flush(flush(x) + flush(y));
}

template <class Add>
void reduce(Pointer<uint32_t> p, std::initializer_list<uint32_t> values, Add add, const Where& where) {
  check_atomic(p.region(), p.raw(), values.size() * sizeof(uint32_t), where);
  uint32_t* at = p.raw();
  for (const uint32_t value : values) {
    *at = add(*at, value);
    ++at;
  }
}

}  // namespace simt::sm90

namespace lk::ptx {

namespace sm90 = simt::sm90;

// ---- barriers in shared memory ----------------------------------------------------------------------------

inline uint32_t shared_address(Shared<const void> p, Where where = Where::current()) {
  sm90::check_shared(p.region(), p.raw(), 1, "shared_address", where);
  return sm90::kSharedStart + static_cast<uint32_t>(p.region()->offset(p.raw()));
}

inline void mbarrier_init(Shared<uint64_t> barrier, uint32_t count, Where where = Where::current()) {
  simt::track_async_proxy();
  sm90::check_shared(barrier.region(), barrier.raw(), 8, "mbarrier_init", where);
  if (count == 0 || count > sm90::kMostArrivals) simt::fail(where, "mbarrier_init with a count of %u", count);
  simt::Region* region = barrier.region();
  simt::check_write(region, barrier.raw(), sizeof(uint64_t), 8, where);
  sm90::Mbarrier made{};
  made.pending = made.count = count;
  std::memcpy(barrier.raw(), &made, sizeof made);
  std::fill_n(region->state.begin() + static_cast<std::ptrdiff_t>(region->offset(barrier.raw())), sizeof made,
              uint8_t{simt::kBarrier});
  sm90::thread_state().fresh_barriers.push_back(barrier.raw());
}
inline void fence_mbarrier_init() { sm90::fence_fresh_barriers(); }

inline void mbarrier_arrive(Shared<uint64_t> barrier, Where where = Where::current()) {
  sm90::check_shared(barrier.region(), barrier.raw(), 8, "mbarrier_arrive", where);
  sm90::update_mbarrier(barrier.region(), barrier.raw(), 0, 0, 1, "mbarrier_arrive", where);
  sm90::maybe_pause(4, where);
}
inline void mbarrier_arrive_expect_tx(Shared<uint64_t> barrier, uint32_t bytes,
                                      Where where = Where::current()) {
  sm90::check_shared(barrier.region(), barrier.raw(), 8, "mbarrier_arrive_expect_tx", where);
  sm90::update_mbarrier(barrier.region(), barrier.raw(), bytes, 0, 1, "mbarrier_arrive_expect_tx", where);
  sm90::maybe_pause(4, where);
}
inline void mbarrier_arrive_remote(Shared<uint64_t> barrier, uint32_t rank, Where where = Where::current()) {
  constexpr const char* kWhat = "mbarrier_arrive_remote";
  sm90::check_shared(barrier.region(), barrier.raw(), 8, kWhat, where);
  const auto there = simt::cluster_shared(cast<char>(barrier), rank, where);
  sm90::check_fenced(there.region(), there.raw(), kWhat, where);
  sm90::update_mbarrier(there.region(), there.raw(), 0, 0, 1, kWhat, where);
  sm90::maybe_pause(4, where);
}

inline void mbarrier_wait(Shared<uint64_t> barrier, uint32_t parity, Where where = Where::current()) {
  simt::Region* region = barrier.region();
  sm90::check_shared(region, barrier.raw(), 8, "mbarrier_wait", where);
  if (parity > 1) simt::fail(where, "mbarrier_wait for parity %u", parity);
  auto& text = sm90::thread_state().waits_for;
  unsigned polls = 0;
  const auto complete = [&] {
    const auto now = sm90::load_mbarrier(region, barrier.raw(), "mbarrier_wait", where);
    if (now.parity != parity) return true;
    if (polls++ % 32 == 0) {  // as recent as a message needs it
      std::snprintf(text.data(), text.size(),
                    "parity %u of the mbarrier at offset %zu (%u of %u arrivals, %d bytes "
                    "to come)",
                    parity, region->offset(barrier.raw()), static_cast<unsigned>(now.pending),
                    static_cast<unsigned>(now.count), static_cast<int>(now.bytes));
    }
    return false;
  };
  simt::wait_until(complete, text.data(), where);
  auto now = sm90::load_mbarrier(region, barrier.raw(), "mbarrier_wait", where);
  now.unnoticed = 0;
  std::memcpy(barrier.raw(), &now, sizeof now);
  sm90::maybe_pause_warp(8, where);
}
inline void mbarrier_wait_cluster(Shared<uint64_t> barrier, uint32_t parity, Where where = Where::current()) {
  mbarrier_wait(barrier, parity, where);
}

// ---- the asynchronous proxy -------------------------------------------------------------------------------

inline void fence_proxy_async() {
  simt::fence_proxy_async();
  sm90::fence_fresh_barriers();
}
inline void fence_proxy_async_global() {}

inline uint64_t evict_last_policy() { return 2; }

namespace detail {
inline void check_policy(uint64_t policy, Where where) {
  if (policy != evict_first_policy() && policy != evict_last_policy()) {
    simt::fail(where, "not a policy of evict_first_policy() or evict_last_policy()");
  }
}
}  // namespace detail

inline void prefetch_tensor_map(const TensorMap*) {}

inline void tma_load_2d(Shared<void> to, const TensorMap* map, Shared<uint64_t> barrier, int col, int row,
                        Where where = Where::current()) {
  sm90::tma_load(to, *map, barrier, col, row, 1u << simt::cluster_rank(), "tma_load_2d", where);
}
inline void tma_load_2d_hint(Shared<void> to, const TensorMap* map, Shared<uint64_t> barrier, int col,
                             int row, uint64_t policy, Where where = Where::current()) {
  detail::check_policy(policy, where);
  sm90::tma_load(to, *map, barrier, col, row, 1u << simt::cluster_rank(), "tma_load_2d_hint", where);
}
inline void tma_load_2d_multicast(Shared<void> to, const TensorMap* map, Shared<uint64_t> barrier, int col,
                                  int row, uint16_t blocks, Where where = Where::current()) {
  sm90::tma_load(to, *map, barrier, col, row, blocks, "tma_load_2d_multicast", where);
}
inline void tma_store_2d(const TensorMap* map, Shared<const void> from, int col, int row,
                         Where where = Where::current()) {
  sm90::tma_store(*map, from, col, row, where);
}
inline void bulk_commit() {
  auto& thread = sm90::thread_state();
  thread.store_groups.push_back({std::move(thread.open_stores)});
  thread.open_stores.clear();
}
template <int kAllowed>
void bulk_wait() {
  sm90::bulk_wait(kAllowed, false);
}
template <int kAllowed>
void bulk_wait_read() {
  sm90::bulk_wait(kAllowed, true);
}
inline void bulk_load(Shared<void> to, Global<const void> from, uint32_t bytes, Shared<uint64_t> barrier,
                      Where where = Where::current()) {
  sm90::bulk_load(to, from, bytes, barrier, where);
}
inline void bulk_load_hint(Shared<void> to, Global<const void> from, uint32_t bytes, Shared<uint64_t> barrier,
                           uint64_t policy, Where where = Where::current()) {
  detail::check_policy(policy, where);
  sm90::bulk_load(to, from, bytes, barrier, where);
}

// ---- matrices ---------------------------------------------------------------------------------------------

namespace detail {

struct MatrixStore {
  const uint32_t* in;
  std::array<uint16_t, 8> row;  // of matrix lane / 8
};

template <bool kTranspose>
void exchange_rows(void** lanes) {
  for (int m = 0; m < 4; ++m) {
    for (int l = 0; l < 32; ++l) {
      const uint32_t bits = static_cast<MatrixStore*>(lanes[l])->in[m];
      for (int half = 0; half < 2; ++half) {
        const int i = l / 4, j = 2 * (l % 4) + half, row = kTranspose ? j : i, column = kTranspose ? i : j;
        static_cast<MatrixStore*>(lanes[8 * m + row])->row[static_cast<size_t>(column)] =
            static_cast<uint16_t>(bits >> (16 * half));
      }
    }
  }
}

// Each lane writes its own row, so that it is its own store for fences.
inline void store_matrices(Shared<void> row, const uint32_t* r, const char* name, simt::Collective exchange,
                           Where where) {
  MatrixStore mine{r, {}};
  simt::warp_collective(kAllLanes, name, &mine, exchange, where);
  sm90::check_shared(row.region(), row.raw(), 16, name, where);
  simt::check_write(row.region(), row.raw(), sizeof mine.row, 16, where);
  std::memcpy(row.raw(), mine.row.data(), sizeof mine.row);
}

}  // namespace detail

inline void stmatrix_x4(Shared<void> row, const uint32_t (&r)[4], Where where = Where::current()) {
  detail::store_matrices(row, r, "stmatrix.x4", detail::exchange_rows<false>, where);
}
inline void stmatrix_x4_trans(Shared<void> row, const uint32_t (&r)[4], Where where = Where::current()) {
  detail::store_matrices(row, r, "stmatrix.x4.trans", detail::exchange_rows<true>, where);
}

// ---- warpgroup matrix multiply ----------------------------------------------------------------------------

namespace detail {

template <int N>
void multiply(const char* name, float (&d)[N / 2], const uint32_t* a_registers, uint64_t a, uint64_t b,
              bool transpose_a, bool transpose_b, bool accumulate, float (*to_float)(uint16_t), Where where) {
  static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 128 || N == 256);
  sm90::issue(name, {d, a_registers, a, b, N, transpose_a, transpose_b, accumulate, to_float, nullptr,
                     nullptr, where});
}

}  // namespace detail

template <class... T, int... kCounts>
void wgmma_fence(T (&... registers)[kCounts]) {
  (sm90::name_registers(registers), ...);
  simt::warp_collective(detail::kAllLanes, "wgmma_fence", nullptr, [](void**) {}, Where::current());
}
inline void wgmma_commit(Where where = Where::current()) {
  const auto close = [](void**) {
    auto& queue = sm90::warpgroup_state().warps[sm90::warp_in_group()];
    queue.group_ends.push_back(queue.first + queue.multiplies.size());
  };
  simt::warp_collective(detail::kAllLanes, "wgmma_commit", nullptr, close, where);
}
template <int kAllowed, int... kCounts>
void wgmma_wait(float (&... d)[kCounts]) {
  sm90::maybe_pause_warp(4, Where::current());
  sm90::Wait wait{{d...}, kAllowed};
  simt::warp_collective(detail::kAllLanes, "wgmma_wait", &wait, sm90::wait_for_multiplies, Where::current());
}

template <int N, bool kTransposeA = false, bool kTransposeB = false>
void wgmma_ss_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate,
                   Where where = Where::current()) {
  detail::multiply<N>("wgmma_ss_bf16", d, nullptr, a, b, kTransposeA, kTransposeB, accumulate, from_bf16,
                      where);
}
template <int N, bool kTransposeA = false, bool kTransposeB = false>
void wgmma_ss_f16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate,
                  Where where = Where::current()) {
  detail::multiply<N>("wgmma_ss_f16", d, nullptr, a, b, kTransposeA, kTransposeB, accumulate, from_f16,
                      where);
}
template <int N, bool kTransposeB = false>
void wgmma_rs_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                   Where where = Where::current()) {
  detail::multiply<N>("wgmma_rs_bf16", d, a, 0, b, false, kTransposeB, accumulate, from_bf16, where);
}
template <int N, bool kTransposeB = false>
void wgmma_rs_f16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                  Where where = Where::current()) {
  detail::multiply<N>("wgmma_rs_f16", d, a, 0, b, false, kTransposeB, accumulate, from_f16, where);
}

// ---- warps and registers ----------------------------------------------------------------------------------

// Which lane is drawn from the seed: code must not count on lane 0.
inline bool elect_sync(Where where = Where::current()) {
  simt::warp_collective(detail::kAllLanes, "elect_sync", nullptr, [](void**) {}, where);
  return simt::linear_thread() % 32 == sm90::state().elected[simt::linear_thread() / 32];
}

template <int kCount>
void set_max_registers_up(Where where = Where::current()) {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  simt::warpgroup_collective("set_max_registers_up", nullptr, [](void**) {}, where);
}
template <int kCount>
void set_max_registers_down(Where where = Where::current()) {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  simt::warpgroup_collective("set_max_registers_down", nullptr, [](void**) {}, where);
}

// ---- clusters ---------------------------------------------------------------------------------------------

inline uint32_t cluster_rank() { return simt::cluster_rank(); }
inline uint32_t cluster_size() { return simt::cluster_size(); }
inline void cluster_arrive(Where where = Where::current()) { simt::cluster_arrive(where); }
inline void cluster_wait(Where where = Where::current()) { simt::cluster_wait(where); }
template <class T>
Shared<T> map_shared_rank(Shared<T> p, uint32_t rank, Where where = Where::current()) {
  return cast<T>(simt::cluster_shared(cast<char>(p), rank, where));
}

// ---- kernels after kernels --------------------------------------------------------------------------------

// Here a launch begins when the one before it has ended.
inline void grid_dependency_wait() {}
inline void grid_launch_dependents() {}

// ---- reductions to global memory --------------------------------------------------------------------------

namespace detail {

inline uint32_t add_f32(uint32_t x, uint32_t y) {
  return std::bit_cast<uint32_t>(sm90::add_flushed(std::bit_cast<float>(x), std::bit_cast<float>(y)));
}
// A sum of two 16-bit floats rounded to fp32 first is rounded the same: fp32 has twice their bits and two
// more.
template <float (*kFloat)(uint16_t), uint32_t (*kRound)(float, float)>
uint32_t add_pair(uint32_t x, uint32_t y) {
  const auto sum = [&](int shift) {
    return kFloat(static_cast<uint16_t>(x >> shift)) + kFloat(static_cast<uint16_t>(y >> shift));
  };
  return kRound(sum(0), sum(16));
}

}  // namespace detail

inline void red_add_f32(Global<float> p, float2 v, Where where = Where::current()) {
  sm90::reduce(cast<uint32_t>(p), {__float_as_uint(v.x), __float_as_uint(v.y)}, detail::add_f32, where);
}
inline void red_add_f32(Global<float> p, float4 v, Where where = Where::current()) {
  sm90::reduce(cast<uint32_t>(p),
               {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)},
               detail::add_f32, where);
}
inline void red_add_bf16x2(Global<uint32_t> p, uint32_t v, Where where = Where::current()) {
  sm90::reduce(p, {v}, detail::add_pair<from_bf16, cvt_rn_bf16x2>, where);
}
inline void red_add_bf16x2(Global<uint32_t> p, uint4 v, Where where = Where::current()) {
  sm90::reduce(p, {v.x, v.y, v.z, v.w}, detail::add_pair<from_bf16, cvt_rn_bf16x2>, where);
}
inline void red_add_f16x2(Global<uint32_t> p, uint32_t v, Where where = Where::current()) {
  sm90::reduce(p, {v}, detail::add_pair<from_f16, cvt_rn_f16x2>, where);
}
inline void red_add_f16x2(Global<uint32_t> p, uint4 v, Where where = Where::current()) {
  sm90::reduce(p, {v.x, v.y, v.z, v.w}, detail::add_pair<from_f16, cvt_rn_f16x2>, where);
}

}  // namespace lk::ptx
