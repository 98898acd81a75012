// The levels of the formats (octav_fx/formats), and the formats of scales: for single floats and for vectors of them.
#pragma once
#include <algorithm>
#include <cmath>
#include <utility>

#include "lanes.h"

// What ops/levels.py hands over of a Format.
struct Levels {
  // Which of the roundings below.
  int kind;
  float least, greatest, steps;
  // The codes of the lowest and of the highest level.
  int low, high;
  int mantissa_bits, least_exponent;
  // [high - low + 1], but for even levels; where rounding is a search in them, the greatest number that belongs to each
  // but the highest.
  const float *levels, *edges;
};

// Each rounds a ratio x / step to the nearest level, in steps; code() is the code of a level that it returned, and
// level() the level of a code. Loops over elements take them by value: of what lies elsewhere compilers make no vectors.
// MIRRORED: whether levels below zero are those above it, so that magnitudes say it all. nearest() rounds them where they
// do, and inside() what does not lie beyond the levels; of a zero either returns one with any sign.
struct Even {
  static constexpr bool MIRRORED = false;

  explicit Even(const Levels& of) : least(of.least), greatest(of.greatest) {}

  template <class T>
  T operator()(T ratio) const {
    // Rounded first: what rounds to -0 stays that.
    return smaller(larger(to_integer(ratio), all<T>(least)), all<T>(greatest));
  }

  template <class T>
  T nearest(T ratio) const {
    return (*this)(ratio);
  }

  template <class T>
  T inside(T ratio) const {
    return to_integer(ratio);
  }

  int code(float level) const { return int(level); }

  float level(int code) const { return float(code); }

  float least, greatest;
};

// mantissa * 2^exponent; ties go to the even mantissa.
struct FloatingPoint {
  static constexpr bool MIRRORED = true;

  explicit FloatingPoint(const Levels& of)
      : greatest(of.greatest),
        smallest(float_of(uint32_t(127 + of.least_exponent) << 23)),
        places(float_of(uint32_t(127 + of.mantissa_bits - of.least_exponent) << 23)),
        mantissa_bits(of.mantissa_bits),
        levels(of.levels - of.low) {}

  template <class T>
  T operator()(T ratio) const {
    const T level = nearest(magnitude_of(ratio));
    // What rounds to -0 stays that.
    return from_bits<T>(as_bits(level) | (as_bits(ratio) & int32_t(0x80000000)));
  }

  template <class T>
  T nearest(T magnitude) const {
    return inside(smaller(magnitude, all<T>(greatest)));
  }

  // As to_multiple, whose large number is made of the exponent.
  template <class T>
  T inside(T magnitude) const {
    const auto power = larger(as_bits(magnitude) & 0x7f800000, as_bits(all<T>(smallest)));
    const T large = from_bits<T>(power + (((23 - mantissa_bits) << 23) | 0x400000));
    return (magnitude + large) - large;
  }

  int code(float level) const {
    const float magnitude = magnitude_of(level);
    // The place of the leading bit and the bits behind it, counted from the least normal level.
    const int normal = int((bits_of(magnitude) - bits_of(smallest)) >> (23 - mantissa_bits)) + (1 << mantissa_bits);
    const int place = magnitude < smallest ? int(magnitude * places) : normal;
    return level < 0 ? -place : place;
  }

  float level(int code) const { return levels[code]; }

  float greatest, smallest, places;
  int mantissa_bits;
  const float* levels;
};

// Up to SIZE levels, looked for one by one: no loop, for of that compilers make no vectors. Sixteen levels are as many as
// some vectors hold: there each lane halves the edges that are left four times.
template <int SIZE>
struct Table {
  static constexpr bool MIRRORED = false;

  explicit Table(const Levels& of) : low(of.low) {
    std::fill(levels, levels + SIZE, INFINITY), std::fill(edges, edges + SIZE, INFINITY);
    std::copy(of.levels, of.levels + of.high - of.low + 1, levels);
    std::copy(of.edges, of.edges + of.high - of.low, edges);
  }

  template <class T>
  T operator()(T ratio) const {
#if defined(__AVX512F__)
    if constexpr (SIZE == LANES && sizeof(T) == sizeof(Lanes)) {
      Integers below = (ratio > edges[7]) & 8;
      for (int half = 4; half; half /= 2) below += (ratio > entry(edges, below + (half - 1))) & half;
      return entry(levels, below);
    }
#endif
    return picked(ratio, std::make_integer_sequence<int, SIZE - 1>());
  }

  template <class T>
  T nearest(T ratio) const {
    return (*this)(ratio);
  }

  template <class T>
  T inside(T ratio) const {
    return (*this)(ratio);
  }

  int code(float level) const { return low + below(level, std::make_integer_sequence<int, SIZE>()); }

  float level(int code) const { return levels[code - low]; }

  float levels[SIZE], edges[SIZE];
  int low;

 private:
  template <class T, int... I>
  T picked(T ratio, std::integer_sequence<int, I...>) const {
    T level = all<T>(levels[0]);
    ((level = ratio > edges[I] ? all<T>(levels[I + 1]) : level), ...);
    return level;
  }

  template <int... I>
  int below(float level, std::integer_sequence<int, I...>) const {
    return (int(level > levels[I]) + ...);
  }
};

