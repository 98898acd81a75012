// The fixed point of both recursions over rows of floats. clips/newton.py is the definition; the bracket and the
// restart are the same, but here the iteration stops when it stands still: on a CPU that costs no synchronisation.
#include <type_traits>

#include "rows.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int MAX_STEPS = 64;
// Shorter rows stay in the nearest cache, where reading all of them again is as fast.
constexpr int64_t GATHERED_FROM = 1 << 13;
// What a thread keeps allocated of gathered values between two calls, 4 MB.
constexpr size_t MOST_KEPT = 1 << 20;

struct Sums {
  double numerator = 0, denominator = 0;
  void operator+=(const Sums& other) { numerator += other.numerator, denominator += other.denominator; }
};
struct Start {
  double sum = 0;
  int64_t count = 0;
  void operator+=(const Start& other) { sum += other.sum, count += other.count; }
};
struct Grid {
  double steps, noise, k;
};

// FINITE: leave out infinities. NaN fails every comparison by itself.
template <bool FINITE>
inline bool takes_part(float m) {
  return FINITE ? m > 0 && m <= FLT_MAX : m > 0;
}

// Sums of FINITE passes run in double: they are the second try, after sums that went beyond float.
template <bool FINITE>
using Sum = std::conditional_t<FINITE, double, float>;

template <bool SIGNED, bool FINITE>
Start start_of(const float* x, int64_t n) {
  Sum<FINITE> sum = 0;
  int32_t count = 0;
#pragma omp simd reduction(+ : sum, count)
  for (int64_t i = 0; i < n; i++) {
    const float m = magnitude<SIGNED>(x[i]);
    const bool part = takes_part<FINITE>(m);
    sum += part ? m : 0.f;
    count += part;
  }
  return {sum, count};
}

// arXiv 2206.06501, eq. 6. `nonzero` of the chunk is not known here: the caller adds noise * nonzero.
template <bool SIGNED, bool FINITE>
Sums octav_step(const float* x, int64_t n, float clip, const Grid& grid) {
  Sum<FINITE> sum = 0;
  int32_t count = 0;
#pragma omp simd reduction(+ : sum, count)
  for (int64_t i = 0; i < n; i++) {
    const float m = magnitude<SIGNED>(x[i]);
    const bool clipped = FINITE ? m >= clip && m <= FLT_MAX : m >= clip;
    sum += clipped ? m : 0.f;
    count += clipped;
  }
  return {sum, (1 - grid.noise) * count};
}

template <bool SIGNED, bool FINITE>
Sums octav_grid_step(const float* x, int64_t n, float clip, const Grid& grid) {
  const float top = float(grid.k * clip), step = float(clip / grid.steps);
  const float quarter = step / 4, half = step / 2, three_quarters = step * 3 / 4;
  Sum<FINITE> sum_above = 0, sum_below = 0;
  int32_t count_above = 0, count_below = 0, noisy = 0;
#pragma omp simd reduction(+ : sum_above, sum_below, count_above, count_below, noisy)
  for (int64_t i = 0; i < n; i++) {
    const float m = magnitude<SIGNED>(x[i]);
    const bool finite = FINITE ? m <= FLT_MAX : true;
    const bool above = finite & (x[i] >= top);
    const bool below = SIGNED ? finite & (x[i] <= -clip) : false;
    sum_above += above ? m : 0.f;
    count_above += above;
    sum_below += below ? m : 0.f;
    count_below += below;
    noisy += int(finite & (m > half) & !above & !below) + int((m > quarter) & (m <= three_quarters));
  }
  return {sum_below + grid.k * sum_above, grid.noise * noisy + count_below + grid.k * grid.k * count_above};
}

struct Errors {
  double error = 0, power = 0;
  void operator+=(const Errors& other) { error += other.error, power += other.power; }
};

// Squared error on the grid of a clip, and the sum of squares.
template <bool SIGNED, bool FINITE>
Errors error_of(const float* x, int64_t n, float clip, const Grid& grid) {
  const float step = float(clip / grid.steps), bottom = SIGNED ? -float(grid.steps) : 0.f, top = float(grid.steps) - 1;
  Sum<FINITE> sum = 0, power = 0;
#pragma omp simd reduction(+ : sum, power)
  for (int64_t i = 0; i < n; i++) {
    const bool finite = std::fabs(x[i]) <= FLT_MAX;
    const float code = std::min(std::max(std::nearbyint(x[i] / step), bottom), top);
    const Sum<FINITE> error = finite ? code * step - x[i] : 0.f, value = finite ? x[i] : 0.f;
    sum += error * error;
    power += value * value;
  }
  return {sum, power};
}

