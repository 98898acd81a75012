// What the passes that multiply codes have in common: vectors of sums that stay in registers, and what becomes of sums.
// HAS_VNNI_PASSES where the build is for AVX-512. It need not be for VNNI: who calls asks whether the processor has it.
#pragma once
#include <cstdint>
#include <utility>

#if defined(__AVX512BW__)
#define HAS_VNNI_PASSES
#include <immintrin.h>

// Around code that multiplies. Clang assembles what it may choose itself, GCC all that the assembler knows.
#if defined(__clang__)
#define VNNI_BEGIN _Pragma("clang attribute push(__attribute__((target(\"avx512vnni\"))), apply_to = function)")
#define VNNI_END _Pragma("clang attribute pop")
#else
#define VNNI_BEGIN
#define VNNI_END
#endif

#define INLINED __attribute__((always_inline))
#define ALWAYS_INLINE inline INLINED

constexpr int SUMS = 16, QUADS = 64;

VNNI_BEGIN

// Calls run(0), run(1), .. with constants.
template <class Run, size_t... I>
ALWAYS_INLINE void each(Run run, std::index_sequence<I...>) {
  (run(std::integral_constant<int, I>{}), ...);
}

template <int COUNT, class Run>
ALWAYS_INLINE void each(Run run) {
  each(run, std::make_index_sequence<COUNT>{});
}

// COUNT vectors. GCC 12 would keep an array of them in memory.
template <int COUNT>
struct Vectors {
  __m512i first;
  Vectors<COUNT - 1> others;

  template <int I>
  ALWAYS_INLINE __m512i& at() {
    if constexpr (I == 0)
      return first;
    else
      return others.template at<I - 1>();
  }
};
template <>
struct Vectors<0> {};

// Four products of codes and weights for each sum. The intrinsic costs two copies of the sum (GCC 12).
ALWAYS_INLINE void add_products(__m512i& sum, __m512i codes, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(weights));
}

// What becomes of a sum: f32(sum) * scale + bias, and of codes that * inverse + zero, between bottom and top, and then,
// an integer, + lowest. offset: what sums begin with. Each step is monotone, so that a clamp of levels can be one of
// codes.
struct Ending {
  const int32_t* offset;
  const float *scale, *bias;
  float inverse, zero, bottom, top;
  int lowest;

  __m512 level(__m512i sum, int64_t channel) const {
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(scale + channel));
    return _mm512_add_ps(scaled, _mm512_loadu_ps(bias + channel));
  }

  // A NaN stays one.
  __m512 bounded(__m512 x) const {
    return _mm512_min_ps(_mm512_set1_ps(top), _mm512_max_ps(_mm512_set1_ps(bottom), x));
  }

  void write(float* y, __m512i sum, int64_t channel, __mmask16 there) const {
    _mm512_mask_storeu_ps(y, there, bounded(level(sum, channel)));
  }

  __m512i code(__m512i sum, int64_t channel) const {
    const __m512 steps = _mm512_mul_ps(level(sum, channel), _mm512_set1_ps(inverse));
    const __m512i rounded = _mm512_cvtps_epi32(bounded(_mm512_add_ps(steps, _mm512_set1_ps(zero))));
    return _mm512_add_epi32(rounded, _mm512_set1_epi32(lowest));
  }

  void write(uint8_t* y, __m512i sum, int64_t channel, __mmask16 there) const {
    _mm_mask_storeu_epi8(y, there, _mm512_cvtepi32_epi8(code(sum, channel)));
  }
};

VNNI_END
#endif
