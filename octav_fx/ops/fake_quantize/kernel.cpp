// Rounding to a grid and its gradient, one pass each. reference.py is the definition, equal bit for bit.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "../stretches.h"

namespace {

template <bool SIGNED, bool MAGNITUDE_AWARE>
void backward(const float* __restrict grad, const float* __restrict x, float bound, float* __restrict out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float m = std::fabs(x[i]), outside = MAGNITUDE_AWARE ? bound / m : 0.f;
    const float factor = m <= bound ? 1.f : outside;
    out[i] = grad[i] * (SIGNED ? factor : x[i] >= 0.f ? factor : 0.f);
  }
}

}  // namespace

// x, out: dense, [outer, channels, inner] in memory order. clip: [channels].
extern "C" void octav_fake_quantize(const float* x, const float* clip, float* out, int64_t outer, int64_t channels,
                                    int64_t inner, int steps, int low, int high, int threads) {
  stretches(outer, channels, inner, threads, [=](int64_t at, int64_t count, int64_t channel) {
    const float step = clip[channel] / float(steps), bottom = float(low), top = float(high);
    const float *from = x + at;
    float* to = out + at;
    if (step > 0) {
#pragma omp simd
      for (int64_t i = 0; i < count; i++) {
        const float code = std::min(std::max(std::nearbyint(from[i] / step), bottom), top);
        to[i] = std::fabs(from[i]) <= FLT_MAX ? code * step : from[i];
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; i++) to[i] = std::fabs(from[i]) <= FLT_MAX ? 0.f : from[i];
    }
  });
}

// grad, x, out: dense, [outer, channels, inner] in the same memory order. clip: [channels].
extern "C" void octav_fake_quantize_backward(const float* grad, const float* x, const float* clip, float* out,
                                             int64_t outer, int64_t channels, int64_t inner, int is_signed,
                                             int magnitude_aware, int threads) {
  const auto pass = is_signed ? (magnitude_aware ? backward<true, true> : backward<true, false>)
                              : (magnitude_aware ? backward<false, true> : backward<false, false>);
  stretches(outer, channels, inner, threads, [=](int64_t at, int64_t count, int64_t channel) {
    pass(grad + at, x + at, clip[channel], out + at, count);
  });
}
