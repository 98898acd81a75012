// How the elementwise passes walk through memory.
#pragma once
#include <algorithm>
#include <cstdint>

constexpr int64_t BLOCK = 1 << 14;

// Calls pass(first element, count, channel) for stretches that share one channel, in parallel.
template <class Pass>
void stretches(int64_t outer, int64_t channels, int64_t inner, int threads, Pass pass) {
  const int64_t blocks = (inner + BLOCK - 1) / BLOCK, total = outer * channels * blocks;
#pragma omp parallel for num_threads(threads) if (threads > 1 && outer * channels * inner >= 4 * BLOCK)
  for (int64_t i = 0; i < total; i++) {
    // Rows are short and many: for them no division.
    const int64_t stretch = blocks == 1 ? i : i / blocks, at = (i - stretch * blocks) * BLOCK;
    pass(stretch * inner + at, std::min(BLOCK, inner - at), outer == 1 ? stretch : stretch % channels);
  }
}
