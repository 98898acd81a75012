// The levels of the formats (octav_fx/formats), and the formats of scales: for single floats and for vectors of them.
#pragma once
#include "lanes.h"

// What ops/cpu.py hands over of a Format. Levels and edges only where rounding is a search in the table.
struct Levels {
  // One of the three below.
  int kind;
  float least, greatest, steps;
  int mantissa_bits, least_exponent;
  int count;
  // [count], and [count - 1]: the greatest number that belongs to each level but the highest.
  const float *levels, *edges;
};

// Rounding to the nearest level, in steps.
struct Even {
  explicit Even(const Levels& of) : least(of.least), greatest(of.greatest) {}

  template <class T>
  T operator()(T ratio) const {
    return to_integer(larger(smaller(ratio, all<T>(greatest)), all<T>(least)));
  }

  float least, greatest;
};

// mantissa * 2^exponent; ties go to the even mantissa.
struct FloatingPoint {
  explicit FloatingPoint(const Levels& of)
      : least(of.least),
        greatest(of.greatest),
        smallest(float_of(uint32_t(127 + of.least_exponent) << 23)),
        share(float_of(uint32_t(127 - of.mantissa_bits) << 23)) {}

  template <class T>
  T operator()(T ratio) const {
    const T inside = larger(smaller(ratio, all<T>(greatest)), all<T>(least));
    const T power = from_bits<T>(as_bits(inside) & 0x7f800000);
    return to_multiple(inside, larger(power, all<T>(smallest)) * share);
  }

  float least, greatest, smallest, share;
};

struct Table {
  explicit Table(const Levels& of) : of(of) {}

  template <class T>
  T operator()(T ratio) const {
    T level = all<T>(of.levels[0]);
    for (int i = 1; i < of.count; i++) level = ratio > of.edges[i - 1] ? all<T>(of.levels[i]) : level;
    return level;
  }

  Levels of;
};

// run(the rounding of a format).
template <class Run>
void with_levels(const Levels& of, Run run) {
  switch (of.kind) {
    case 0: return run(Even(of));
    case 1: return run(FloatingPoint(of));
    case 2: return run(Table(of));
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
      case FLOAT16: return nearest(step, 10, -14, 65504.f);
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
