// Filters to and from the layout with the input channels last, on the way through the quantizer; one row at a time, so
// that the transposition stays in the first cache. reference.py is the definition, equal bit for bit.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t PARALLEL_FROM = 1 << 16;

// from [rows, columns] -> to [columns, rows]
void transpose(const float* __restrict from, float* __restrict to, int64_t rows, int64_t columns) {
  for (int64_t column = 0; column < columns; column++)
    for (int64_t row = 0; row < rows; row++) to[column * rows + row] = from[row * columns + column];
}

// Calls pass(channel, scratch of `size` floats) for each channel, in parallel.
template <class Pass>
void each_channel(int64_t channels, int64_t size, int threads, Pass pass) {
#pragma omp parallel num_threads(threads) if (threads > 1 && channels * size >= PARALLEL_FROM)
  {
    std::vector<float> scratch(size);
#pragma omp for
    for (int64_t channel = 0; channel < channels; channel++) pass(channel, scratch.data());
  }
}

}  // namespace

// filters: [channels, inputs, positions]. clip: [channels]. out: [channels, positions, inputs].
extern "C" void octav_fake_quantize_filters(const float* filters, const float* clip, float* out, int64_t channels,
                                            int64_t inputs, int64_t positions, int steps, int low, int high,
                                            int threads) {
  const int64_t size = inputs * positions;
  const float bottom = float(low), top = float(high);
  each_channel(channels, size, threads, [=](int64_t channel, float* scratch) {
    const float* x = filters + channel * size;
    const float step = clip[channel] / float(steps);
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
      const float code = std::min(std::max(std::nearbyint(x[i] / step), bottom), top);
      scratch[i] = std::fabs(x[i]) <= FLT_MAX ? (step > 0 ? code * step : 0.f) : x[i];
    }
    transpose(scratch, out + channel * size, inputs, positions);
  });
}

// grad: [channels, inputs, positions] or, channels_last, [channels, positions, inputs]. filters, out: [channels, inputs,
// positions]. clip: [channels]. gradient: 0 = "ste", 1 = "pwl", 2 = "mad".
extern "C" void octav_fake_quantize_filters_backward(const float* grad, const float* filters, const float* clip,
                                                     float* out, int64_t channels, int64_t inputs, int64_t positions,
                                                     int channels_last, int is_signed, int gradient, int threads) {
  const int64_t size = inputs * positions;
  each_channel(channels, size, threads, [=](int64_t channel, float* scratch) {
    const float *g = grad + channel * size, *x = filters + channel * size;
    float* to = out + channel * size;
    if (channels_last) {
      transpose(g, scratch, positions, inputs);
      g = scratch;
    }
    const float bound = clip[channel];
    const bool straight = gradient == 0, magnitude_aware = gradient == 2, cut_negative = !straight && !is_signed;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
      const float m = std::fabs(x[i]), outside = magnitude_aware ? bound / m : 0.f;
      const float factor = straight || m <= bound ? 1.f : outside;
      to[i] = g[i] * (cut_negative && !(x[i] >= 0.f) ? 0.f : factor);
    }
  });
}
