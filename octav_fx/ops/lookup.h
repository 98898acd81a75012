// Codes by a table of 256: ops/lookup/reference.py.
#pragma once
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>

// Four registers hold the table: two permutes look a code up in either half, and its highest bit says in which.
__attribute__((target("avx512f,avx512bw,avx512vbmi"))) inline int64_t permuted(const uint8_t* from, uint8_t* to,
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

inline bool has_byte_permutes() { return __builtin_cpu_supports("avx512vbmi"); }
#else
inline int64_t permuted(const uint8_t*, uint8_t*, int64_t, const uint8_t*) { return 0; }

inline bool has_byte_permutes() { return false; }
#endif

// from, to: n codes.
inline void look_up(const uint8_t* from, uint8_t* to, int64_t n, const uint8_t* table) {
  int64_t i = has_byte_permutes() ? permuted(from, to, n, table) : 0;
  for (; i < n; i++) to[i] = table[from[i]];
}
