// The execution model of CUDA on one host thread: a fiber for every CUDA thread, blocks, clusters, barriers,
// warp collectives, operations that complete later. See README.md for what it models and what it cannot see.
#pragma once
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

#include "memory.h"

namespace simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct LaunchConfig {
  const char* kernel;
  Dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks of a cluster, along x
};

// A kernel that was stopped: the kernel's name, block, thread, line, reason, and the seed that replays it.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs `body` as every thread of the grid. Throws Error.
void launch(const LaunchConfig& config, const std::function<void()>& body);

// The seed of the next launches: order of threads and blocks, and when asynchronous operations complete.
// Every launch derives its own from it and the number of launches since.
void set_seed(uint64_t seed);

// ---- memory that kernels may touch
// -------------------------------------------------------------------------

// Registers [p, p + bytes) for launches until clear_memory. An input is readable; an output or workspace
// starts poisoned (bytes 0xff, which is a NaN in every float type, and undefined) unless `keep` says that it
// holds data.
enum class Use { input, output, inout };
void add_memory(const char* name, void* p, size_t bytes, Use use);
// Fails where an output has bytes that no kernel wrote.
void check_outputs_written();
void clear_memory();

// ---- what a thread knows
// -----------------------------------------------------------------------------------

Dim3 thread_idx();
Dim3 block_idx();
Dim3 block_dim();
Dim3 grid_dim();
unsigned cluster_rank();
unsigned cluster_size();
unsigned linear_thread();  // within its block
Pointer<char> dynamic_shared();
Pointer<char> cluster_shared(Pointer<char> mine, unsigned rank, const Where& where);

uint32_t random(uint32_t below);  // of the launch's seed

// ---- waiting
// -----------------------------------------------------------------------------------------------

// Gives way to other threads while condition() is false; `what` is for the message of a deadlock. The
// condition may only become true by what other threads or asynchronous operations do.
void wait_until(const std::function<bool()>& condition, const char* what, const Where& where);
void yield();  // lets others run, and asynchronous operations complete

// A barrier of `count` threads of the block, of the same kind at the same time: __syncthreads is number 0.
void barrier(int id, unsigned count, bool wait, const Where& where);
void cluster_arrive(const Where& where);
void cluster_wait(const Where& where);

// Collective of the lanes of `mask` (of this warp), or of the four warps of a warpgroup: every thread brings
// `argument`; the last one runs op(arguments by lane) once for all. `name` must agree between them.
constexpr int kWarp = 32, kWarpgroup = 128;
using Collective = void (*)(void** arguments);
void warp_collective(uint32_t mask, const char* name, void* argument, Collective op, const Where& where);
void warpgroup_collective(const char* name, void* argument, Collective op, const Where& where);

// __threadfence and stronger: what this thread wrote, and what its block wrote before the last barrier of the
// block, may be read by other blocks from now on.
void publish_global_writes();
// fence.proxy.async: what this thread wrote to shared memory may be read by TMA and wgmma from now on.
void fence_proxy_async();
// Before an atomic access of n bytes: like a read and a write in one, but always visible to every block.
void check_atomic(Region* region, const void* p, size_t n, const Where& where);
// From now on stores to shared memory are followed until a fence.proxy.async: called by the first twin of an
// instruction of the asynchronous proxy (mbarrier_init).
void track_async_proxy();
// For TMA and wgmma: fails where a generic store to [p, p + n) was not fenced.
void check_async_read(Region* region, const void* p, size_t n, const Where& where);

// ---- operations that complete later
// ------------------------------------------------------------------------

// `complete` runs once: at a random time from now on, or when somebody calls finish. Owned by the block.
class Pending {
 public:
  Pending(std::function<void()> complete, const Where& where)
      : complete_(std::move(complete)), where(where) {}
  void finish() {
    if (!done) {
      done = true;
      complete_();
    }
  }
  bool done = false;

 private:
  std::function<void()> complete_;

 public:
  Where where;
};
using PendingPtr = std::shared_ptr<Pending>;
PendingPtr start_async(std::function<void()> complete, const Where& where);

// Destination of an asynchronous write: in flight until mark_arrived.
void mark_in_flight(Region* region, const void* p, size_t n, const Where& where);
void mark_arrived(Region* region, const void* p, size_t n);
void write_async(void* to, const void* from, size_t n);  // the bytes, without checks

// cp.async of the calling thread: pieces, groups in order, and waiting until at most `allowed` groups are
// left.
void cp_async_add(PendingPtr pending, std::function<void()> arrived);
void cp_async_commit();
void cp_async_wait(int allowed);

}  // namespace simt
