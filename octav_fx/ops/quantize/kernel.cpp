// Integer codes of floats. reference.py is the definition, equal bit for bit.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../elements.h"
#include "../stretches.h"

namespace {

template <class X, class Code>
void quantize(const X* __restrict x, float clip, Code* __restrict codes, int64_t n, int steps, int low, int high,
              float ceiling) {
  const float step = clip / float(steps), bottom = float(low), top = float(high);
  const float lowest = low < 0 ? -clip : 0.f;
  const int not_finite = std::numeric_limits<Code>::min(), below = low < 0 ? low - 1 : -2;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float value = to_float(x[i]), nearest = step > 0 ? std::nearbyint(value / step) : 0.f;
    int code = int(std::min(std::max(nearest, bottom), top));
    code = value > clip ? high + 1 : code;
    code = value < lowest ? below : code;
    code = low == 0 && value == 0.f ? -1 : code;
    code += value >= ceiling ? 2 * steps : 0;
    codes[i] = Code(std::fabs(value) <= FLT_MAX ? code : not_finite);
  }
}

}  // namespace

// x, codes: dense, [outer, channels, inner] in memory order, x of a type. clip: [channels]. ceiling: inf if there is
// none. bytes: those of one code, 1 or 2.
extern "C" void octav_quantize(const void* x, int type, const float* clip, void* codes, int64_t outer, int64_t channels,
                               int64_t inner, int steps, int low, int high, float ceiling, int bytes, int threads) {
  with_element(type, [=](auto element) {
    const auto* from = static_cast<const decltype(element)*>(x);
    stretches(outer, channels, inner, threads, [=](int64_t at, int64_t count, int64_t channel) {
      if (bytes == 1)
        quantize(from + at, clip[channel], static_cast<int8_t*>(codes) + at, count, steps, low, high, ceiling);
      else
        quantize(from + at, clip[channel], static_cast<int16_t*>(codes) + at, count, steps, low, high, ceiling);
    });
  });
}
