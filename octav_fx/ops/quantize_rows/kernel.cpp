// Clips that clip nothing, and rows rounded to them. reference.py is the definition, equal bit for bit. Rows whose clips
// are searched for are rounded by the search: ops/optimal_clip/search.cpp.
#include <algorithm>

#include "../optimal_clip/rows.h"
#include "../rounding.h"

namespace {

// Elements of the rows that are gone through at once: the nearest cache holds them.
constexpr int64_t AT_ONCE = 1 << 12;

}  // namespace

void Rounding::operator()(const void* x, int type, int64_t n, const float* clip, const Levels& of, int64_t first,
                          int64_t rows) const {
  const auto each = [=](const auto* from, auto* to, auto pass) {
    for (int64_t row = first; row < first + rows; row++) pass(from + row * n, clip + row, to + row * n);
  };
  with_element(type, [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(x);
    with_levels(of, [&](auto round) {
      const auto codes = [&](auto* to) {
        each(from, to, [&](auto* x, auto* clip, auto* out) { to_codes<0>(x, clip, out, n, of, round, ceiling); });
      };
      if (code_bytes == 1) return codes(static_cast<int8_t*>(out));
      if (code_bytes == 2) return codes(static_cast<int16_t*>(out));
      with_element(out_type, [&](auto level) {
        each(from, static_cast<decltype(level)*>(out),
             [&](auto* x, auto* clip, auto* out) { to_levels<0>(x, clip, of.steps, out, n, round); });
      });
    });
  });
}

// x: [rows, n] contiguous, elements of a type. clip: [rows]. scale, unit: of Scale.
extern "C" void octav_round_unclipped(const void* x, int type, int64_t rows, int64_t n, float* clip, const Levels* of,
                                      int scale, float unit, const Rounding* rounding, int threads) {
  const Row all(x, type, rows * n);
  const Scale stored{scale, unit};
  const auto largest = of->least < 0 ? largest_of<true> : largest_of<false>;
  const int64_t at_once = std::max<int64_t>(AT_ONCE / n, 1), blocks = (rows + at_once - 1) / at_once;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * n >= PARALLEL_FROM)
  for (int64_t i = 0; i < blocks; i++) {
    const int64_t first = i * at_once, count = std::min(at_once, rows - first);
    for (int64_t row = first; row < first + count; row++) {
      const float found = largest(all.part(row * n, n));
      clip[row] = scale == Scale::FLOAT32 ? found : std::min(stored(found / of->steps) * of->steps, FLT_MAX);
    }
    (*rounding)(x, type, n, clip, *of, first, count);
  }
}
