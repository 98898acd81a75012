// The codes of the levels of codes. reference.py is the definition, equal bit for bit.
#include <limits>

#include "../codes.h"
#include "../stretches.h"

// x, codes: dense, of n elements in the same order.
extern "C" void octav_recode(const uint8_t* x, const float* x_scale, const float* step, uint8_t* codes, int64_t n,
                             int x_bits, int x_signed, int bits, int is_signed, int threads) {
  const float infinity = std::numeric_limits<float>::infinity();
  const Saturation saturated(*step, bits, is_signed, -infinity, infinity);
  const float low = float(lowest_code(x_bits, x_signed)), ratio = *x_scale / *step;
  const auto multiplied = [=](uint8_t code) { return saturated((float(code) + low) * ratio); };
  // There are few codes: whether one product gives what a product and a quotient give is soon known.
  uint8_t table[256];
  bool is_product = true;
  for (int code = 0; code < 256; code++) {
    table[code] = saturated((float(code) + low) * *x_scale / *step);
    is_product = is_product && table[code] == multiplied(uint8_t(code));
  }
  stretches(1, 1, n, threads, [=](int64_t at, int64_t count, int64_t) {
    const uint8_t* __restrict from = x + at;
    uint8_t* __restrict to = codes + at;
    if (is_product) {
#pragma omp simd
      for (int64_t i = 0; i < count; i++) to[i] = multiplied(from[i]);
    } else {
      for (int64_t i = 0; i < count; i++) to[i] = table[from[i]];
    }
  });
}
