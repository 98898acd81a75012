// Depthwise convolutions of codes with the products of VNNI. reference.py is the definition, equal bit for bit.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../vnni.h"

#if defined(HAS_VNNI_PASSES)
VNNI_BEGIN
namespace {

// How a filter moves, along height and width.
struct Window {
  int64_t kernel[2], stride[2], padding[2], dilation[2];

  int64_t taps() const { return (kernel[0] * kernel[1] + 3) / 4 * 4; }
};

// Of x and y channels lie side by side, then columns. zero: the code of zero.
struct Layer {
  const uint8_t* x;
  const int8_t* w;
  uint8_t* y;
  int64_t height, width, channels, out_height, out_width;
  int zero;
  Window window;
  Ending ending;
};

// Codes of 64 / PLACES channels at each of PLACES places.
template <int PLACES>
ALWAYS_INLINE __m512i gathered(const uint8_t* x, int64_t step) {
  const auto sixteen = [=](int i) INLINED { return _mm_loadu_si128((const __m128i*)(x + i * step)); };
  const auto half = [=](int i) INLINED { return _mm256_loadu_si256((const __m256i*)(x + i * step)); };
  if constexpr (PLACES == 1) {
    return _mm512_loadu_si512(x);
  } else if constexpr (PLACES == 2) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(half(0)), half(1), 1);
  } else {
    const __m256i first = _mm256_inserti128_si256(_mm256_castsi128_si256(sixteen(0)), sixteen(1), 1);
    const __m256i last = _mm256_inserti128_si256(_mm256_castsi128_si256(sixteen(2)), sixteen(3), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), last, 1);
  }
}

// Writes the codes of the first place, or of all.
template <int PLACES>
ALWAYS_INLINE void scatter(__m512i codes, uint8_t* y, int64_t step, bool all) {
  if constexpr (PLACES == 1) {
    _mm512_storeu_si512(y, codes);
  } else if constexpr (PLACES == 2) {
    _mm256_storeu_si256((__m256i*)y, _mm512_castsi512_si256(codes));
    if (all) _mm256_storeu_si256((__m256i*)(y + step), _mm512_extracti64x4_epi64(codes, 1));
  } else {
    _mm_storeu_si128((__m128i*)y, _mm512_castsi512_si128(codes));
    if (!all) return;
    _mm_storeu_si128((__m128i*)(y + step), _mm512_extracti32x4_epi32(codes, 1));
    _mm_storeu_si128((__m128i*)(y + 2 * step), _mm512_extracti32x4_epi32(codes, 2));
    _mm_storeu_si128((__m128i*)(y + 3 * step), _mm512_extracti32x4_epi32(codes, 3));
  }
}

// 64 / PLACES channels of a block of weights. Codes of four taps are dealt to four vectors, one of each tap in turn. In
// which order channels come then, vnni.dealt knows, and the packs at the end undo it.
template <int PLACES>
ALWAYS_INLINE __m512i codes_of(const Layer& layer, const uint8_t* const* tap, int64_t shift, int64_t step,
                               int64_t block) {
  const int64_t taps = layer.window.taps(), at = block * QUADS;
  const int8_t* w = layer.w + at * taps;
  Vectors<4> sums;
  each<4>([&](auto i) INLINED { sums.template at<i>() = _mm512_loadu_si512(layer.ending.offset + at + i * SUMS); });
  for (int64_t t = 0; t < taps; t += 4, w += 4 * QUADS) {
    const __m512i a = gathered<PLACES>(tap[t] + shift, step), b = gathered<PLACES>(tap[t + 1] + shift, step);
    const __m512i c = gathered<PLACES>(tap[t + 2] + shift, step), d = gathered<PLACES>(tap[t + 3] + shift, step);
    const __m512i low_ab = _mm512_unpacklo_epi8(a, b), low_cd = _mm512_unpacklo_epi8(c, d);
    const __m512i high_ab = _mm512_unpackhi_epi8(a, b), high_cd = _mm512_unpackhi_epi8(c, d);
    add_products(sums.template at<0>(), _mm512_unpacklo_epi16(low_ab, low_cd), _mm512_loadu_si512(w));
    add_products(sums.template at<1>(), _mm512_unpackhi_epi16(low_ab, low_cd), _mm512_loadu_si512(w + QUADS));
    add_products(sums.template at<2>(), _mm512_unpacklo_epi16(high_ab, high_cd), _mm512_loadu_si512(w + 2 * QUADS));
    add_products(sums.template at<3>(), _mm512_unpackhi_epi16(high_ab, high_cd), _mm512_loadu_si512(w + 3 * QUADS));
  }
  const Ending& ending = layer.ending;
  const __m512i first =
      _mm512_packs_epi32(ending.code(sums.template at<0>(), at), ending.code(sums.template at<1>(), at + SUMS));
  const __m512i last = _mm512_packs_epi32(ending.code(sums.template at<2>(), at + 2 * SUMS),
                                          ending.code(sums.template at<3>(), at + 3 * SUMS));
  return _mm512_packus_epi16(first, last);
}

