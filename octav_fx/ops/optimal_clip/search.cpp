// The clip with the least squared error by trying. clips/search.py is the definition, equal bit for bit: sums are added
// up in its order. Short rows are searched side by side, one in each lane; of a long row the lanes hold neighbours.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "../rounding.h"

// What a sum adds up, so that the compiler sees all of it.
#define INLINE __attribute__((always_inline))

namespace {

// Of search.folded.
constexpr int64_t COLUMNS = 16;
// From here on lanes hold neighbours, which is as fast: so many rows side by side would leave the second cache.
constexpr int64_t LONG = 2048;
constexpr int64_t PARALLEL_FROM = 1 << 14;

struct Candidates {
  const float* shares;
  int count;
  // Whether each is tried as it is stored, not the step of least squares for its codes.
  bool as_stored;
};

// Two sums over the same elements.
struct Pair {
  Pair& operator+=(const Pair& other) { return first += other.first, second += other.second, *this; }
  friend Pair operator+(Pair a, const Pair& b) { return a += b; }

  Lanes first, second;
};

// What takes part of values, magnitudes where these say it all; zeros for the rest.
template <bool MAGNITUDES>
inline Lanes taken(Lanes value, float lowest) {
  const Lanes magnitude = magnitude_of(value);
  const Lanes part = MAGNITUDES ? magnitude : larger(all<Lanes>(lowest), value);
  return magnitude <= all<Lanes>(FLT_MAX) ? part : Lanes{};
}

// The first elements of x, behind them zeros.
template <class X>
inline Lanes first_of(const X* x, int64_t count) {
  float room[LANES]{};
#pragma omp simd
  for (int64_t i = 0; i < count; i++) room[i] = to_float(x[i]);
  return load(room);
}

// Rows as the search reads them. SIDE_BY_SIDE: element i of row r is lane r of vector i. Else one row, its elements in
// order, behind its end zeros.
template <bool SIDE_BY_SIDE>
class Tile {
 public:
  explicit Tile(int64_t n)
      : n_(n), lines_((n + COLUMNS - 1) / COLUMNS), x_(lines_ * WIDTH), sums_(lines_ * WIDTH), pairs_(lines_ * WIDTH) {}

  // Up to LANES rows, or one. lowest: 0 where levels below zero do not exist.
  template <bool MAGNITUDES, class X>
  void read(const X* x, int64_t rows, float lowest) {
    // Not floats by way of an array: a compiler copies them in halves, and what was stored in halves cannot be loaded as
    // a whole before it has reached the cache.
    const auto vector = [=](const X* from, int64_t count) {
      return taken<MAGNITUDES>(count < LANES ? first_of(from, count) : load(from), lowest);
    };
    least_ = greatest_ = Lanes{};
    for (int64_t at = 0; at < n_; at += LANES) {
      const int64_t count = std::min<int64_t>(LANES, n_ - at);
      if (!SIDE_BY_SIDE) {
        put(at / LANES, vector(x + at, count));
        continue;
      }
      Lanes block[LANES];
      for (int64_t row = 0; row < LANES; row++) block[row] = row < rows ? vector(x + row * n_ + at, count) : Lanes{};
      transpose(block);
      for (int64_t i = 0; i < LANES; i++)
        if (i < count) put(at + i, block[i]);
    }
  }

  // In every lane the least and the greatest of 0 and the elements of its row.
  void extent(Lanes& least, Lanes& greatest) const {
    least = least_, greatest = greatest_;
    if (SIDE_BY_SIDE) return;
    for (int i = 1; i < LANES; i++) {
      least[0] = smaller<float>(least[0], least[i]);
      greatest[0] = larger<float>(greatest[0], greatest[i]);
    }
    least = all<Lanes>(least[0]), greatest = all<Lanes>(greatest[0]);
  }

  void scale(Lanes factor) {
    for (Lanes& value : x_) value *= factor;
  }

