// The codes of the mean over the positions of each image. reference.py is the definition, equal bit for bit.
#include <vector>

#include "../codes.h"

// x: [images, positions, channels], of fewer than 2**23 positions. codes: [images, channels].
extern "C" void octav_code_mean(const uint8_t* x, const float* x_scale, const float* step, uint8_t* codes,
                                int64_t images, int64_t positions, int64_t channels, int x_bits, int x_signed, int bits,
                                int is_signed, float low, float high) {
  const Saturation saturated(*step, bits, is_signed, low, high);
  const float multiplier = *x_scale / (*step * float(positions));
  std::vector<int32_t> sums(channels);
  for (int64_t image = 0; image < images; image++) {
    std::fill(sums.begin(), sums.end(), int32_t(positions) * lowest_code(x_bits, x_signed));
    for (int64_t position = 0; position < positions; position++) {
      const uint8_t* __restrict from = x + (image * positions + position) * channels;
      int32_t* __restrict to = sums.data();
#pragma omp simd
      for (int64_t c = 0; c < channels; c++) to[c] += from[c];
    }
    // Rounded before zero is added: about another zero there are other ties.
    for (int64_t c = 0; c < channels; c++)
      codes[image * channels + c] = saturated(std::nearbyint(float(sums[c]) * multiplier) + saturated.zero);
  }
}