// A stretch of a row for these channels; what is left over of it is computed with what has been already.
template <int PLACES>
void strip(const Layer& layer, const uint8_t* const* tap, uint8_t* y, int64_t count, int64_t channel, int64_t block) {
  const int64_t channels = layer.channels, step = layer.window.stride[1] * channels;
  if (count < PLACES) {
    for (int64_t i = 0; i < count; i++)
      scatter<PLACES>(codes_of<PLACES>(layer, tap, i * step + channel, 0, block), y + i * channels + channel, 0, false);
    return;
  }
  for (int64_t at = 0; at < count; at += PLACES) {
    const int64_t i = std::min(at, count - PLACES);
    const __m512i codes = codes_of<PLACES>(layer, tap, i * step + channel, step, block);
    scatter<PLACES>(codes, y + i * channels + channel, channels, true);
  }
}

// count places of a row from a column on, which the taps of all lie in or all beside. beside: a row of zeros.
void stretch(const Layer& layer, int64_t image, int64_t row, int64_t column, int64_t count, const uint8_t* beside,
             const uint8_t** tap) {
  const auto& [kernel, stride, padding, dilation] = layer.window;
  const int64_t top = row * stride[0] - padding[0], left = column * stride[1] - padding[1];
  std::fill_n(tap, layer.window.taps(), beside);
  for (int64_t i = 0; i < kernel[0]; i++) {
    const int64_t h = top + i * dilation[0];
    const bool is_row = h >= 0 && h < layer.height;
    const uint8_t* codes = is_row ? layer.x + (image * layer.height + h) * layer.width * layer.channels : beside;
    for (int64_t j = 0; j < kernel[1]; j++) {
      const int64_t w = left + j * dilation[1];
      if (w >= 0 && w < layer.width) tap[i * kernel[1] + j] = codes + w * layer.channels;
    }
  }
  uint8_t* y = layer.y + ((image * layer.out_height + row) * layer.out_width + column) * layer.channels;
  int64_t channel = 0, block = 0;
  for (; layer.channels - channel >= 64; channel += 64) strip<1>(layer, tap, y, count, channel, block++);
  if (layer.channels - channel >= 32) strip<2>(layer, tap, y, count, channel, block++), channel += 32;
  if (layer.channels - channel >= 16) strip<4>(layer, tap, y, count, channel, block);
}

void all_rows(const Layer& layer, int64_t images, int threads) {
  const auto& [kernel, stride, padding, dilation] = layer.window;
  const int64_t reach = dilation[1] * (kernel[1] - 1) + 1, room = layer.width + padding[1] - reach;
  // Columns from first to last lie within the image with all of their taps.
  const int64_t first = std::min((padding[1] + stride[1] - 1) / stride[1], layer.out_width);
  const int64_t last = room < 0 ? first : std::min(std::max(room / stride[1] + 1, first), layer.out_width);
  const std::vector<uint8_t> beside(layer.width * layer.channels, uint8_t(layer.zero));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<const uint8_t*> tap(layer.window.taps());
#pragma omp for
    for (int64_t i = 0; i < images * layer.out_height; i++) {
      const auto run = [&](int64_t column, int64_t count) {
        stretch(layer, i / layer.out_height, i % layer.out_height, column, count, beside.data(), tap.data());
      };
      for (int64_t column = 0; column < first; column++) run(column, 1);
      if (last > first) run(first, last - first);
      for (int64_t column = last; column < layer.out_width; column++) run(column, 1);
    }
  }
}

}  // namespace
VNNI_END
#endif

// x [images, height, width, channels], channels a multiple of 16. y [images, out_height, out_width, channels].
// w, offset, scale, bias: as vnni.dealt has them. window: kernel, stride, padding and dilation, two of each.
extern "C" void octav_depthwise(const uint8_t* x, const int8_t* w, const int32_t* offset, const float* scale,
                                const float* bias, const int64_t* window, uint8_t* y, int64_t images, int64_t height,
                                int64_t width, int64_t channels, int64_t out_height, int64_t out_width, int x_zero,
                                float inverse, float zero, float bottom, float top, int lowest, int threads) {
#if defined(HAS_VNNI_PASSES)
  const Window moves{{window[0], window[1]}, {window[2], window[3]}, {window[4], window[5]}, {window[6], window[7]}};
  const Ending ending{offset, scale, bias, inverse, zero, bottom, top, lowest};
  all_rows({x, w, y, height, width, channels, out_height, out_width, x_zero, moves, ending}, images, threads);
#endif
}
