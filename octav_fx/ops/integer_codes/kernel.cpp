// Codes of floats, counted from the lowest. reference.py is the definition, equal bit for bit.
#include <cmath>
#include <cstdint>

#include "../stretches.h"

// x, codes: dense, of n elements in the same order.
extern "C" void octav_integer_codes(const float* x, const float* scale, uint8_t* codes, int64_t n, int low, int high,
                                    int threads) {
  const float step = *scale, bottom = float(low), top = float(high);
  stretches(n, threads, [=](int64_t at, int64_t count) {
    const float* __restrict from = x + at;
    uint8_t* __restrict to = codes + at;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
      const float nearest = std::nearbyint(from[i] / step);
      // Written so that a comparison with NaN gives the lowest.
      const float bounded = nearest > bottom ? nearest : bottom;
      to[i] = uint8_t(int(bounded < top ? bounded : top) - low);
    }
  });
}
