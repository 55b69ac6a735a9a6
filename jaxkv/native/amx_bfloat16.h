// The products of attention in tiles of bfloat16, added up in float32.
//
// Queries are cut into three numbers of 8 bits each, which are all of a float32, and weights into
// two, which are off by 2^-18 at most; each part is a column or a row of its own.
#pragma once
#include "amx.h"
#if JAXKV_AMX
#include <cstring>

namespace jaxkv {

struct AmxBFloat16 : Amx {
  static constexpr int kNumbers = 32;  // of a vector, in a tile's row
  static constexpr int kWays = 2;      // mixes hold, of each 32 numbers, even ones, then odd ones

  class Reader {
   public:
    Reader(const Side& side, int64_t) : bytes_(side.bytes) {}

    // Whether vectors are read as they lie.
    bool AsStored() const { return true; }
    void Copy(const char* const* tokens, int64_t offset, char* copy) const {
      for (int token = 0; token < kTile; ++token)
        std::memcpy(copy + token * bytes_, tokens[token] + offset, bytes_);
    }

   private:
    const int64_t bytes_;
  };

  // Queries of one KV head: row k of a tile holds numbers 2k and 2k + 1, part p of query g in
  // column 4p + g.
  static void Arrange(const float* queries, int count, int64_t head_dim, Line* tiles) {
    std::memset(tiles, 0, head_dim / kNumbers * kTile * sizeof(Line));
    for (int64_t d = 0; d < head_dim; d += kNumbers, tiles += kTile)
      for (int g = 0; g < count; ++g) {
        alignas(64) float ways[kNumbers];
        jaxkv::Arrange<BFloat16>(queries + g * head_dim + d, ways, kNumbers);
        Vec even = Load(ways), odd = Load(ways + kLanes);
        for (int part = 0; part < 3; ++part) {
          const Words pairs = TakeTop(even) >> 16 | TakeTop(odd);
          for (int k = 0; k < kTile; ++k)
            std::memcpy(&tiles[k].lanes[part * kQueries + g], (const char*)&pairs + 4 * k, 4);
        }
      }
  }

  static void Score(const Line* queries, const Source (&sources)[kGroups], int groups,
                    int64_t slices, int, Ahead& ahead, float* scores) {
    alignas(64) float parts[kBlock * kTile];  // each token's row holds each query's three parts
    MultiplyAll<false>(queries, sources, groups, slices, ahead, parts);
    for (int step = 0; step < groups * kTile / 4; ++step) {
      if (step % 4 == 0) ahead.Fetch();
      Vec v[4];
      UNROLL for (int i = 0; i < 4; ++i) v[i] = Load(parts + (4 * step + i) * kTile);
      TransposeFours(v);
      Store(scores + step * kLanes, Transposed(v[2] + v[1] + v[0]));
    }
  }

  // Adds a block to the mixes of up to 4 queries, four slices at a time.
  static void Mix(const float* scores, const Source (&sources)[kGroups], int groups,
                  int64_t slices, Ahead& ahead, int count, int64_t head_dim, float* mix) {
    alignas(64) uint32_t weights[kTile * kTile];
    alignas(64) float sums[4 * kTile * kTile];
    for (int64_t first = 0; first < slices; first += 4) {
      const int64_t some = std::min<int64_t>(4, slices - first);
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int group = 0; group < groups; ++group) {
        ahead.Fetch();
        ArrangeWeights(scores + 4 * group * kLanes, weights);
        Written();
        _tile_loadd(4, weights, 64);
        LOAD_SOURCE(5, sources[group], first);
        _tile_dpbf16ps(0, 4, 5);
        if (some > 1) {
          LOAD_SOURCE(6, sources[group], first + 1);
          _tile_dpbf16ps(1, 4, 6);
        }
        if (some > 2) {
          LOAD_SOURCE(5, sources[group], first + 2);
          _tile_dpbf16ps(2, 4, 5);
        }
        if (some > 3) {
          LOAD_SOURCE(6, sources[group], first + 3);
          _tile_dpbf16ps(3, 4, 6);
        }
      }
      _tile_stored(0, sums, 64);
      if (some > 1) _tile_stored(1, sums + kTile * kTile, 64);
      if (some > 2) _tile_stored(2, sums + 2 * kTile * kTile, 64);
      if (some > 3) _tile_stored(3, sums + 3 * kTile * kTile, 64);
      for (int g = 0; g < count; ++g)
        for (int64_t way = 0; way < 2 * some; ++way) {  // rows of 8: even numbers, odd numbers
          const float* sum = sums + (way * 8 + g) * kTile;
          float* to = mix + g * head_dim + first * kNumbers + way * kLanes;
          Store(to, Load(to) + (Load(sum) + Load(sum + kQueries * kTile)));
        }
    }
  }
  static int64_t FetchesOfMix(int64_t slices, int groups) { return (slices + 3) / 4 * groups; }

 private:
  // Weights of 16 tokens as a tile for one of values, whose rows are pairs of numbers of one
  // token: the first 8 rows take even numbers, the others odd ones; of each half, 4 rows are the
  // queries' highest parts and 4 the rest.
  static void ArrangeWeights(const float* scores, uint32_t* weights) {
    Vec v[4];
    UNROLL for (int i = 0; i < 4; ++i) v[i] = Load(scores + i * kLanes);
    TransposeFours(v);  // of query g, 16 tokens
    UNROLL for (int g = 0; g < kQueries; ++g)
      UNROLL for (int part = 0; part < 2; ++part) {
        const Words top = TakeNearest(v[g]);
        *(Words*)&weights[(part * kQueries + g) * kTile] = top >> 16;
        *(Words*)&weights[(8 + part * kQueries + g) * kTile] = top;
      }
  }

  // As many of each number's highest bits as bfloat16 has; what is left stays.
  static Words TakeTop(Vec& numbers) { return Take((Words)numbers & 0xffff0000, numbers); }
  // The same, rounded.
  static Words TakeNearest(Vec& numbers) {
    return Take(((Words)numbers + 0x8000) & 0xffff0000, numbers);
  }
  static Words Take(Words top, Vec& numbers) {
    numbers -= (Vec)top;
    return top;
  }
};

}  // namespace jaxkv
#endif
