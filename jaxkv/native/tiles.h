// What attention in tiles has in common: 16 tokens of a KV head at a time, 64 bytes of each, with up
// to four queries. The processor has registers of that shape (amx.h), or does it in vectors (vnni.h).
#pragma once
#if defined(__AVX512BW__)
#include <immintrin.h>

#include <cstdint>

#include "ahead.h"
#include "online.h"

namespace jaxkv {

constexpr int kTile = 16;               // tokens, and columns of 4 bytes
constexpr int kQueries = 4;             // of one KV head, that share a tile
constexpr int kGroups = kBlock / kTile; // tokens of a block go into so many tiles

// Where the vectors of a tile's tokens are, `stride` bytes from one to the next.
struct Source {
  const char* vectors;
  int64_t stride;
  bool near = false;  // copied just now
};

// Of four vectors, the first four lanes of all, then the second four, and so on.
inline void TransposeFours(Vec (&v)[4]) {
#define HALVES(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#define LOW(x, y) HALVES(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define HIGH(x, y) HALVES(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define EVEN(x, y) HALVES(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define ODD(x, y) HALVES(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
  const Vec a = LOW(v[0], v[1]), b = HIGH(v[0], v[1]), c = LOW(v[2], v[3]), d = HIGH(v[2], v[3]);
  v[0] = EVEN(a, c), v[1] = ODD(a, c), v[2] = EVEN(b, d), v[3] = ODD(b, d);
#undef HALVES
#undef LOW
#undef HIGH
#undef EVEN
#undef ODD
}

// Four by four: lane 4 i + g becomes lane 4 g + i.
inline Vec Transposed(Vec v) {
  return __builtin_shufflevector(v, v, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

}  // namespace jaxkv
#endif