// Of a row with a greater sum of squares float holds those of errors: they are 2**-20 of it at 8 bits.
constexpr double LEAST_POWER = 1e-30;

// The best of the neighbours of a fixed point, itself if none is better. The constants are those of clips/newton.py.
template <bool SIGNED, bool FINITE>
float polish(const Row& row, float clip, const Grid& grid, int threads) {
  float best = clip;
  double least = INFINITY;
  for (const int i : {0, -4, -3, -2, -1, 1, 2, 3, 4}) {
    const float candidate = i == 0 ? clip : float(clip * std::pow(1.25, i / 4.0));
    const Errors errors = total<Errors>(row, threads, [&](const float* x, int64_t n) {
      return error_of<SIGNED, FINITE>(x, n, candidate, grid);
    });
    // Squares of small values go below float as those of large ones go beyond it.
    if (!FINITE && !(std::isfinite(errors.error) && std::isfinite(errors.power) && errors.power > LEAST_POWER))
      return polish<SIGNED, true>(row, clip, grid, threads);
    if (i == 0 || errors.error < 0.999 * least - 1e-12 * errors.power) least = errors.error, best = candidate;
  }
  return best;
}

// The values of a long row from a floor upwards: all that steps of the paper's recursion ask about at clips above it. One
// pass over the row gathers them, near a good hint a few per cent; each step then reads only those.
template <bool SIGNED, bool FINITE>
class Tail {
 public:
  Tail(const Row& row, int threads, std::vector<std::vector<float>>& parts)
      : row_(row), threads_(row.size() < PARALLEL_FROM ? 1 : threads), parts_(parts) {
    if (int(parts_.size()) < threads_) parts_.resize(threads_);
    sizes_.resize(threads_);
  }

  ~Tail() {
    for (std::vector<float>& values : parts_)
      if (values.size() > MOST_KEPT) std::vector<float>().swap(values);
  }

  // Gathers from `floor` upwards, and returns what start_of returns for the row.
  Start gather(float floor) {
    floor_ = floor;
    const int64_t chunks = row_.chunks();
    std::vector<Start> starts(threads_);
#pragma omp parallel for num_threads(threads_) if (threads_ > 1)
    for (int part = 0; part < threads_; part++) {
      std::vector<float>& values = parts_[part];
      int64_t size = 0;
      for (int64_t i = chunks * part / threads_; i < chunks * (part + 1) / threads_; i++) {
        // Room for a whole chunk, and for the store of a whole vector behind it.
        if (int64_t(values.size()) < size + CHUNK + 16) values.resize(2 * values.size() + CHUNK + 16);
        starts[part] += row_.chunk(
            i, [&](const float* x, int64_t n) { return append(x, n, floor, values.data(), size); });
      }
      sizes_[part] = size;
    }
    Start start;
    for (const Start& of_part : starts) start += of_part;
    return start;
  }

  // One step at a clip; the caller adds noise * nonzero. In double the sums of floats that are at most 2^29 / count
  // apart are exact: they depend neither on the hint, which chose the floor, nor on the number of threads.
  Sums step(float clip, const Grid& grid) {
    if (!(clip >= floor_)) gather(KEEP * clip);
    double sum = 0;
    int64_t count = 0;
#pragma omp parallel for num_threads(threads_) reduction(+ : sum, count) if (threads_ > 1)
    for (int part = 0; part < threads_; part++) {
      const float* values = parts_[part].data();
      const int64_t size = sizes_[part];
#pragma omp simd reduction(+ : sum, count)
      for (int64_t i = 0; i < size; i++) {
        const bool clipped = values[i] >= clip;
        sum += clipped ? double(values[i]) : 0.;
        count += clipped;
      }
    }
    return {sum, (1 - grid.noise) * double(count)};
  }

  // How far below a hint the floor lies: further down than the fixed point usually moves between two steps of training.
  static constexpr float KEEP = 0.75f;

 private:
  static Start append(const float* x, int64_t n, float floor, float* values, int64_t& size) {
    Sum<FINITE> sum = 0;
    int32_t count = 0;
    int64_t i = 0;
#ifdef __AVX512F__
    if constexpr (!FINITE) {
      const __m512 zero = _mm512_setzero_ps(), least = _mm512_set1_ps(floor);
      __m512 sums = zero;
      for (; i + 16 <= n; i += 16) {
        const __m512 value = _mm512_loadu_ps(x + i), m = SIGNED ? _mm512_abs_ps(value) : value;
        const __mmask16 part = _mm512_cmp_ps_mask(m, zero, _CMP_GT_OQ), kept = _mm512_cmp_ps_mask(m, least, _CMP_GE_OQ);
        sums = _mm512_mask_add_ps(sums, part, sums, m);
        count += __builtin_popcount(part);
        // Through a register: compressing straight into memory takes a hundred cycles on some processors.
        _mm512_storeu_ps(values + size, _mm512_maskz_compress_ps(kept, m));
        size += __builtin_popcount(kept);
      }
      sum = _mm512_reduce_add_ps(sums);
    }
#endif
    for (; i < n; i++) {
      const float m = magnitude<SIGNED>(x[i]);
      const bool part = takes_part<FINITE>(m);
      sum += part ? m : 0.f;
      count += part;
      values[size] = m;
      size += part && m >= floor;
    }
    return {sum, count};
  }

