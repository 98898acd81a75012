// A percentile of the magnitudes, or the largest. clips/percentile.py is the definition.
#include <functional>

#include "rows.h"

namespace {

// How far below the last clip a value may lie and still be looked at: a percentile moves less between two steps.
constexpr float KEEP = 0.75f;

int64_t finite_of(const float* x, int64_t n) {
  int64_t finite = 0;
#pragma omp simd reduction(+ : finite)
  for (int64_t i = 0; i < n; i++) finite += std::fabs(x[i]) <= FLT_MAX;
  return finite;
}

template <bool SIGNED>
float percentile(const Row& row, float hint, int64_t one_in) {
  const int64_t beyond = one_in ? total<int64_t>(row, 1, finite_of) / one_in : 0;
  if (beyond == 0) return largest_of<SIGNED>(row);
  std::vector<float> kept;
  const auto keep = [&](float floor) {
    kept.clear();
    for (int64_t i = 0; i < row.chunks(); i++)
      row.chunk(i, [&](const float* x, int64_t n) {
        for (int64_t j = 0; j < n; j++)
          if (const float m = finite_magnitude<SIGNED>(x[j]); m >= floor) kept.push_back(m);
      });
  };
  keep(hint > 0 && hint <= FLT_MAX ? KEEP * hint : 0.f);
  if (int64_t(kept.size()) <= beyond) keep(0.f);
  std::nth_element(kept.begin(), kept.begin() + beyond, kept.end(), std::greater<float>());
  // Where so many values are zero the largest is the clip.
  return kept[beyond] > 0 ? kept[beyond] : *std::max_element(kept.begin(), kept.end());
}

}  // namespace

// x: [rows, n] contiguous, elements of a type. hint, clip: [rows]. one_in: so many values let one lie beyond the clip;
// 0: none does.
extern "C" void octav_percentile(const void* x, int type, int64_t rows, int64_t n, const float* hint, float* clip,
                                 int is_signed, int64_t one_in, int threads) {
  const auto run = is_signed ? percentile<true> : percentile<false>;
  each_row(x, type, rows, n, hint, clip, threads,
           [&](const Row& row, float near, int) { return run(row, near, one_in); });
}
