// How the ways to a clip read the rows of a tensor.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

// Sums run in float over a chunk, whose partial results are then added in double and in order: the result does not
// depend on the number of threads.
constexpr int64_t CHUNK = 1024;
constexpr int64_t PARALLEL_FROM = 1 << 16;

template <bool SIGNED>
inline float magnitude(float x) {
  return SIGNED ? std::fabs(x) : x;
}

template <bool SIGNED>
inline float finite_magnitude(float x) {
  const float m = magnitude<SIGNED>(x);
  return m > 0 && m <= FLT_MAX ? m : 0.f;
}

// 0 where nothing is finite, or positive on an unsigned grid.
template <bool SIGNED>
float largest_of(const float* x, int64_t n) {
  float largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; i++) largest = std::max(largest, finite_magnitude<SIGNED>(x[i]));
  return largest;
}

// The sum of pass(first element, count) over the chunks, in their order.
template <class Result, class Pass>
Result total(int64_t n, int threads, Pass pass) {
  const int64_t parts = (n + CHUNK - 1) / CHUNK;
  const auto part = [&](int64_t i) { return pass(i * CHUNK, std::min(CHUNK, n - i * CHUNK)); };
  Result sum{};
  if (threads == 1 || n < PARALLEL_FROM) {
    // No list of results: a weight has thousands of short rows, and allocating would take longer than adding.
    for (int64_t i = 0; i < parts; i++) sum += part(i);
    return sum;
  }
  std::vector<Result> results(parts);
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < parts; i++) results[i] = part(i);
  for (const Result& result : results) sum += result;
  return sum;
}

// clip[row] = of_row(row's first element, hint, threads), rows in parallel where there are several.
template <class OfRow>
void each_row(const float* x, int64_t rows, int64_t n, const float* hint, float* clip, int threads, OfRow of_row) {
  if (rows == 1) {
    clip[0] = of_row(x, hint[0], threads);
    return;
  }
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * n >= PARALLEL_FROM)
  for (int64_t row = 0; row < rows; row++) clip[row] = of_row(x + row * n, hint[row], 1);
}
