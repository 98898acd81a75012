// How the elementwise passes walk through memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

constexpr int64_t BLOCK = 1 << 14;

// Calls pass(row, first element in it, count) for the pieces of rows, in parallel.
template <class Pass>
void pieces(int64_t rows, int64_t length, int threads, Pass pass) {
  const int64_t blocks = (length + BLOCK - 1) / BLOCK, total = rows * blocks;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * length >= 4 * BLOCK)
  for (int64_t i = 0; i < total; i++) {
    // Rows are short and many: for them no division.
    const int64_t row = blocks == 1 ? i : i / blocks, at = (i - row * blocks) * BLOCK;
    pass(row, at, std::min(BLOCK, length - at));
  }
}

// Calls pass(first element, count) for the stretches of n elements.
template <class Pass>
void stretches(int64_t n, int threads, Pass pass) {
  pieces(1, n, threads, [=](int64_t, int64_t at, int64_t count) { pass(at, count); });
}

// Of [outer, channels, inner]: calls pass(first element, count, channel, each), where element i of the stretch is of the
// channel with index channel + each * i. each is a constant: 0, or 1 where channels lie side by side, as in weights
// [in, out]; to call pass for every element of those takes 25 times as long.
template <class Pass>
void channel_stretches(int64_t outer, int64_t channels, int64_t inner, int threads, Pass pass) {
  if (inner == 1 && channels > 1)
    pieces(outer, channels, threads, [=](int64_t row, int64_t at, int64_t count) {
      pass(row * channels + at, count, at, std::integral_constant<int, 1>{});
    });
  else
    pieces(outer * channels, inner, threads, [=](int64_t row, int64_t at, int64_t count) {
      pass(row * inner + at, count, outer == 1 ? row : row % channels, std::integral_constant<int, 0>{});
    });
}
