// A 64-bit checksum of a page, to tell altered or stale bytes in a backing file; no defence against an
// attacker.
//
//   eight lanes over the 64-bit words:   h = (h ^ word) * odd;  h ^= h >> 32      then the lanes into one,
//   likewise
//
// Each step is a bijection of h and of the word, so a change within one word is always seen; the lanes keep
// the multiplier busy (a product may start in every cycle, and takes three or four).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace lk::paging {

// Of `bytes` bytes, a multiple of 64.
inline std::uint64_t checksum(const void* data, std::size_t bytes) {
  constexpr int kLanes = 8;
  constexpr std::uint64_t kOdd = 0x9e3779b97f4a7c15;  // 2^64 / golden ratio
  const auto* in = static_cast<const unsigned char*>(data);
  std::uint64_t lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = kOdd * (2 * i + 1);
  for (std::size_t at = 0; at < bytes; at += kLanes * 8) {
    std::uint64_t word[kLanes];
    std::memcpy(word, in + at, sizeof word);
    for (int i = 0; i < kLanes; ++i) {
      lane[i] = (lane[i] ^ word[i]) * kOdd;
      lane[i] ^= lane[i] >> 32;
    }
  }
  std::uint64_t sum = bytes;
  for (const std::uint64_t h : lane) {
    sum = (sum ^ h) * kOdd;
    sum ^= sum >> 32;
  }
  return sum;
}

}  // namespace lk::paging
