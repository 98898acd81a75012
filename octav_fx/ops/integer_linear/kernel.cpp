// Rows of codes times a weight of codes, with the products of VNNI. reference.py is the definition, equal bit for bit.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../lookup.h"
#include "../vnni.h"

#if defined(HAS_VNNI_PASSES)
VNNI_BEGIN
namespace {

// ROWS rows of x, columns codes each, times VECTORS vectors of channels from one on: all sums stay in registers.
template <int ROWS, int VECTORS, class Y>
ALWAYS_INLINE void tile(const uint8_t* x, const int8_t* w, Y* y, int64_t columns, int64_t channels, int64_t channel,
                        const Ending& ending) {
  Vectors<ROWS * VECTORS> sums;
  each<ROWS * VECTORS>([&](auto i) INLINED {
    sums.template at<i>() = _mm512_loadu_si512(ending.offset + channel + i % VECTORS * SUMS);
  });
  for (int64_t k = 0; k < columns; k += 4, w += VECTORS * QUADS) {
    Vectors<VECTORS> weights;
    each<VECTORS>([&](auto v) INLINED { weights.template at<v>() = _mm512_loadu_si512(w + v * QUADS); });
    each<ROWS>([&](auto r) INLINED {
      int32_t four;
      std::memcpy(&four, x + r * columns + k, 4);
      const __m512i codes = _mm512_set1_epi32(four);
      each<VECTORS>([&](auto v) INLINED {
        add_products(sums.template at<r * VECTORS + v>(), codes, weights.template at<v>());
      });
    });
  }
  each<VECTORS>([&](auto v) INLINED {
    const int64_t at = channel + v * SUMS, left = channels - at;
    const __mmask16 there = left >= SUMS ? 0xffff : __mmask16((1 << left) - 1);
    each<ROWS>([&](auto r) INLINED {
      ending.write(y + r * channels + at, sums.template at<r * VECTORS + v>(), at, there);
    });
  });
}

// Rows that are left over are computed with some that have been already.
template <int ROWS, int VECTORS, class Y>
inline void strip(const uint8_t* x, const int8_t* w, Y* y, int64_t rows, int64_t columns, int64_t channels,
                  int64_t channel, const Ending& ending) {
  if (rows < ROWS) {
    for (int64_t r = 0; r < rows; r++)
      tile<1, VECTORS>(x + r * columns, w, y + r * channels, columns, channels, channel, ending);
    return;
  }
  for (int64_t at = 0; at < rows; at += ROWS) {
    const int64_t r = std::min(at, rows - ROWS);
    tile<ROWS, VECTORS>(x + r * columns, w, y + r * channels, columns, channels, channel, ending);
  }
}

// The channels of one block of weights, and so many rows at once that sums take most of 32 registers.
template <class Y>
void block(const uint8_t* x, const int8_t* w, Y* y, int64_t rows, int64_t columns, int64_t channels, int64_t channel,
           const Ending& ending) {
  switch ((std::min<int64_t>(channels - channel, QUADS) + SUMS - 1) / SUMS) {
    case 1: return strip<14, 1>(x, w, y, rows, columns, channels, channel, ending);
    case 2: return strip<12, 2>(x, w, y, rows, columns, channels, channel, ending);
    case 3: return strip<8, 3>(x, w, y, rows, columns, channels, channel, ending);
    case 4: return strip<6, 4>(x, w, y, rows, columns, channels, channel, ending);
  }
}

// Rows at a time: their codes and results stay near while all channels are computed. At least a few strips.
constexpr int64_t NEAR = 1 << 17, FEW = 84;

template <class Y>
void all_rows(const uint8_t* x, const uint8_t* table, const int8_t* w, Y* y, int64_t rows, int64_t columns,
              int64_t channels, const Ending& ending, int threads) {
  const int64_t size = std::max(FEW, NEAR / (columns + channels * int64_t(sizeof(Y))) / FEW * FEW);
  const int64_t parts = (rows + size - 1) / size, blocks = (channels + QUADS - 1) / QUADS;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    // The rows at hand by the table, and which of all rows is their first.
    std::vector<uint8_t> by_table(table ? std::min(size, rows) * columns : 0);
    int64_t first = -1;
#pragma omp for
    for (int64_t i = 0; i < parts * blocks; i++) {
      const int64_t at = i / blocks * size, channel = i % blocks * QUADS, count = std::min(size, rows - at);
      const uint8_t* codes = x + at * columns;
      if (table) {
        if (at != first) look_up(codes, by_table.data(), count * columns, table);
        first = at;
        codes = by_table.data();
      }
      block(codes, w + channel * columns, y + at * channels, count, columns, channels, channel, ending);
    }
  }
}

}  // namespace
VNNI_END
#endif

// x [rows, columns], columns a multiple of 4. w: as vnni.packed has it. offset, scale, bias [channels, up to the next 16].
// table: of the codes that are multiplied, by those in x, or null where they are the same. y [rows, channels]: codes, or
// floats where is_float.
extern "C" void octav_integer_linear(const uint8_t* x, const uint8_t* table, const int8_t* w, const int32_t* offset,
                                     const float* scale, const float* bias, void* y, int64_t rows, int64_t columns,
                                     int64_t channels, int is_float, float inverse, float zero, float bottom,
                                     float top, int lowest, int threads) {
#if defined(HAS_VNNI_PASSES)
  const Ending ending{offset, scale, bias, inverse, zero, bottom, top, lowest};
  if (is_float)
    all_rows(x, table, w, static_cast<float*>(y), rows, columns, channels, ending, threads);
  else
    all_rows(x, table, w, static_cast<uint8_t*>(y), rows, columns, channels, ending, threads);
#endif
}
