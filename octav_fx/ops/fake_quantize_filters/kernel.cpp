// Filters to and from the layout with the input channels last, on the way through the quantizer. A few inputs at a time:
// a transposition of more of them at once reads and writes lines that push each other out of the first cache, and takes
// up to three times as long. reference.py is the definition, equal bit for bit.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

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

// from [count, positions] -> to [positions, count], whose rows lie `inputs` floats apart. With the 9 positions of most
// kernels known to the compiler it takes two thirds of the time.
template <int64_t KNOWN>
void inputs_last(const float* __restrict from, float* __restrict to, int64_t count, int64_t positions, int64_t inputs) {
  if (KNOWN) positions = KNOWN;
  for (int64_t position = 0; position < positions; position++)
    for (int64_t i = 0; i < count; i++) to[position * inputs + i] = from[i * positions + position];
}

// The way back.
template <int64_t KNOWN>
void positions_last(const float* __restrict from, float* __restrict to, int64_t count, int64_t positions,
                    int64_t inputs) {
  if (KNOWN) positions = KNOWN;
  for (int64_t i = 0; i < count; i++)
    for (int64_t position = 0; position < positions; position++)
      to[i * positions + position] = from[position * inputs + i];
}

}  // namespace

// filters: [channels, inputs, positions]. clip: [channels]. out: [channels, positions, inputs].
extern "C" void octav_fake_quantize_filters(const float* filters, const float* clip, float* out, int64_t channels,
                                            int64_t inputs, int64_t positions, int steps, int low, int high,
                                            int threads) {
  const float bottom = float(low), top = float(high);
  const auto transpose = positions == 9 ? inputs_last<9> : inputs_last<0>;
  each_block(channels, inputs, positions, threads, [=](int64_t channel, int64_t first, int64_t count, float* scratch) {
    const float* x = filters + (channel * inputs + first) * positions;
    const float step = clip[channel] / float(steps);
#pragma omp simd
    for (int64_t i = 0; i < count * positions; i++) {
      const float code = std::min(std::max(std::nearbyint(x[i] / step), bottom), top);
      scratch[i] = std::fabs(x[i]) <= FLT_MAX ? (step > 0 ? code * step : 0.f) : x[i];
    }
    transpose(scratch, out + channel * inputs * positions + first, count, positions, inputs);
  });
}

// grad: [channels, inputs, positions] or, channels_last, [channels, positions, inputs]. filters, out: [channels, inputs,
// positions]. clip: [channels]. gradient: 0 = "ste", 1 = "pwl", 2 = "mad".
extern "C" void octav_fake_quantize_filters_backward(const float* grad, const float* filters, const float* clip,
                                                     float* out, int64_t channels, int64_t inputs, int64_t positions,
                                                     int channels_last, int is_signed, int gradient, int threads) {
  const auto transpose = positions == 9 ? positions_last<9> : positions_last<0>;
  each_block(channels, inputs, positions, threads, [=](int64_t channel, int64_t first, int64_t count, float* scratch) {
    const int64_t at = (channel * inputs + first) * positions;
    const float *g = grad + at, *x = filters + at;
    float* to = out + at;
    if (channels_last) {
      transpose(grad + channel * inputs * positions + first, scratch, count, positions, inputs);
      g = scratch;
    }
    const float bound = clip[channel];
    const bool straight = gradient == 0, magnitude_aware = gradient == 2, cut_negative = !straight && !is_signed;
#pragma omp simd
    for (int64_t i = 0; i < count * positions; i++) {
      const float m = std::fabs(x[i]), outside = magnitude_aware ? bound / m : 0.f;
      const float factor = straight || m <= bound ? 1.f : outside;
      to[i] = g[i] * (cut_negative && !(x[i] >= 0.f) ? 0.f : factor);
    }
  });
}