  // In every lane the sum of term(element), Lanes or a Pair of them, over its row, in the order of search.folded.
  template <class Term>
  auto sum(Term term) {
    using Sum = decltype(term(Lanes{}));
    const Lanes* x = x_.data();
    Sum* sums = room(Sum{}).data();
    int64_t lines = lines_, width = WIDTH;
    const bool is_power = SIDE_BY_SIDE && (lines & (lines - 1)) == 0;
    if (n_ % COLUMNS == 0 && (is_power || lines % 8 == 0)) {
      // The first three halvings at once, in registers.
      const int64_t part = lines * width / 8;
      for (int64_t i = 0; i < part; i++) sums[i] = tree<8>(x + i, part, term);
      width = lines % 8 == 0 ? width : part;
      lines = lines % 8 == 0 ? lines / 8 : 1;
    } else {
      for (int64_t i = 0; i < lines * width; i++) sums[i] = term(x[i]);
      // Behind the end of the row there is nothing, not the error of a zero.
      const int64_t lanes = SIDE_BY_SIDE ? 1 : LANES, last = n_ / lanes;
      if (n_ % lanes) cut(sums[last], n_ % lanes);
      std::fill(sums + (n_ + lanes - 1) / lanes, sums + lines * width, Sum{});
    }
    while (lines > 1) {
      const int64_t half = (lines + 1) / 2;
      for (int64_t i = 0; i < (lines - half) * width; i++) sums[i] += sums[i + half * width];
      lines = half;
    }
    const auto line = [=](auto columns) { return tree<columns()>(sums, 1, [](const Sum& sum) { return sum; }); };
    if constexpr (!SIDE_BY_SIDE) return across(line(std::integral_constant<int, WIDTH>()));
    switch (width) {
      case 2: return line(std::integral_constant<int, 2>());
      case 4: return line(std::integral_constant<int, 4>());
      case 8: return line(std::integral_constant<int, 8>());
    }
    return line(std::integral_constant<int, COLUMNS>());
  }

 private:
  // term(x[0]) .. term(x[(COUNT - 1) * stride]), the second half of them added to the first until one is left.
  template <int COUNT, class T, class Term>
  INLINE static auto tree(const T* x, int64_t stride, const Term& term) {
    if constexpr (COUNT == 1)
      return term(*x);
    else
      return tree<COUNT / 2>(x, 2 * stride, term) + tree<COUNT / 2>(x + stride, 2 * stride, term);
  }

  void put(int64_t at, Lanes value) {
    x_[at] = value, least_ = smaller(least_, value), greatest_ = larger(greatest_, value);
  }

  std::vector<Lanes>& room(Lanes) { return sums_; }
  std::vector<Pair>& room(Pair) { return pairs_; }

  // Leaves zeros behind the first lanes.
  static void cut(Lanes& sum, int64_t lanes) {
    for (int64_t i = lanes; i < LANES; i++) sum[i] = 0;
  }

  static void cut(Pair& sum, int64_t lanes) { cut(sum.first, lanes), cut(sum.second, lanes); }

  static Lanes across(Lanes sum) {
    float lanes[LANES];
    save(sum, lanes);
    for (int half = LANES / 2; half; half /= 2)
      for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return all<Lanes>(lanes[0]);
  }

  static Pair across(const Pair& sum) { return {across(sum.first), across(sum.second)}; }

  // Vectors of a line.
  static constexpr int64_t WIDTH = SIDE_BY_SIDE ? COLUMNS : COLUMNS / LANES;
  int64_t n_, lines_;
  Lanes least_, greatest_;
  std::vector<Lanes> x_, sums_;
  std::vector<Pair> pairs_;
};

// The step with the least error, and that error.
struct Best {
  void offer(Lanes other, Lanes its_error) {
    const auto is_better = its_error < error;
    step = is_better ? other : step, error = is_better ? its_error : error;
  }

