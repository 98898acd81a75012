// Integer codes of floats. reference.py is the definition, equal bit for bit.
#include <cstdint>

#include "../rounding.h"
#include "../stretches.h"

// x, codes: dense, [outer, channels, inner] in memory order, x of a type. clip: [channels]. ceiling: inf if there is
// none. bytes: those of one code, 1 or 2.
extern "C" void octav_quantize(const void* x, int type, const float* clip, void* codes, int64_t outer, int64_t channels,
                               int64_t inner, const Levels* of, float ceiling, int bytes, int threads) {
  with_element(type, [=](auto element) {
    const auto* from = static_cast<const decltype(element)*>(x);
    with_levels(*of, [=](auto round) {
      channel_stretches(outer, channels, inner, threads, [=](int64_t at, int64_t count, int64_t channel, auto each) {
        if (bytes == 1)
          to_codes<each()>(from + at, clip + channel, static_cast<int8_t*>(codes) + at, count, *of, round, ceiling);
        else
          to_codes<each()>(from + at, clip + channel, static_cast<int16_t*>(codes) + at, count, *of, round, ceiling);
      });
    });
  });
}