  Row row_;
  int threads_;
  float floor_ = INFINITY;
  // By thread, in the order of the row. The memory is the caller's.
  std::vector<std::vector<float>>& parts_;
  std::vector<int64_t> sizes_;
};

// The fixed point of a recursion, step(clip) being the two sums whose ratio is the next clip.
template <class Step>
float newton(float clip, float mean, Step step) {
  float low = 0, high = INFINITY;
  for (int i = 0; i < MAX_STEPS; i++) {
    const Sums sums = step(clip);
    const float target = sums.numerator > 0 ? float(std::min(sums.numerator / sums.denominator, double(FLT_MAX))) : 0.f;
    if (target == clip) break;
    (target > clip ? low : high) = clip;
    if (target > low && target < high) {
      clip = target;
    } else if (sums.numerator == 0 && mean > low && mean < high) {
      clip = mean;
    } else {
      // The crossing lies at a value of x, where the counts jump. Its lower side is the clip: the greatest number that
      // its own step does not lower, whichever way the bracket was found.
      const float middle = low + (high - low) / 2;
      clip = middle;
      if (middle == low || middle == high) {
        clip = low > 0 ? low : high;
        break;
      }
    }
  }
  return clip;
}

template <bool SIGNED, bool ON_GRID, bool FINITE>
float solve(const Row& row, float hint, const Grid& grid, int threads) {
  const bool positive = hint > 0 && hint <= FLT_MAX, gathers = !ON_GRID && row.size() >= GATHERED_FROM;
  // Kept from call to call: pages that are mapped already cost less than those that malloc would fetch.
  static thread_local std::vector<std::vector<float>> parts;
  Tail<SIGNED, FINITE> tail(gathers ? row : row.part(0, 0), threads, parts);
  const Start start =
      gathers && positive
          ? tail.gather(hint * tail.KEEP)
          : total<Start>(row, threads, [](const float* x, int64_t n) { return start_of<SIGNED, FINITE>(x, n); });
  // An infinity, or sums beyond float: again, without the values that cannot take part.
  if (!FINITE && !std::isfinite(start.sum)) return solve<SIGNED, ON_GRID, true>(row, hint, grid, threads);
  if (start.count == 0) return 0;
  const float mean = float(start.sum / double(start.count));
  const bool usable = positive && (!ON_GRID || hint / grid.steps / 2 <= mean);
  const float clip = newton(usable ? hint : mean, mean, [&](float at_clip) {
    Sums sums = gathers ? tail.step(at_clip, grid) : total<Sums>(row, threads, [&](const float* x, int64_t n) {
      return ON_GRID ? octav_grid_step<SIGNED, FINITE>(x, n, at_clip, grid)
                     : octav_step<SIGNED, FINITE>(x, n, at_clip, grid);
    });
    if (!ON_GRID) sums.denominator += grid.noise * double(start.count);
    return sums;
  });
  return ON_GRID ? polish<SIGNED, FINITE>(row, clip, grid, threads) : clip;
}

template <bool SIGNED, bool ON_GRID>
float solved(const Row& row, float hint, const Grid& grid, int threads) {
  return solve<SIGNED, ON_GRID, false>(row, hint, grid, threads);
}

}  // namespace

// x: [rows, n] contiguous, elements of a type. hint, clip: [rows]. on_grid: 0 = "octav", 1 = "octav-grid".
extern "C" void octav_optimal_clip(const void* x, int type, int64_t rows, int64_t n, const float* hint, float* clip,
                                   int bits, int is_signed, int on_grid, int threads) {
  const double steps = double(1 << (is_signed ? bits - 1 : bits));
  const Grid grid{steps, 1 / (12 * steps * steps), 1 - 1 / steps};
  const auto run = is_signed ? (on_grid ? solved<true, true> : solved<true, false>)
                             : (on_grid ? solved<false, true> : solved<false, false>);
  each_row(x, type, rows, n, hint, clip, threads,
           [&](const Row& row, float near, int of_row) { return run(row, near, grid, of_row); });
}
