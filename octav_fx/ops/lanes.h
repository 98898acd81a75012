// Vectors of floats as the processor has them, and arithmetic on them and on single floats alike.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "elements.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// An extension that GCC and Clang share; comparisons give masks, and ?: picks by them.
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(float))));

template <class T>
struct IntegersOf;
template <>
struct IntegersOf<float> {
  using type = int32_t;
};
template <>
struct IntegersOf<Lanes> {
  using type = Integers;
};

template <class T>
inline T all(float x) {
  // Not added: -0 and 0 would be 0, and a compiler would have to add.
  return x - T{};
}

// The first of equal ones, and of zeros; NaN where a is.
template <class T>
inline T smaller(T a, T b) {
  return b < a ? b : a;
}

template <class T>
inline T larger(T a, T b) {
  return a < b ? b : a;
}

template <class T>
inline typename IntegersOf<T>::type as_bits(T x) {
  typename IntegersOf<T>::type bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <class T>
inline T from_bits(typename IntegersOf<T>::type bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <class T>
inline T magnitude_of(T x) {
  return from_bits<T>(as_bits(x) & 0x7fffffff);
}

// The sum of x and a number so large that it has no places behind the point left: the nearest multiple of unit, a power
// of two, ties to even. For |x| < 2^22 * unit.
template <class T>
inline T to_multiple(T x, T unit) {
  const T large = unit * 0x1.8p23f;
  return (x + large) - large;
}

// Ties to even. For |x| < 2^22.
inline float to_integer(float x) { return std::nearbyint(x); }

inline Lanes to_integer(Lanes x) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (Lanes)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return to_multiple(x, all<Lanes>(1));
#endif
}

inline Lanes load(const float* x) {
  Lanes value;
  std::memcpy(&value, x, sizeof value);
  return value;
}

template <class X>
inline Lanes load(const X* x) {
  float room[LANES];
#pragma omp simd
  for (int i = 0; i < LANES; i++) room[i] = to_float(x[i]);
  return load(room);
}

inline void save(Lanes value, float* x) { std::memcpy(x, &value, sizeof value); }

#if defined(__AVX2__)
// In every lane the element of a table of LANES that stands at its place.
inline Lanes entry(const float* table, Integers place) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_permutexvar_ps((__m512i)place, (__m512)load(table));
#else
  return (Lanes)_mm256_permutevar8x32_ps((__m256)load(table), (__m256i)place);
#endif
}

// The same of sixteen integers from 0 to 127; of a place the last four bits count.
inline Integers entry_of_16(const int32_t* table, Integers place) {
#if defined(__AVX512F__)
  return (Integers)_mm512_permutexvar_epi32((__m512i)place, _mm512_loadu_si512(table));
#else
  // As bytes they are one half of a vector, and one shuffle finds them. A byte of a place that is negative gives zero.
  const auto part = [=](int i) { return _mm_loadu_si128((const __m128i*)table + i); };
  const __m128i bytes = _mm_packs_epi16(_mm_packs_epi32(part(0), part(1)), _mm_packs_epi32(part(2), part(3)));
  const Integers last = (place & 15) | int32_t(0x80808000);
  return (Integers)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), (__m256i)last);
#endif
}
#endif

#if defined(__AVX512F__)
// The same of thirty-two integers; of a place the last five bits count.
inline Integers entry(const int32_t* table, Integers place) {
  const __m512i first = _mm512_loadu_si512(table), second = _mm512_loadu_si512(table + LANES);
  return (Integers)_mm512_permutex2var_epi32(first, (__m512i)place, second);
}
#endif

// a[FROM], b[FROM], a[FROM + 1], b[FROM + 1], ..
template <int FROM>
inline Lanes zipped(Lanes a, Lanes b) {
#if defined(__clang__)
  Lanes both;
  for (int i = 0; i < LANES / 2; i++) both[2 * i] = a[FROM + i], both[2 * i + 1] = b[FROM + i];
  return both;
#else
  // What Clang makes of the loop, GCC has to be told.
  Integers from;
  for (int i = 0; i < LANES / 2; i++) from[2 * i] = FROM + i, from[2 * i + 1] = LANES + FROM + i;
  return __builtin_shuffle(a, b, from);
#endif
}

// Element j of vector i becomes element i of vector j: LANES vectors, shuffled like cards until all are dealt.
inline void transpose(Lanes* x) {
  for (int round = 1; round < LANES; round *= 2) {
    Lanes dealt[LANES];
    for (int i = 0; i < LANES / 2; i++) {
      dealt[2 * i] = zipped<0>(x[i], x[i + LANES / 2]);
      dealt[2 * i + 1] = zipped<LANES / 2>(x[i], x[i + LANES / 2]);
    }
    for (int i = 0; i < LANES; i++) x[i] = dealt[i];
  }
}
