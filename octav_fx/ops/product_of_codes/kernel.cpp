// The operands of integer products from what training has, and what follows the sums. reference.py is the definition.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../elements.h"
#include "../stretches.h"

namespace {

constexpr int64_t PARALLEL_FROM = 1 << 16;

// Codes as quantize marks them -> counted from the lowest of their grid. Returns whether one stands for no number.
template <class Code>
bool count_from_lowest(const Code* __restrict codes, uint8_t* __restrict out, int64_t n, int low, int high) {
  const int not_finite = std::numeric_limits<Code>::min(), raised = low == 0 ? 2 * (high + 1) : 1 << 30;
  int found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t i = 0; i < n; i++) {
    const int marked = codes[i], code = marked >= raised ? marked - raised : marked;
    out[i] = uint8_t(std::min(std::max(code, low), high) - low);
    found |= marked == not_finite;
  }
  return found;
}

// One filter -> its codes. Returns whether one of its elements is no number.
template <class X>
bool round_filter(const X* __restrict x, float step, int8_t* __restrict out, int64_t n, float bottom, float top) {
  int found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t i = 0; i < n; i++) {
    const float value = to_float(x[i]), code = std::min(std::max(std::nearbyint(value / step), bottom), top);
    out[i] = int8_t(int(step > 0 ? code : 0.f));
    found |= !(std::fabs(value) <= FLT_MAX);
  }
  return found;
}

// [inputs, positions] -> [positions, inputs].
template <int64_t KNOWN>
void inputs_last(const int8_t* __restrict from, int8_t* __restrict to, int64_t inputs, int64_t positions) {
  if (KNOWN) positions = KNOWN;
  for (int64_t position = 0; position < positions; position++)
    for (int64_t i = 0; i < inputs; i++) to[position * inputs + i] = from[i * positions + position];
}

int32_t sum_of(const int8_t* codes, int64_t n) {
  int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += codes[i];
  return sum;
}

}  // namespace

// codes, out: dense, n elements in the same order. bytes: those of one code, 1 or 2. found: set to 1 if one of them
// stands for what is not finite.
extern "C" void octav_operand(const void* codes, int bytes, uint8_t* out, int64_t n, int low, int high, int* found,
                              int threads) {
  int any = 0;
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) reduction(| : any) if (threads > 1 && n >= PARALLEL_FROM)
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t at = block * BLOCK, count = std::min(BLOCK, n - at);
    any |= bytes == 1 ? count_from_lowest(static_cast<const int8_t*>(codes) + at, out + at, count, low, high)
                      : count_from_lowest(static_cast<const int16_t*>(codes) + at, out + at, count, low, high);
  }
  *found = any;
}

// filters: [channels, inputs, positions], of a type. clip: [channels]. out: the same, or [channels, positions, inputs]
// if transposed. sums: [channels], of the codes of each. found: as above.
extern "C" void octav_filter_codes(const void* filters, int type, const float* clip, int8_t* out, int32_t* sums,
                                   int64_t channels, int64_t inputs, int64_t positions, int transposed, int steps,
                                   int low, int high, int* found, int threads) {
  int any = 0;
  const int64_t size = inputs * positions;
  with_element(type, [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(filters);
    const auto transpose = positions == 9 ? inputs_last<9> : inputs_last<0>;
#pragma omp parallel num_threads(threads) reduction(| : any) if (threads > 1 && channels * size >= PARALLEL_FROM)
    {
      std::vector<int8_t> scratch(transposed ? size : 0);
#pragma omp for
      for (int64_t channel = 0; channel < channels; channel++) {
        int8_t *to = out + channel * size, *codes = transposed ? scratch.data() : to;
        any |= round_filter(from + channel * size, clip[channel] / float(steps), codes, size, float(low), float(high));
        sums[channel] = sum_of(codes, size);
        if (transposed) transpose(codes, to, inputs, positions);
      }
    }
  });
  *found = any;
}

// x: [images, height, width, channels]. out: [images, rows, columns, kernel height, kernel width, channels]: what each
// position of a convolution reads; beyond the border that is the code for zero.
extern "C" void octav_windows(const uint8_t* x, uint8_t* out, const int64_t* geometry, int zero, int threads) {
  const int64_t images = geometry[0], height = geometry[1], width = geometry[2], channels = geometry[3];
  const int64_t rows = geometry[4], columns = geometry[5], kernel_height = geometry[6], kernel_width = geometry[7];
  const int64_t stride_y = geometry[8], stride_x = geometry[9], padding_y = geometry[10], padding_x = geometry[11];
  const int64_t dilation_y = geometry[12], dilation_x = geometry[13], line = kernel_width * channels;
#pragma omp parallel for num_threads(threads) if (threads > 1 && images * rows * columns * line >= PARALLEL_FROM)
  for (int64_t at = 0; at < images * rows; at++) {
    const uint8_t* image = x + at / rows * height * width * channels;
    uint8_t* to = out + at * columns * kernel_height * line;
    for (int64_t column = 0; column < columns; column++)
      for (int64_t i = 0; i < kernel_height; i++, to += line) {
        const int64_t y = at % rows * stride_y - padding_y + i * dilation_y, left = column * stride_x - padding_x;
        const int64_t right = left + (kernel_width - 1) * dilation_x;
        const uint8_t* from = image + y * width * channels;
        if (y < 0 || y >= height) {
          std::memset(to, zero, line);
        } else if (left >= 0 && right < width && dilation_x == 1) {
          std::memcpy(to, from + left * channels, line);
        } else {
          for (int64_t j = 0; j < kernel_width; j++) {
            const int64_t position = left + j * dilation_x;
            if (position < 0 || position >= width)
              std::memset(to + j * channels, zero, channels);
            else
              std::memcpy(to + j * channels, from + position * channels, channels);
          }
        }
      }
  }
}

// total: [rows, channels], sums of products of codes that count from the lowest, zero being the code for zero.
// weight_sums, scale: [channels]; bias: [channels] or null. out: [rows, channels], of a type:
// f32(total - zero * weight_sums) * scale + bias.
extern "C" void octav_scaled(const int32_t* total, const int32_t* weight_sums, int zero, const float* scale,
                             const float* bias, void* out, int type, int64_t rows, int64_t channels, int threads) {
  std::vector<int32_t> offset(channels);
  std::vector<float> added(channels);
  for (int64_t i = 0; i < channels; i++) offset[i] = zero * weight_sums[i], added[i] = bias ? bias[i] : 0.f;
  with_element(type, [&](auto element) {
    using Y = decltype(element);
    const int32_t* minus = offset.data();
    const float* plus = added.data();
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * channels >= PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++) {
      const int32_t* __restrict from = total + row * channels;
      Y* __restrict to = static_cast<Y*>(out) + row * channels;
#pragma omp simd
      for (int64_t i = 0; i < channels; i++) to[i] = from_float<Y>(float(from[i] - minus[i]) * scale[i] + plus[i]);
    }
  });
}
