// Elements of one clip, or of one for each, as levels and as codes; and rows of them as soon as their clips are known.
// ops/fake_quantize/reference.py and ops/quantize/reference.py are the definitions, equal bit for bit.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

#include "levels.h"

// EACH: 0, or 1 where each element has a clip of its own. A clip of zero leaves nothing but what is not finite.
template <int EACH, class X, class Y, class Round>
void to_levels(const X* __restrict x, const float* __restrict clip, float steps, Y* __restrict out, int64_t n,
               Round round) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float value = to_float(x[i]), step = clip[EACH * i] / steps, level = round(value / step);
    out[i] = from_float<Y>(std::fabs(value) <= FLT_MAX ? (step > 0 ? representable<X>(level * step) : 0.f) : value);
  }
}

template <int EACH, class X, class Code, class Round>
void to_codes(const X* __restrict x, const float* __restrict clips, Code* __restrict codes, int64_t n, const Levels& of,
              Round round, float ceiling) {
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

// What is made of rows while the cache holds them; ops/optimal_clip/op.py fills it in.
struct Rounding {
  // Of x [rows, n]: codes of so many bytes each, or, of 0 bytes, levels of a type.
  void* out;
  int code_bytes, out_type;
  // inf if there is none.
  float ceiling;

  // Rounds the rows from an index on; clip: of all rows. In ops/quantize_rows/kernel.cpp.
  void operator()(const void* x, int type, int64_t n, const float* clip, const Levels& of, int64_t first,
                  int64_t rows) const;
};
