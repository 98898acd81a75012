// Rounding to levels and its gradient, one pass each. reference.py is the definition, equal bit for bit.
#include <cmath>
#include <cstdint>

#include "../rounding.h"
#include "../stretches.h"

namespace {

template <bool SIGNED, bool MAGNITUDE_AWARE, int EACH, class G, class X>
void backward(const G* __restrict grad, const X* __restrict x, const float* __restrict clip, X* __restrict out,
              int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float value = to_float(x[i]), m = std::fabs(value), bound = clip[EACH * i];
    const float outside = MAGNITUDE_AWARE ? bound / m : 0.f, factor = m <= bound ? 1.f : outside;
    out[i] = from_float<X>(to_float(grad[i]) * (SIGNED ? factor : value >= 0.f ? factor : 0.f));
  }
}

}  // namespace

// x, out: dense, [outer, channels, inner] in memory order, each of a type. clip: [channels].
extern "C" void octav_fake_quantize(const void* x, int x_type, const float* clip, void* out, int out_type, int64_t outer,
                                    int64_t channels, int64_t inner, const Levels* of, int threads) {
  with_elements(x_type, out_type, [=](auto of_x, auto of_out) {
    const auto* from = static_cast<const decltype(of_x)*>(x);
    auto* to = static_cast<decltype(of_out)*>(out);
    with_levels(*of, [=](auto round) {
      channel_stretches(outer, channels, inner, threads, [=](int64_t at, int64_t count, int64_t channel, auto each) {
        to_levels<each()>(from + at, clip + channel, of->steps, to + at, count, round);
      });
    });
  });
}

// grad, x, out: dense, [outer, channels, inner] in the same memory order, grad of one type, x and out of another.
// clip: [channels].
extern "C" void octav_fake_quantize_backward(const void* grad, int grad_type, const void* x, int x_type,
                                             const float* clip, void* out, int64_t outer, int64_t channels,
                                             int64_t inner, int is_signed, int magnitude_aware, int threads) {
  with_elements(grad_type, x_type, [=](auto of_grad, auto of_x) {
    using G = decltype(of_grad);
    using X = decltype(of_x);
    channel_stretches(outer, channels, inner, threads, [=](int64_t at, int64_t count, int64_t channel, auto each) {
      constexpr int EACH = each();
      const auto aware = is_signed ? backward<true, true, EACH, G, X> : backward<false, true, EACH, G, X>;
      const auto unaware = is_signed ? backward<true, false, EACH, G, X> : backward<false, false, EACH, G, X>;
      const auto pass = magnitude_aware ? aware : unaware;
      pass(static_cast<const G*>(grad) + at, static_cast<const X*>(x) + at, clip + channel, static_cast<X*>(out) + at,
           count);
    });
  });
}
