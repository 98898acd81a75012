// Integer codes of floats. reference.py is the definition, equal bit for bit.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../levels.h"
#include "../stretches.h"

namespace {

template <int EACH, class X, class Code, class Round>
void quantize(const X* __restrict x, const float* __restrict clips, Code* __restrict codes, int64_t n,
              const Levels& of, Round round, float ceiling) {
  const float steps = of.steps;
  const int not_finite = std::numeric_limits<Code>::min(), above = of.high + 1, below = of.low < 0 ? of.low - 1 : -2;
  const int raise = 2 * above;
  const bool is_unsigned = of.low == 0, is_signed = of.low < 0;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float value = to_float(x[i]), clip = clips[EACH * i], step = clip / steps, lowest = is_signed ? -clip : 0.f;
    const int nearest = round.code(round(value / step));
    int code = step > 0 ? nearest : 0;
    code = value > clip ? above : code;
    code = value < lowest ? below : code;
    code = is_unsigned && value == 0.f ? -1 : code;
    code += value >= ceiling ? raise : 0;
    codes[i] = Code(std::fabs(value) <= FLT_MAX ? code : not_finite);
  }
}

}  // namespace

// x, codes: dense, [outer, channels, inner] in memory order, x of a type. clip: [channels]. ceiling: inf if there is
// none. bytes: those of one code, 1 or 2.
extern "C" void octav_quantize(const void* x, int type, const float* clip, void* codes, int64_t outer, int64_t channels,
                               int64_t inner, const Levels* of, float ceiling, int bytes, int threads) {
  with_element(type, [=](auto element) {
    const auto* from = static_cast<const decltype(element)*>(x);
    with_levels(*of, [=](auto round) {
      channel_stretches(outer, channels, inner, threads, [=](int64_t at, int64_t count, int64_t channel, auto each) {
        if (bytes == 1)
          quantize<each()>(from + at, clip + channel, static_cast<int8_t*>(codes) + at, count, *of, round, ceiling);
        else
          quantize<each()>(from + at, clip + channel, static_cast<int16_t*>(codes) + at, count, *of, round, ceiling);
      });
    });
  });
}
