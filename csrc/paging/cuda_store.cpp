#include "cuda_store.h"

#include "errors.h"
namespace lk::paging {
Device cuda_device(int, std::int64_t) { throw std::runtime_error("device: CUDA follows in the next commit"); }
}  // namespace lk::paging
