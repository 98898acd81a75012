// The largest of each window, channels last, of codes or of floats. reference.py is the definition, equal bit for bit.
#include <algorithm>
#include <cstdint>
#include <limits>

namespace {

// So many channels of codes or floats are held in registers while a window goes by.
constexpr int CHANNELS = 64;

inline void raise(uint8_t& largest, uint8_t x) { largest = std::max(largest, x); }

// What is no number stays, as in torch.
inline void raise(float& largest, float x) { largest = x > largest || x != x ? x : largest; }

struct Window {
  int64_t channels, width, top, left, first_row, last_row, first_column, last_column, dilation_h, dilation_w;
};

// The largest of `count` channels of a window of an image; a constant count is a few registers.
template <typename T>
inline void largest(const T* x, T* out, T least, const Window& window, int count) {
  T found[CHANNELS];
  std::fill(found, found + count, least);
  for (int64_t i = window.first_row; i < window.last_row; i++)
    for (int64_t j = window.first_column; j < window.last_column; j++) {
      const int64_t h = window.top + i * window.dilation_h, w = window.left + j * window.dilation_w;
      const T* __restrict from = x + (h * window.width + w) * window.channels;
#pragma omp simd
      for (int k = 0; k < count; k++) raise(found[k], from[k]);
    }
  std::copy(found, found + count, out);
}

// The first and the last + 1 of the steps of a window, each dilation apart, that lie in 0 .. size.
inline void inside(int64_t start, int64_t dilation, int64_t kernel, int64_t size, int64_t& first, int64_t& last) {
  first = start < 0 ? (-start + dilation - 1) / dilation : 0;
  last = std::min(kernel, start < size ? (size - start + dilation - 1) / dilation : 0);
}

template <typename T>
void pool(const T* x, T* out, T least, int64_t images, int64_t channels, int64_t height, int64_t width, int64_t rows,
          int64_t columns, int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w,
          int dilation_h, int dilation_w, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && images * rows > 1)
  for (int64_t row = 0; row < images * rows; row++) {
    const int64_t image = row / rows;
    Window window{channels, width, row % rows * stride_h - padding_h, 0, 0, 0, 0, 0, dilation_h, dilation_w};
    inside(window.top, dilation_h, kernel_h, height, window.first_row, window.last_row);
    for (int64_t column = 0; column < columns; column++) {
      window.left = column * stride_w - padding_w;
      inside(window.left, dilation_w, kernel_w, width, window.first_column, window.last_column);
      const T* from = x + image * height * width * channels;
      T* to = out + (row * columns + column) * channels;
      int64_t c = 0;
      for (; c + CHANNELS <= channels; c += CHANNELS) largest(from + c, to + c, least, window, CHANNELS);
      if (c < channels) largest(from + c, to + c, least, window, int(channels - c));
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
