// Grids of integers, and results in steps as their codes: formats/grid.py, ops/code_sum/reference.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

inline int lowest_code(int bits, int is_signed) { return is_signed ? -(1 << (bits - 1)) : 0; }

// What rounds a result in steps and saturates it, at the ends of a grid and of a clamp in the units of the result.
struct Saturation {
  float bottom, top;
  int zero;

  Saturation(float step, int bits, int is_signed, float low, float high) : zero(-lowest_code(bits, is_signed)) {
    const float least = float(-zero), greatest = float((1 << bits) - 1 - zero);
    bottom = std::min(std::max(std::nearbyint(low / step), least), greatest);
    top = std::max(std::min(std::nearbyint(high / step), greatest), bottom);
  }

  // Counted from the lowest code.
  uint8_t operator()(float in_steps) const {
    const float nearest = std::nearbyint(in_steps);
    const float raised = nearest > bottom ? nearest : bottom;
    return uint8_t(int(raised < top ? raised : top) + zero);
  }
};
