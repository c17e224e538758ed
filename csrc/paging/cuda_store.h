#pragma once
#include "store.h"
namespace lk::paging {
Device cuda_device(int index, std::int64_t page_bytes);
}
