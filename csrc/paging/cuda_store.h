// The CUDA device: resident pages are plain device allocations, the others lie in pinned host memory, a page
// each.
//
// Two copy streams, in and out. The host waits for nothing but in wait(), evict(), free() and close(); order
// on the device is by events:
//
//   kernel on the user's stream --(recorded by unpin)--> copy out, or what comes into the same frame next
//   copy out --> what comes into the same frame next; the same page's copy in; the next pin's stream
//   copy in  --> the next pin's stream; copy out
//
// A pin also makes its stream wait for the kernels that other streams had on the page. With a budget the
// pinned host memory of a page is allocated with the page, so that eviction cannot fail for want of it.
#pragma once
#include "store.h"

namespace lk::paging {

// Throws std::invalid_argument where there is no such device, std::runtime_error where there is no CUDA.
Device cuda_device(int index, std::int64_t page_bytes);

}  // namespace lk::paging