#if defined(__AVX512F__)
// Sixteen levels of which no two edges lie in one of PARTS equal parts (is_divided): the part that a ratio is in says how
// many edges are below it but for one, which is compared. Half as many instructions as halving.
struct DividedTable : Table<16> {
  static constexpr int PARTS = 32;

  explicit DividedTable(const Levels& of) : Table<16>(of), least(of.least), greatest(of.greatest) {
    // The greatest magnitude lies in the last part, or in the first.
    per_step = (PARTS / 2 - 0.6f) / std::max(-least, greatest);
    const int count = of.high - of.low;
    int below = 0;
    for (int part = -PARTS / 2; part < PARTS / 2; part++) {
      starts[part & (PARTS - 1)] = below;
      const int first = below;
      // Rounding moves what lies at the end of a part into the next.
      while (below < count && edges[below] * per_step < part + 0.499f) below++;
      is_divided &= below - first <= 1 && (below == count || edges[below] * per_step > part + 0.501f);
    }
  }

  Lanes nearest(Lanes ratio) const { return inside(smaller(larger(ratio, all<Lanes>(least)), all<Lanes>(greatest))); }

  Lanes inside(Lanes ratio) const {
    // As to_multiple: the nearest integer is in the last bits.
    const Integers below = entry(starts, as_bits(ratio * per_step + 0x1.8p23f));
    return entry(levels, below - (ratio > entry(edges, below)));
  }

  bool is_divided = true;
  float least, greatest, per_step;
  int32_t starts[PARTS];
};
#endif

#if defined(__AVX2__)
// Eight magnitudes whose negatives are the levels below zero, no two edges in one half of an octave (is_mirrored). As
// DividedTable: the bits of a magnitude are the place of its part.
struct MirroredTable {
  static constexpr bool MIRRORED = true;
  static constexpr int SIZE = 8, PARTS = 16, SHIFT = 22;

  explicit MirroredTable(const Levels& of) : greatest(of.greatest), is_mirrored(of.low == -of.high && of.high < SIZE) {
    std::fill(levels, levels + LANES, INFINITY), std::fill(edges, edges + LANES, INFINITY);
    if (!is_mirrored) return;
    const float *from = of.levels - of.low, *from_edges = of.edges - of.low;
    for (int i = 0; i <= of.high; i++) is_mirrored &= from[-i] == -from[i];
    std::copy(from, from + of.high + 1, levels), std::copy(from_edges, from_edges + of.high, edges);
    const int first = part_of(edges[0]);
    smallest = float_of(uint32_t(first) << SHIFT);
    is_mirrored &= part_of(greatest) < first + PARTS - 1;
    for (int part = first, below = 0; part < first + PARTS; part++) {
      starts[part & (PARTS - 1)] = below;
      const bool is_there = below < of.high && part_of(edges[below]) == part;
      below += is_there;
      is_mirrored &= below == of.high || part_of(edges[below]) > part;
    }
  }

  Lanes nearest(Lanes magnitude) const { return inside(smaller(magnitude, all<Lanes>(greatest))); }

  Lanes inside(Lanes magnitude) const {
    const Integers below = entry_of_16(starts, as_bits(larger(magnitude, all<Lanes>(smallest))) >> SHIFT);
    return entry(levels, below - (magnitude > entry(edges, below)));
  }

  float greatest, smallest, levels[LANES], edges[LANES];
  int32_t starts[PARTS];
  bool is_mirrored;

 private:
  static int part_of(float magnitude) { return int(bits_of(magnitude) >> SHIFT); }
};
#endif

// run(the rounding of a format).
template <class Run>
void with_levels(const Levels& of, Run run) {
  switch (of.kind) {
    case 0: return run(Even(of));
    case 1: return run(FloatingPoint(of));
    case 2: return run(Table<4>(of));
    case 3: return run(Table<16>(of));
  }
}

// The nearest number of a format of scales to a positive step; formats/scales.py is the definition.
struct Scale {
  // The codes of ops/cpu.py.
  enum Kind { FLOAT32, BFLOAT16, FLOAT16, E8M0, E4M3 };
  int kind;
  // The float32 scale of the tensor.
  float unit;

  template <class T>
  T operator()(T step) const {
    switch (kind) {
      case BFLOAT16: {
        const auto bits = as_bits(step);
        return from_bits<T>((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000);
      }
      case FLOAT16: return step > 0 ? larger(nearest(step, 10, -14, 65504.f), all<T>(0x1p-24f)) : T{};
      case E8M0: return power_of_two(step);
      case E4M3: {
        const T ratio = unit > 0 ? step / unit : T{};
        return step > 0 ? larger(nearest(ratio, 3, -6, 448.f), all<T>(0x1p-9f)) * unit : T{};
      }
    }
    return step;
  }

 private:
  template <class T>
  static T nearest(T step, int mantissa_bits, int least_exponent, float greatest) {
    Levels of{};
    of.greatest = greatest, of.mantissa_bits = mantissa_bits, of.least_exponent = least_exponent;
    return FloatingPoint(of)(step);
  }

  // 1.5 is half-way between 1 and 2.
  template <class T>
  static T power_of_two(T step) {
    const T power = from_bits<T>((as_bits(step) + 0x400000) & 0x7f800000);
    const T small = step < 0x1.8p-127f ? all<T>(0x1p-127f) : all<T>(0x1p-126f);
    const T stored = smaller(step < 0x1p-126f ? small : power, all<T>(0x1p127f));
    return step > 0 ? stored : T{};
  }
};
