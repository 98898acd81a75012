// The largest of each window, channels last, of codes or of floats. reference.py is the definition, equal bit for bit.
#include <algorithm>
#include <cstdint>
#include <limits>

namespace {

void raise(uint8_t* __restrict largest, const uint8_t* __restrict x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) largest[i] = std::max(largest[i], x[i]);
}

void raise(float* __restrict largest, const float* __restrict x, int64_t n) {
#pragma omp simd
  // What is no number stays, as in torch.
  for (int64_t i = 0; i < n; i++) largest[i] = x[i] > largest[i] || x[i] != x[i] ? x[i] : largest[i];
}

template <typename T>
void pool(const T* x, T* out, T least, int64_t images, int64_t channels, int64_t height, int64_t width, int64_t rows,
          int64_t columns, int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w,
          int dilation_h, int dilation_w, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && images * rows > 1)
  for (int64_t row = 0; row < images * rows; row++) {
    const int64_t image = row / rows, top = row % rows * stride_h - padding_h;
    for (int64_t column = 0; column < columns; column++) {
      T* largest = out + (row * columns + column) * channels;
      std::fill(largest, largest + channels, least);
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

}  // namespace

// x: [images, height, width, channels]. out: [images, rows, columns, channels].
extern "C" void octav_max_pool(const void* x, void* out, int is_float, int64_t images, int64_t channels,
                               int64_t height, int64_t width, int64_t rows, int64_t columns, int kernel_h,
                               int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h,
                               int dilation_w, int threads) {
  if (is_float)
    pool(static_cast<const float*>(x), static_cast<float*>(out), -std::numeric_limits<float>::infinity(), images,
         channels, height, width, rows, columns, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w,
         dilation_h, dilation_w, threads);
  else
    pool(static_cast<const uint8_t*>(x), static_cast<uint8_t*>(out), uint8_t(0), images, channels, height, width, rows,
         columns, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, threads);
}
