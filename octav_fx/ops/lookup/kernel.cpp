// Codes by a table of 256. reference.py is the definition, equal bit for bit.
#include <cstdint>

#include "../stretches.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define HAS_BYTE_PERMUTES __builtin_cpu_supports("avx512vbmi")

// Four registers hold the table: two permutes look a code up in either half, and its highest bit says in which.
__attribute__((target("avx512f,avx512bw,avx512vbmi"))) static int64_t permuted(const uint8_t* from, uint8_t* to,
                                                                               int64_t n, const uint8_t* table) {
  __m512i part[4];
  for (int i = 0; i < 4; i++) part[i] = _mm512_loadu_si512(table + 64 * i);
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const __m512i code = _mm512_loadu_si512(from + i);
    const __m512i low = _mm512_permutex2var_epi8(part[0], code, part[1]);
    const __m512i high = _mm512_permutex2var_epi8(part[2], code, part[3]);
    _mm512_storeu_si512(to + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high));
  }
  return i;
}
#else
#define HAS_BYTE_PERMUTES false
static int64_t permuted(const uint8_t*, uint8_t*, int64_t, const uint8_t*) { return 0; }
#endif

// x, codes: dense, of n elements in the same order.
extern "C" void octav_lookup(const uint8_t* x, const uint8_t* table, uint8_t* codes, int64_t n, int threads) {
  const bool permutes = HAS_BYTE_PERMUTES;
  stretches(n, threads, [=](int64_t at, int64_t count) {
    int64_t i = permutes ? permuted(x + at, codes + at, count, table) : 0;
    for (; i < count; i++) codes[at + i] = table[x[at + i]];
  });
}
