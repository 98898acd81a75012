// The codes of a sum of codes. reference.py is the definition, equal bit for bit where scales are within 2**20.
#include "../codes.h"
#include "../stretches.h"

// x, y, codes: dense, of n elements in the same order.
extern "C" void octav_code_sum(const uint8_t* x, const uint8_t* y, const float* x_scale, const float* y_scale,
                               const float* step, uint8_t* codes, int64_t n, int x_bits, int x_signed, int y_bits,
                               int y_signed, int bits, int is_signed, float low, float high, int threads) {
  const Saturation saturated(*step, bits, is_signed, low, high);
  const float first = *x_scale / *step, second = *y_scale / *step;
  const float x_zero = float(-lowest_code(x_bits, x_signed)), y_zero = float(-lowest_code(y_bits, y_signed));
  const float constant = saturated.zero - (first * x_zero + second * y_zero);
  stretches(n, threads, [=](int64_t at, int64_t count) {
    const uint8_t *__restrict left = x + at, *__restrict right = y + at;
    uint8_t* __restrict to = codes + at;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
      const float inner = std::fma(second, float(right[i]), constant);
      to[i] = saturated(std::fma(first, float(left[i]), inner));
    }
  });
}
