// Codes of levels times a factor for each channel of an image. reference.py is the definition, equal bit for bit.
#include <cmath>
#include <cstdint>

// x, codes: [images, positions, channels]. gate: [images, channels]. From low .. high, counted from low.
extern "C" void octav_gated_codes(const uint8_t* x, const float* gate, const float* x_scale, const float* result_step,
                                  uint8_t* codes, int64_t images, int64_t positions, int64_t channels, int x_low,
                                  int low, int high, int threads) {
  const float scale = *x_scale, step = *result_step, first = float(x_low), bottom = float(low), top = float(high);
  const int64_t rows = images * positions;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * channels >= 1 << 16)
  for (int64_t row = 0; row < rows; row++) {
    const uint8_t* __restrict from = x + row * channels;
    const float* __restrict factor = gate + row / positions * channels;
    uint8_t* __restrict to = codes + row * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) {
      const float nearest = std::nearbyint((float(from[c]) + first) * scale * factor[c] / step);
      // Written so that a comparison with NaN gives the lowest.
      const float bounded = nearest > bottom ? nearest : bottom;
      to[c] = uint8_t(int(bounded < top ? bounded : top) - low);
    }
  }
}
