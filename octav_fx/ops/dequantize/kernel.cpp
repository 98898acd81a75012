// The levels that codes stand for. reference.py is the definition, equal bit for bit.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../levels.h"
#include "../stretches.h"

namespace {

constexpr int64_t CHUNK = 1024;

template <class Y, int EACH, class Code, class Round>
void levels_of(const Code* __restrict codes, const float* __restrict clip, float* __restrict out, int64_t n,
               const Levels& of, Round round) {
  const float steps = of.steps;
  const int low = of.low, high = of.high;
  const int not_finite = std::numeric_limits<Code>::min(), saturated = 2 * (high + 1);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const int code = low == 0 && codes[i] >= saturated ? codes[i] - saturated : codes[i];
    const float level = representable<Y>(round.level(std::min(std::max(code, low), high)) * (clip[EACH * i] / steps));
    out[i] = codes[i] == not_finite ? std::numeric_limits<float>::quiet_NaN() : level;
  }
}

// Through floats in the nearest cache: a loop over bytes, floats and halves at once takes half as long again.
template <int EACH, class Code, class Y, class Round>
void dequantize(const Code* codes, const float* clip, Y* __restrict out, int64_t n, const Levels& of, Round round) {
  if constexpr (std::is_same_v<Y, float>) return levels_of<Y, EACH>(codes, clip, out, n, of, round);
  float levels[CHUNK];
  for (int64_t at = 0; at < n; at += CHUNK) {
    const int64_t count = std::min(CHUNK, n - at);
    levels_of<Y, EACH>(codes + at, clip + EACH * at, levels, count, of, round);
#pragma omp simd
    for (int64_t i = 0; i < count; i++) out[at + i] = from_float<Y>(levels[i]);
  }
}

}  // namespace

// codes, out: dense, [outer, channels, inner] in memory order, out of a type. clip: [channels]. bytes: those of one
// code, 1 or 2.
extern "C" void octav_dequantize(const void* codes, const float* clip, void* out, int type, int64_t outer,
                                 int64_t channels, int64_t inner, const Levels* of, int bytes, int threads) {
  with_element(type, [=](auto element) {
    auto* to = static_cast<decltype(element)*>(out);
    with_levels(*of, [=](auto round) {
      channel_stretches(outer, channels, inner, threads, [=](int64_t at, int64_t count, int64_t channel, auto each) {
        if (bytes == 1)
          dequantize<each()>(static_cast<const int8_t*>(codes) + at, clip + channel, to + at, count, *of, round);
        else
          dequantize<each()>(static_cast<const int16_t*>(codes) + at, clip + channel, to + at, count, *of, round);
      });
    });
  });
}
