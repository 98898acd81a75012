// The largest code of each window, channels last. reference.py is the definition.
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

void raise(uint8_t* __restrict largest, const uint8_t* __restrict x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) largest[i] = std::max(largest[i], x[i]);
}

}  // namespace

// x: [images, height, width, channels]. out: [images, rows, columns, channels].
extern "C" void octav_integer_max_pool(const uint8_t* x, uint8_t* out, int64_t images, int64_t channels, int64_t height,
                                       int64_t width, int64_t rows, int64_t columns, int kernel_h, int kernel_w,
                                       int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h,
                                       int dilation_w, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && images * rows > 1)
  for (int64_t row = 0; row < images * rows; row++) {
    const int64_t image = row / rows, top = row % rows * stride_h - padding_h;
    for (int64_t column = 0; column < columns; column++) {
      uint8_t* largest = out + (row * columns + column) * channels;
      std::memset(largest, 0, channels);
      for (int64_t i = 0; i < kernel_h; i++) {
        const int64_t h = top + i * dilation_h;
        if (h < 0 || h >= height) continue;
        for (int64_t j = 0; j < kernel_w; j++) {
          const int64_t w = column * stride_w - padding_w + j * dilation_w;
          if (w >= 0 && w < width) raise(largest, x + ((image * height + h) * width + w) * channels, channels);
        }
      }
    }
  }
}
