// What both kinds of the processor's matrix tiles (AMX) have in common: 8 tiles of 16 rows of 64
// bytes each. See tiles_bfloat16.h and tiles_int8.h.
#pragma once
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__linux__)
#define JAXKV_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

#include "ahead.h"
#include "online.h"

namespace jaxkv {

constexpr int kTile = 16;               // rows of a tile, and columns of 4 bytes
constexpr int kQueries = 4;             // of one KV head, that share a tile
constexpr int kGroups = kBlock / kTile; // tokens of a block go into so many tiles

// The system gives a process the tiles' registers when it first asks.
inline bool TilesAllowed() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
}

// Before a tile is loaded from what was just written: compilers do not know that it reads memory.
inline void Written() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// All tiles of full size, for as long as this lives.
class TilesInUse {
 public:
  TilesInUse() {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; ++tile) shape.row_bytes[tile] = 64, shape.rows[tile] = kTile;
    Written();
    _tile_loadconfig(&shape);
  }
  ~TilesInUse() { _tile_release(); }
};

// Where the vectors of a tile's tokens are, `stride` bytes from one to the next.
struct Source {
  const char* vectors;
  int64_t stride;
};
// 64 bytes of each token's vector.
#define LOAD_SOURCE(tile, source, slice) \
  _tile_loadd(tile, (source).vectors + (slice) * 64, (source).stride)

// Each token's products with all columns of the queries' tiles, a row of `parts`: of whole numbers,
// or of bfloat16.
template <bool kWhole, typename Sum>
inline void MultiplyAll(const Line* queries, const Source (&sources)[kGroups], int groups,
                        int64_t slices, Ahead& ahead, Sum* parts) {
#define PRODUCT(sum, a, b)      \
  if constexpr (kWhole) {       \
    _tile_dpbssd(sum, a, b);    \
  } else {                      \
    _tile_dpbf16ps(sum, a, b);  \
  }
  Written();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t slice = 0; slice < slices; ++slice, queries += kTile) {
    _tile_loadd(4, queries, 64);
    ahead.Fetch();
    LOAD_SOURCE(5, sources[0], slice);
    PRODUCT(0, 5, 4)
    if (groups > 1) {
      LOAD_SOURCE(6, sources[1], slice);
      PRODUCT(1, 6, 4)
    }
    ahead.Fetch();
    if (groups > 2) {
      LOAD_SOURCE(7, sources[2], slice);
      PRODUCT(2, 7, 4)
    }
    if (groups > 3) {
      LOAD_SOURCE(5, sources[3], slice);
      PRODUCT(3, 5, 4)
    }
  }
  _tile_stored(0, parts, 64);
  _tile_stored(1, parts + kTile * kTile, 64);
  _tile_stored(2, parts + 2 * kTile * kTile, 64);
  _tile_stored(3, parts + 3 * kTile * kTile, 64);
#undef PRODUCT
}
// How often a score fetches ahead: here, and once a group where parts are added up.
inline int64_t FetchesOfScore(int64_t slices, int groups) { return 2 * slices + groups; }

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
