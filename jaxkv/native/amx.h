// What both kinds of the processor's matrix tiles (AMX) have in common: 8 tiles of 16 rows of 64
// bytes each. See amx_bfloat16.h and amx_int8.h.
#pragma once
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__linux__)
#define JAXKV_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

#include "tiles.h"

namespace jaxkv {

// Before a tile is loaded from what was just written: compilers do not know that it reads memory.
inline void Written() { std::atomic_signal_fence(std::memory_order_seq_cst); }

struct Amx {
  static constexpr int kTokens = 4;  // whose scores with all queries stand together

  // The system gives a process the tiles' registers when it first asks.
  static bool Serves(const Attention&) {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return allowed;
  }

  // All tiles of full size, for as long as this lives.
  class InUse {
   public:
    InUse() {
      alignas(64) struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
      } shape;
      for (int tile = 0; tile < 8; ++tile) shape.row_bytes[tile] = 64, shape.rows[tile] = kTile;
      Written();
      _tile_loadconfig(&shape);
    }
    ~InUse() { _tile_release(); }
  };

  // How often a score fetches ahead: in MultiplyAll, and once a group where parts are added up.
  static int64_t FetchesOfScore(int64_t slices, int groups) { return 2 * slices + groups; }
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
}  // namespace jaxkv
#endif
