#include "page_table.h"

namespace lk::paging {

std::int64_t PageTable::room(std::int64_t arena) const {
  const auto open = open_.find(arena);
  return open == open_.end() ? 0 : page_bytes_ - pages_[open->second]->filled;
}

Page* PageTable::open_page(std::int64_t arena, std::int64_t bytes) {
  return room(arena) >= bytes ? pages_[open_.at(arena)].get() : nullptr;
}

Page& PageTable::add(std::int64_t arena) {
  const int number = next_number();
  auto page = std::make_unique<Page>();
  page->number = number;
  page->arena = arena;
  if (number == size_) {
    pages_.push_back(std::move(page));
    ++size_;
  } else {
    pages_[number] = std::move(page);
    free_numbers_.erase(number);
  }
  open_[arena] = number;
  return *pages_[number];
}

std::int64_t PageTable::place(Page& page, std::int64_t bytes) {
  const std::int64_t offset = page.filled;
  page.allocations.insert(offset);
  page.filled += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return offset;
}

void PageTable::remove(Page& page) {
  const auto open = open_.find(page.arena);
  if (open != open_.end() && open->second == page.number) open_.erase(open);
  by_use_.erase(page.last_use);
  const int number = page.number;
  pages_[number].reset();
  free_numbers_.insert(number);
  // Numbers at the end are forgotten, so that the table, and the file with it, become short again.
  while (size_ > 0 && !pages_[size_ - 1]) {
    pages_.pop_back();
    free_numbers_.erase(--size_);
  }
}

Page* PageTable::find(std::int64_t number) {
  return number >= 0 && number < size_ ? pages_[number].get() : nullptr;
}

std::vector<Page*> PageTable::all() {
  std::vector<Page*> found;
  for (const auto& page : pages_) {
    if (page) found.push_back(page.get());
  }
  return found;
}

void PageTable::touch(Page& page) {
  by_use_.erase(page.last_use);
  page.last_use = ++clock_;
}

void PageTable::refresh(Page& page) {
  if (page.frame && page.pins == 0 && !page.moving()) {
    by_use_.emplace(page.last_use, &page);
  } else {
    by_use_.erase(page.last_use);
  }
}

Page* PageTable::victim() { return by_use_.empty() ? nullptr : by_use_.begin()->second; }

std::vector<Page*> PageTable::unpinned() {
  std::vector<Page*> found;
  for (const auto& [use, page] : by_use_) found.push_back(page);
  return found;
}

}  // namespace lk::paging
