// Runs of csrc/cuda/low_rank.cuh, by which the sweeps cut sorted rows into spans and the other kernels into
// tiles: a kernel that says what each block gets, against a plain loop over the adapters.
#pragma once
#include "../../csrc/cuda/lora_linear_backward_sweep.cuh"
#include "problems.h"

namespace problems {

constexpr int kRunFields = 6;  // adapter, begin, end, runs of the adapter, slot, the adapter's first slot

template <bool kEmpty>
__global__ void list_runs(lk::cuda::Rows rows, int64_t length, lk::Global<int64_t> out) {
  const int lane = static_cast<int>(threadIdx.x);
  const lk::cuda::Runs<kEmpty> runs(rows, length, lane);
  const auto run = runs[blockIdx.x];
  const auto slots = runs.slots_of(run.adapter < 0 ? 0 : run.adapter);
  if (lane != 0) return;
  const int64_t fields[kRunFields] = {run.adapter, run.begin, run.end, run.runs, run.slot, slots.first};
  for (int i = 0; i < kRunFields; ++i) out[blockIdx.x * kRunFields + i] = fields[i];
  if (run.adapter >= 0 && slots.runs != run.runs) out[blockIdx.x * kRunFields] = -2;
}

// Rows of up to 64 adapters, some with none; sometimes nearly all with one.
template <bool kEmpty>
inline void runs(Rng& rng) {
  using namespace lk::cuda;
  const int64_t adapters = between(rng, 1, kMostAdapters), skewed = between(rng, 0, adapters - 1);
  const bool skew = rng() % 2 == 0;
  Buffer<int64_t> begins(adapters + 1);
  begins[0] = between(rng, 0, 3);
  for (int64_t a = 0; a < adapters; ++a) {
    const int64_t some = rng() % 3 == 0 ? 0 : between(rng, 0, skew ? 5 : 300);
    begins[a + 1] = begins[a] + (skew && a == skewed ? 4096 : some);
  }
  const int64_t count = begins[adapters];
  Buffer<int64_t> order(1);  // not read
  const int multiprocessors = static_cast<int>(between(rng, 1, 150));
  const sweep::Plan plan =
      sweep::make_plan(count, adapters, between(rng, 1, 9000), between(rng, 1, 300), multiprocessors);
  const int64_t length = kEmpty ? plan.span_rows : kTileRows;
  const int64_t grid = kEmpty ? plan.spans : most_tiles(count, adapters, true);
  // What one block has to do follows from all rows, whosever they are: two blocks for each multiprocessor.
  const int64_t shares = 2 * multiprocessors / (plan.strips * plan.chunks);
  const int64_t share = (count + 63) / 64 / std::clamp<int64_t>(shares, 1, sweep::kMostParts) + 1;
  if (kEmpty && length > share * kTileRows) throw Wrong("a span is longer than an even share of all rows");

  Buffer<int64_t> out(grid * kRunFields);
  Memory memory;
  order.use("order", simt::Use::input), begins.use("begins", simt::Use::input);
  out.use("out", simt::Use::output);
  const lk_rows rows = {count, order.get(), begins.get(), adapters};
  check_status(launch("list_runs", list_runs<kEmpty>, {static_cast<unsigned>(grid), 1, 1, 32}, nullptr,
                      rows_of(rows), length, lk::Global<int64_t>(out.get())));
  int64_t next = 0, slots = 0;
  for (int64_t a = 0; a < adapters; ++a) {
    const int64_t mine = begins[a + 1] - begins[a];
    const int64_t parts = std::max<int64_t>(kEmpty ? 1 : 0, (mine + length - 1) / length);
    for (int64_t part = 0; part < parts; ++part, ++next) {
      if (next >= grid) throw Wrong("more runs than the launch has blocks");
      const int64_t begin = begins[a] + part * length, end = std::min(begin + length, begins[a + 1]);
      const int64_t want[kRunFields] = {a, begin, end, parts, slots + part, slots};
      for (int i = 0; i < (parts > 1 ? kRunFields : 4); ++i) {
        if (out[next * kRunFields + i] != want[i]) throw Wrong("wrong run " + std::to_string(next));
      }
    }
    slots += parts > 1 ? parts : 0;
  }
  if (kEmpty && slots > plan.slots) throw Wrong("more slots than the workspace has");
  for (; next < grid; ++next) {
    if (out[next * kRunFields] != -1) throw Wrong("a run that does not exist");
  }
}

}  // namespace problems
