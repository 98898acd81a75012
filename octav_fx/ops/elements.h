// The floating-point types of tensors, and how the passes read and write them: all arithmetic is in float.
#pragma once
#include <cstdint>
#include <cstring>

// Plain integer and float arithmetic, which every compiler vectorises. The instructions of some processors for it are no
// way around it: GCC 12 does not vectorise _Float16, and vcvtneps2bf16 takes subnormal numbers for zeros.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }

inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  // The exponents are apart by 127 - 15. Those of inf and NaN, all ones, by twice as much; subnormal numbers have none.
  const uint32_t rebias = uint32_t(127 - 15) << 23;
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00 ? 2 * rebias : rebias);
  const uint32_t subnormal = bits_of(float(int32_t(magnitude)) * 0x1p-24f);
  return float_of(sign | (magnitude < 0x400 ? subnormal : normal));
}

// The nearest number of a type, ties to even; NaN stays NaN.
template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bits_of(x), is_nan = (bits & 0x7fffffff) > 0x7f800000;
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {uint16_t(is_nan ? (bits >> 16) | 0x40 : rounded)};
}

template <>
inline Float16 from_float<Float16>(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const uint32_t rebias = uint32_t(127 - 15) << 23;
  const uint32_t normal = (magnitude - rebias + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // The distance of two floats from 1/2 on is that of subnormal numbers: adding 1/2 rounds.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t beyond = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  // From halfway between the largest number and the next, 65520, on; below the least normal one, 2^-14.
  const uint32_t finite = magnitude < bits_of(0x1p-14f) ? subnormal : normal;
  return {uint16_t(sign | (magnitude >= bits_of(65520.f) ? beyond : finite))};
}

// The greatest number of a type.
template <class T>
constexpr float GREATEST = 3.40282347e38f;
template <>
constexpr float GREATEST<BFloat16> = 0x1.fep127f;
template <>
constexpr float GREATEST<Float16> = 65504.f;

// The nearest finite number of a type to a level; NaN where that is.
template <class T>
inline float representable(float level) {
  const float above = level > GREATEST<T> ? GREATEST<T> : level;
  return above < -GREATEST<T> ? -GREATEST<T> : above;
}

// Codes of the types, those of ops/cpu.py. with_element calls run(an element) of the type with a code.
constexpr int FLOAT = 0;

template <class Run>
void with_element(int type, Run run) {
  switch (type) {
    case FLOAT: return run(float{});
    case 1: return run(BFloat16{});
    case 2: return run(Float16{});
  }
}

// Calls run(an element of the first type, one of the second).
template <class Run>
void with_elements(int first, int second, Run run) {
  with_element(first, [=](auto a) { with_element(second, [=](auto b) { run(a, b); }); });
}

inline int64_t bytes_of(int type) { return type == FLOAT ? sizeof(float) : sizeof(uint16_t); }
