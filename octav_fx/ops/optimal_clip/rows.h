// How the ways to a clip read the rows of a tensor.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../elements.h"

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

// A row of a tensor, contiguous, of any element type. What reads it sees floats, a chunk of them at a time.
class Row {
 public:
  Row(const void* x, int type, int64_t n) : x_(static_cast<const char*>(x)), type_(type), n_(n) {}

  int64_t size() const { return n_; }
  int64_t chunks() const { return (n_ + CHUNK - 1) / CHUNK; }

  // `count` elements from `at` on.
  Row part(int64_t at, int64_t count) const { return {x_ + at * bytes_of(type_), type_, count}; }

  // pass(floats, count) of chunk i. Half precision is converted into the first cache: a sum over it is to the bit that
  // over the same numbers in float.
  template <class Pass>
  auto chunk(int64_t i, Pass pass) const {
    const int64_t count = std::min(CHUNK, n_ - i * CHUNK);
    const void* x = x_ + i * CHUNK * bytes_of(type_);
    float room[CHUNK];
    return pass(type_ == FLOAT ? static_cast<const float*>(x) : converted(x, count, room), count);
  }

 private:
  const float* converted(const void* x, int64_t count, float* room) const {
    with_element(type_, [=](auto element) {
      const auto* elements = static_cast<const decltype(element)*>(x);
#pragma omp simd
      for (int64_t i = 0; i < count; i++) room[i] = to_float(elements[i]);
    });
    return room;
  }

  const char* x_;
  int type_;
  int64_t n_;
};

// 0 where nothing is finite, or positive on an unsigned grid.
template <bool SIGNED>
float largest_of(const Row& row) {
  float largest = 0;
  for (int64_t i = 0; i < row.chunks(); i++)
    largest = std::max(largest, row.chunk(i, [](const float* x, int64_t n) {
      float of_chunk = 0;
#pragma omp simd reduction(max : of_chunk)
      for (int64_t j = 0; j < n; j++) of_chunk = std::max(of_chunk, finite_magnitude<SIGNED>(x[j]));
      return of_chunk;
    }));
  return largest;
}

// The sum of pass(floats, count) over the chunks, in their order.
template <class Result, class Pass>
Result total(const Row& row, int threads, Pass pass) {
  const int64_t chunks = row.chunks();
  Result sum{};
  if (threads == 1 || row.size() < PARALLEL_FROM) {
    // No list of results: a weight has thousands of short rows, and allocating would take longer than adding.
    for (int64_t i = 0; i < chunks; i++) sum += row.chunk(i, pass);
    return sum;
  }
  std::vector<Result> results(chunks);
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < chunks; i++) results[i] = row.chunk(i, pass);
  for (const Result& result : results) sum += result;
  return sum;
}

// clip[i] = of_row(row, hint, threads) for each row of n elements of x, in parallel where there are several.
template <class OfRow>
void each_row(const void* x, int type, int64_t rows, int64_t n, const float* hint, float* clip, int threads,
              OfRow of_row) {
  const Row all(x, type, rows * n);
  if (rows == 1) {
    clip[0] = of_row(all, hint[0], threads);
    return;
  }
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * n >= PARALLEL_FROM)
  for (int64_t i = 0; i < rows; i++) clip[i] = of_row(all.part(i * n, n), hint[i], 1);
}