  Lanes step, error;
};

// search._best_fit.
template <bool SIDE_BY_SIDE, class Round>
Lanes best_fit(Tile<SIDE_BY_SIDE>& tile, Lanes whole, const Round& round, const Candidates& candidates) {
  const Lanes zero{}, square = tile.sum([](Lanes x) { return x * x; }), unit = 1.f / whole;
  Best best{all<Lanes>(1), all<Lanes>(INFINITY)};
  for (int i = 0; i < candidates.count; i++) {
    const float share = candidates.shares[i];
    const Lanes inverse = unit * (1 / share);
    const auto sums_of = [&](auto level_of) {
      return tile.sum([=](Lanes x) INLINE {
        const Lanes ratio = x * inverse, level = level_of(ratio), off = ratio - level;
        return Pair{off * off, off * level};
      });
    };
    // Of a step that clips nothing nothing has to be clipped.
    const Pair sums = share >= 1 ? sums_of([=](Lanes ratio) INLINE { return round.inside(ratio); })
                                 : sums_of([=](Lanes ratio) INLINE { return round.nearest(ratio); });
    const Lanes levels = square * (inverse * inverse) - sums.second - sums.second - sums.first;
    const Lanes gain = levels > zero ? sums.second / levels : zero;
    best.offer(share + share * gain, (sums.first - sums.second * gain) * (share * share));
  }
  return best.step * whole;
}

// The clips of the rows of a tile.
template <bool SIDE_BY_SIDE, class Round>
Lanes searched(Tile<SIDE_BY_SIDE>& tile, const Levels& of, const Round& round, const Scale& scale,
               const Candidates& candidates) {
  const Lanes zero{};
  Lanes least, greatest;
  tile.extent(least, greatest);
  // In the units of the largest magnitude no square over- or underflows.
  const Integers exponent = (as_bits(larger(-least, greatest)) >> 23) - 126, bound = Integers{} + 100;
  const Integers held = smaller(larger(exponent, -bound), bound);
  const Lanes up = from_bits<Lanes>((127 + held) << 23), down = from_bits<Lanes>((127 - held) << 23);
  tile.scale(down), least *= down, greatest *= down;

  const auto stored = [&](Lanes step) { return scale.kind == Scale::FLOAT32 ? step : scale(step * up) * down; };
  // Of two steps at once, which takes less than twice as long.
  const auto errors = [&](Lanes step, Lanes other) {
    const Lanes inverse = 1.f / step, its_inverse = 1.f / other;
    const Pair sums = tile.sum([=](Lanes x) INLINE {
      const Lanes ratio = x * inverse, off = ratio - round.nearest(ratio);
      const Lanes its_ratio = x * its_inverse, its_off = its_ratio - round.nearest(its_ratio);
      return Pair{off * off, its_off * its_off};
    });
    const auto error = [=](Lanes sum, Lanes step) { return step > zero ? sum * (step * step) : all<Lanes>(INFINITY); };
    return Pair{error(sums.first, step), error(sums.second, other)};
  };
  const Lanes above = greatest / of.greatest;
  const Lanes whole = of.least < 0 ? larger(above, least / of.least) : above;
  const Lanes fit = candidates.as_stored ? zero : stored(best_fit(tile, whole, round, candidates));
  const int count = candidates.as_stored ? candidates.count : 1;
  const auto tried = [&](int i) { return candidates.as_stored ? stored(whole * candidates.shares[i]) : fit; };
  // Taken whatever its error is: of scales too small for the row it is infinite.
  const Lanes unclipped = stored(larger(-least, greatest) / of.steps);
  Best best{unclipped, all<Lanes>(INFINITY)};
  for (int i = -1; i < count; i += 2) {
    const Lanes step = i < 0 ? unclipped : tried(i), other = tried(std::min(i + 1, count - 1));
    const Pair found = errors(step, other);
    best.offer(step, found.first), best.offer(other, found.second);
  }
  return smaller((best.step * of.steps) * up, all<Lanes>(FLT_MAX));
}

template <bool SIDE_BY_SIDE, class X, class Round>
void search(const X* x, int type, int64_t rows, int64_t n, float* clip, const Levels& of, const Round& round,
            const Scale& scale, const Candidates& candidates, const Rounding* rounding, int threads) {
  const int64_t width = SIDE_BY_SIDE ? LANES : 1, tiles = (rows + width - 1) / width;
#pragma omp parallel num_threads(threads) if (threads > 1 && tiles > 1 && rows * n >= PARALLEL_FROM)
  {
    Tile<SIDE_BY_SIDE> tile(n);
#pragma omp for
    for (int64_t i = 0; i < tiles; i++) {
      const int64_t first = i * width, count = std::min(width, rows - first);
      tile.template read<Round::MIRRORED>(x + first * n, count, of.least < 0 ? -INFINITY : 0.f);
      float found[LANES];
      save(searched(tile, of, round, scale, candidates), found);
      std::copy(found, found + count, clip + first);
      if (rounding) (*rounding)(x, type, n, clip, of, first, count);
    }
  }
}

}  // namespace

// x: [rows, n] contiguous, elements of a type, n > 0. clip: [rows]. scale, unit: of Scale. rounding: null for clips alone.
extern "C" void octav_search(const void* x, int type, int64_t rows, int64_t n, float* clip, const Levels* of, int scale,
                             float unit, const float* shares, int count, int as_stored, const Rounding* rounding,
                             int threads) {
  with_element(type, [=](auto element) {
    const auto* from = static_cast<const decltype(element)*>(x);
    const auto search_for = [=](auto round) {
      const auto run = n < LONG ? search<true, decltype(element), decltype(round)>
                                : search<false, decltype(element), decltype(round)>;
      run(from, type, rows, n, clip, *of, round, Scale{scale, unit}, Candidates{shares, count, as_stored != 0}, rounding,
          threads);
    };
#if defined(__AVX2__)
    if (of->kind == 3)
      if (const MirroredTable table(*of); table.is_mirrored) return search_for(table);
#endif
#if defined(__AVX512F__)
    if (of->kind == 3)
      if (const DividedTable table(*of); table.is_divided) return search_for(table);
#endif
    with_levels(*of, search_for);
  });
}
