// Codes by a table of 256. reference.py is the definition, equal bit for bit.
#include "../lookup.h"

#include "../stretches.h"

// x, codes: dense, of n elements in the same order.
extern "C" void octav_lookup(const uint8_t* x, const uint8_t* table, uint8_t* codes, int64_t n, int threads) {
  stretches(n, threads, [=](int64_t at, int64_t count) { look_up(x + at, codes + at, count, table); });
}
