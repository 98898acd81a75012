// Grids of integers, and results in steps as their codes: formats/grid.py, ops/code_sum/reference.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

inline int lowest_code(int bits, int is_signed) { return is_signed ? -(1 << (bits - 1)) : 0; }

// What rounds a result in steps and saturates it, at the ends of a grid and of a clamp in the units of the result.
struct Saturation {
  // Counted from the lowest code, as results come and codes go.
  float bottom, top, zero;

  Saturation(float step, int bits, int is_signed, float low, float high) : zero(float(-lowest_code(bits, is_signed))) {
    const float greatest = float((1 << bits) - 1);
    bottom = std::min(std::max(std::nearbyint(low / step) + zero, 0.f), greatest);
    top = std::max(std::min(std::nearbyint(high / step) + zero, greatest), bottom);
  }

  // The bounds are whole numbers: what is between them is rounded to one between them.
  uint8_t operator()(float in_steps) const {
    const float raised = in_steps > bottom ? in_steps : bottom;
    return uint8_t(int(std::nearbyint(raised < top ? raised : top)));
  }
};
