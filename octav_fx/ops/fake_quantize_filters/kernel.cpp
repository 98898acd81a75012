// Filters to and from the layout with the input channels last, on the way through the quantizer. A few inputs at a time:
// a transposition of more of them at once reads and writes lines that push each other out of the first cache, and takes
// up to three times as long. reference.py is the definition, equal bit for bit.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../elements.h"

namespace {

constexpr int64_t PARALLEL_FROM = 1 << 16, INPUTS = 32;

// Calls pass(channel, first input, count of inputs, scratch for their floats) for all inputs of all channels, in parallel.
template <class Pass>
void each_block(int64_t channels, int64_t inputs, int64_t positions, int threads, Pass pass) {
#pragma omp parallel num_threads(threads) if (threads > 1 && channels * inputs * positions >= PARALLEL_FROM)
  {
    std::vector<float> scratch(INPUTS * positions);
#pragma omp for
    for (int64_t channel = 0; channel < channels; channel++)
      for (int64_t first = 0; first < inputs; first += INPUTS)
        pass(channel, first, std::min(INPUTS, inputs - first), scratch.data());
  }
}

// from [count, positions] -> to [positions, count], whose rows lie `inputs` elements apart. With the 9 positions of most
// kernels known to the compiler it takes two thirds of the time.
template <int64_t KNOWN, class Y>
void inputs_last(const float* __restrict from, Y* __restrict to, int64_t count, int64_t positions, int64_t inputs) {
  if (KNOWN) positions = KNOWN;
  for (int64_t position = 0; position < positions; position++)
    for (int64_t i = 0; i < count; i++) to[position * inputs + i] = from_float<Y>(from[i * positions + position]);
}

// The way back.
template <int64_t KNOWN, class G>
void positions_last(const G* __restrict from, float* __restrict to, int64_t count, int64_t positions, int64_t inputs) {
  if (KNOWN) positions = KNOWN;
  for (int64_t i = 0; i < count; i++)
    for (int64_t position = 0; position < positions; position++)
      to[i * positions + position] = to_float(from[position * inputs + i]);
}

template <class X>
void fake_quantize(const X* __restrict x, float step, float* __restrict out, int64_t n, float bottom, float top) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float value = to_float(x[i]), code = std::min(std::max(std::nearbyint(value / step), bottom), top);
    out[i] = std::fabs(value) <= FLT_MAX ? (step > 0 ? representable<X>(code * step) : 0.f) : value;
  }
}

template <class G, class X>
void backward(const G* __restrict grad, const X* __restrict x, float bound, X* __restrict out, int64_t n,
              bool is_signed, int gradient) {
  const bool straight = gradient == 0, magnitude_aware = gradient == 2, cut_negative = !straight && !is_signed;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float value = to_float(x[i]), m = std::fabs(value), outside = magnitude_aware ? bound / m : 0.f;
    const float factor = straight || m <= bound ? 1.f : outside;
    out[i] = from_float<X>(to_float(grad[i]) * (cut_negative && !(value >= 0.f) ? 0.f : factor));
  }
}

}  // namespace

// filters: [channels, inputs, positions]. clip: [channels]. out: [channels, positions, inputs]. Filters and out are each
// of a type.
extern "C" void octav_fake_quantize_filters(const void* filters, int filters_type, const float* clip, void* out,
                                            int out_type, int64_t channels, int64_t inputs, int64_t positions,
                                            int steps, int low, int high, int threads) {
  with_elements(filters_type, out_type, [=](auto of_filters, auto of_out) {
    using X = decltype(of_filters);
    using Y = decltype(of_out);
    const auto transpose = positions == 9 ? inputs_last<9, Y> : inputs_last<0, Y>;
    each_block(channels, inputs, positions, threads, [=](int64_t channel, int64_t first, int64_t count, float* scratch) {
      const X* x = static_cast<const X*>(filters) + (channel * inputs + first) * positions;
      fake_quantize(x, clip[channel] / float(steps), scratch, count * positions, float(low), float(high));
      transpose(scratch, static_cast<Y*>(out) + channel * inputs * positions + first, count, positions, inputs);
    });
  });
}

// grad: [channels, inputs, positions] or, channels_last, [channels, positions, inputs]. filters, out: [channels, inputs,
// positions]; both are of one type, grad is of another. clip: [channels]. gradient: 0 = "ste", 1 = "pwl", 2 = "mad".
extern "C" void octav_fake_quantize_filters_backward(const void* grad, int grad_type, const void* filters,
                                                     int filters_type, const float* clip, void* out, int64_t channels,
                                                     int64_t inputs, int64_t positions, int channels_last,
                                                     int is_signed, int gradient, int threads) {
  with_elements(grad_type, filters_type, [=](auto of_grad, auto of_filters) {
    using G = decltype(of_grad);
    using X = decltype(of_filters);
    const auto transpose = positions == 9 ? positions_last<9, G> : positions_last<0, G>;
    const G* grads = static_cast<const G*>(grad);
    each_block(channels, inputs, positions, threads, [=](int64_t channel, int64_t first, int64_t count, float* scratch) {
      const int64_t at = (channel * inputs + first) * positions;
      const X* x = static_cast<const X*>(filters) + at;
      X* dx = static_cast<X*>(out) + at;
      if (channels_last) {
        transpose(grads + channel * inputs * positions + first, scratch, count, positions, inputs);
        backward(scratch, x, clip[channel], dx, count * positions, is_signed, gradient);
      } else {
        backward(grads + at, x, clip[channel], dx, count * positions, is_signed, gradient);
      }
    });
  });
}
