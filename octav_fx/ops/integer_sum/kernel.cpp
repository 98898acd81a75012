// A sum, its relu and its codes. reference.py is the definition, equal bit for bit.
#include <cmath>
#include <cstdint>
#include <limits>

#include "../stretches.h"

// x, y, total, codes: dense, of n elements in the same order.
extern "C" void octav_integer_sum(const float* x, const float* y, const float* scale, float* total, uint8_t* codes,
                                  int64_t n, int relu, int low, int high, int threads) {
  const float step = *scale, bottom = float(low), top = float(high);
  const float floor = relu ? 0.f : -std::numeric_limits<float>::infinity();
  stretches(n, threads, [=](int64_t at, int64_t count) {
    const float *__restrict left = x + at, *__restrict right = y + at;
    float* __restrict sums = total + at;
    uint8_t* __restrict to = codes + at;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
      const float sum = left[i] + right[i], value = sum < floor ? floor : sum;
      const float nearest = std::nearbyint(value / step);
      sums[i] = value;
      // Written so that a comparison with NaN gives the lowest.
      const float bounded = nearest > bottom ? nearest : bottom;
      to[i] = uint8_t(int(bounded < top ? bounded : top) - low);
    }
  });
}
