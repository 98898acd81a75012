// The best of 100 clips by the true squared error. clips/mse.py is the definition; here a candidate is given up as soon
// as it is worse than the best so far, and the first to be tried is the one next to the last clip.
#include "rows.h"

namespace {

constexpr int POINTS = 100;
// After so many elements a candidate is compared with the best.
constexpr int64_t BETWEEN = 64 * CHUNK;
// The inverse of a smaller step is beyond float.
constexpr float LEAST_STEP = 1e-37f;

struct Range {
  double low, high;
};

// Sum of squared errors in units of the step, of which no square over- or underflows. On an unsigned grid a negative
// value costs the same at every clip, and is left out: it may be many times larger than the largest step.
template <bool SIGNED, class T>
double error_of(const float* x, int64_t n, double step, const Range& range) {
  const T inverse = T(1 / step), low = T(range.low), high = T(range.high);
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) {
    const T value = finite_magnitude<SIGNED>(x[i]) > 0 ? T(x[i]) * inverse : T(0);
    const T error = std::min(std::max(std::nearbyint(value), low), high) - value;
    sum += error * error;
  }
  return double(sum);
}

template <bool SIGNED>
float sweep(const Row& row, float hint, double steps, const Range& range, int threads) {
  const float largest = largest_of<SIGNED>(row);
  if (largest == 0) return 0;
  const auto clip_of = [&](int k) { return largest * (float(k) / float(POINTS)); };
  const double share = double(hint) / largest * POINTS;
  const int first = share >= 1 && share <= POINTS ? int(share) : POINTS / 2;
  int best = 0;
  double least = INFINITY;
  // first, first + 1, first - 1, first + 2, ...
  for (int i = 0; i < 2 * POINTS; i++) {
    const int k = i % 2 ? first + (i + 1) / 2 : first - i / 2;
    if (k < 1 || k > POINTS) continue;
    const double step = clip_of(k) / steps;
    const auto pass = step >= LEAST_STEP ? error_of<SIGNED, float> : error_of<SIGNED, double>;
    double error = 0;
    for (int64_t from = 0; from < row.size() && error <= least; from += BETWEEN) {
      const Row part = row.part(from, std::min(BETWEEN, row.size() - from));
      error += step * step *
               total<double>(part, threads, [&](const float* x, int64_t n) { return pass(x, n, step, range); });
    }
    if (error < least || (error == least && k < best)) best = k, least = error;
  }
  return clip_of(best);
}

}  // namespace

// x: [rows, n] contiguous, elements of a type. hint, clip: [rows].
extern "C" void octav_sweep(const void* x, int type, int64_t rows, int64_t n, const float* hint, float* clip, int bits,
                            int is_signed, int threads) {
  const double steps = double(1 << (is_signed ? bits - 1 : bits));
  const Range range{is_signed ? -steps : 0, steps - 1};
  const auto run = is_signed ? sweep<true> : sweep<false>;
  each_row(x, type, rows, n, hint, clip, threads,
           [&](const Row& row, float near, int of_row) { return run(row, near, steps, range, of_row); });
}
