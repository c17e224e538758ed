// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the
// counter-based generator of every dropout mask. Element i of x [T, K] (flat index) reads word i % 4 of
//   philox(counter = (i / 4, offset), key = seed)
// and is kept where word >= floor(p * 2^32). A mask is a pure function of (seed, offset, i): nothing is
// stored, and every backend and every tiling draws the same one.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define LK_ON_DEVICE __device__
#else
#define LK_ON_DEVICE
#endif

namespace lk {

inline constexpr int kPhiloxRounds = 10;
inline constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;
inline constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;  // golden ratio; sqrt(3) - 1

struct PhiloxWords {
  uint32_t w[4];
};

struct WideProduct {
  LK_ON_DEVICE constexpr uint64_t operator()(uint32_t a, uint32_t b) const { return uint64_t{a} * b; }
};

// `product`: of two words, in 64 bits; a machine that has an instruction for it brings that.
template <class Product = WideProduct>
LK_ON_DEVICE constexpr PhiloxWords philox4x32_10(uint64_t index, uint64_t offset, uint64_t seed,
                                                 Product product = {}) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32);
  uint32_t c2 = static_cast<uint32_t>(offset), c3 = static_cast<uint32_t>(offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = product(kPhiloxM0, c0);
    const uint64_t p1 = product(kPhiloxM1, c2);
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// Words below this value are dropped. p in [0, 1).
constexpr uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(p * 4294967296.0); }

}  // namespace lk
