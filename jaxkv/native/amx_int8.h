// The products of attention in the processor's matrix tiles, of whole numbers.
#pragma once
#include "amx.h"
#include "whole_numbers.h"
#if JAXKV_AMX

namespace jaxkv {

struct AmxInt8 : Amx, WholeNumbers {
  static constexpr int kWays = 4;  // mixes hold, of each 64 numbers, each fourth, then the next

  // Rows of digits; after them, each query's unit, in lanes 4 g to 4 g + 3.
  static void Arrange(const float* queries, int count, int64_t head_dim, Line* tiles) {
    const int64_t rows = head_dim / 4;
    std::memset(tiles, 0, (rows + 1) * sizeof(Line));
    for (int g = 0; g < count; ++g) {
      int32_t sums[3] = {};
      const float unit = PutDigits(queries + g * head_dim, head_dim, g, tiles, sums);
      std::fill_n(tiles[rows].lanes + 4 * g, 4, unit);
    }
  }

  static void Score(const Line* queries, const Source (&sources)[kGroups], int groups,
                    int64_t slices, int, Ahead& ahead, float* scores) {
    alignas(64) int32_t parts[kBlock * kTile];  // each token's row holds each query's three digits
    MultiplyAll<true>(queries, sources, groups, slices, ahead, parts);
    const Vec units = Load(queries[slices * kTile].lanes);
    for (int step = 0; step < groups * kTile / 4; ++step) {
      if (step % 4 == 0) ahead.Fetch();
      Vec v[4];
      UNROLL for (int i = 0; i < 4; ++i) v[i] = Whole(parts + (4 * step + i) * kTile);
      TransposeFours(v);
      Store(scores + step * kLanes, Transposed(v[0] * 65536.0f + (v[1] * 256.0f + v[2])) * units);
    }
  }

  // Adds a block to the mixes of up to 4 queries.
  static void Mix(const float* scores, const Source (&sources)[kGroups], int groups,
                  int64_t slices, Ahead& ahead, int count, int64_t head_dim, float* mix) {
    alignas(64) uint32_t weights[3][kTile * kTile];
    alignas(64) int32_t sums[3][kTile * kTile];
    const Units of_block(scores, groups);
    for (int64_t slice = 0; slice < slices; ++slice) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      for (int group = 0; group < groups; ++group) {
        ahead.Fetch();
        ArrangeWeights(scores + 4 * group * kLanes, of_block.steps, weights);
        Written();
        LOAD_SOURCE(3, sources[group], slice);
        _tile_loadd(4, weights[0], 64);
        _tile_dpbusd(0, 4, 3);
        _tile_loadd(5, weights[1], 64);
        _tile_dpbusd(1, 5, 3);
        _tile_loadd(6, weights[2], 64);
        _tile_dpbusd(2, 6, 3);
      }
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      for (int g = 0; g < count; ++g)
        UNROLL for (int way = 0; way < kWays; ++way) {
          const int64_t row = (way * kQueries + g) * kTile;
          const Vec sum = Whole(sums[0] + row) * 65536.0f +
                          (Whole(sums[1] + row) * 256.0f + Whole(sums[2] + row));
          float* to = mix + g * head_dim + slice * kNumbers + way * kLanes;
          Store(to, Load(to) + sum * of_block.units[4 * g]);
        }
    }
  }
  static int64_t FetchesOfMix(int64_t slices, int groups) { return slices * groups; }

 private:
  // Weights of a block in units of its largest, of each query.
  struct Units {
    Vec units, steps;  // what a weight is multiplied with to become a whole number

    Units(const float* scores, int groups) {
      Vec most = Vec{}, none = Vec{};  // none: 0, or NaN where a weight is not finite
      for (int step = 0; step < groups * kTile / 4; ++step) {
        const Vec some = Load(scores + step * kLanes);
        most = Larger(some, most), none += some * 0.0f;
      }
      most = Together<kQueries>(most, Larger), none = Together<kQueries>(none, Added);
      units = most / kMostUnsigned + none;
      steps = most > 0 ? kMostUnsigned / most : Vec{};
    }
  };

  // Weights of 16 tokens as a tile a digit, for one of values, whose rows are fours of numbers of
  // one token: four rows, one a query, take the first of each four, the next four rows the second.
  static void ArrangeWeights(const float* scores, Vec steps,
                             uint32_t (&weights)[3][kTile * kTile]) {
    Vec v[4];
    UNROLL for (int i = 0; i < 4; ++i) v[i] = Load(scores + i * kLanes) * steps + 0.5f;
    TransposeFours(v);  // of query g, 16 tokens
    UNROLL for (int g = 0; g < kQueries; ++g) {
      const Words fixed = (Words)__builtin_convertvector(v[g], Ints);
      UNROLL for (int part = 0; part < 3; ++part) {
        const Words digit = fixed >> (16 - 8 * part) & 0xff;
        UNROLL for (int way = 0; way < kWays; ++way)
          *(Words*)&weights[part][(way * kQueries + g) * kTile] = digit << (8 * way);
      }
    }
  }
};

}  // namespace jaxkv
#endif
