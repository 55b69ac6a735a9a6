// The products of attention in tiles of whole numbers: codes stand for levels of 8 bits, and are
// multiplied as such.
//
// Queries and weights become fixed-point numbers of 24 bits, in units of their largest (a query's,
// a block's), and their three digits of 8 bits are columns and rows of their own. Sums are exact.
#pragma once
#include "tiles.h"
#if JAXKV_TILES
#include <algorithm>
#include <cmath>
#include <cstring>

#include "codes.h"

namespace jaxkv {

// 64 codes' bits of one plane of a vector (jaxkv/codecs/packing.py), a byte each.
class Plane {
 public:
  static bool Serves(int64_t bits, int64_t head_dim) {
    const int64_t smallest = head_dim * (bits == 3 ? 1 : bits) / 8;
    return (head_dim & (head_dim - 1)) == 0 && smallest >= 8;
  }

  // `width` bits of each code, from byte `offset` of the vector on; codes [first, first + 64).
  Plane(int width, int64_t offset, int64_t head_dim, int64_t first)
      : size_(head_dim * width / 8), offset_(offset + first % size_),
        mask_(_mm512_set1_epi8((1 << width) - 1)) {
    alignas(64) int64_t shifts[8];
    for (int i = 0; i < 8; ++i) shifts[i] = (first + 8 * i) / size_ * width;
    shifts_ = _mm512_load_si512(shifts);
  }

  __m512i Of(const char* vector) const {
    const char* p = vector + offset_;
    return _mm512_and_si512(_mm512_srlv_epi64(Bytes(p), shifts_), mask_);
  }

 private:
  // Where the plane's bytes are fewer, each code's more than once.
  __m512i Bytes(const char* p) const {
    if (size_ >= 64) return _mm512_loadu_si512(p);
    if (size_ == 32) return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p));
    if (size_ == 16) return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
    return _mm512_set1_epi64(*(const int64_t*)p);
  }

  const int64_t size_, offset_;
  const __m512i mask_;
  __m512i shifts_;
};

struct Int8Tiles {
  static constexpr int kNumbers = 64;  // of a vector, in a tile's row
  static constexpr int kWays = 4;      // mixes hold, of each 64 numbers, each fourth, then the next

  // Whether vectors are read as they lie.
  static bool AsStored(const Side& side) { return side.bits == 8; }
  // The levels of 16 tokens' codes, one token's after the other's.
  static void Copy(const Side& side, const char* const (&vectors)[kTile], int64_t head_dim,
                   char* copy) {
    if (side.bits == 8 || !Plane::Serves(side.bits, head_dim)) {
      for (const char* vector : vectors) {
        Levels(side, head_dim, vector, (int8_t*)copy);
        copy += head_dim;
      }
      return;
    }
    const __m512i levels = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)side.levels));
    for (int64_t first = 0; first < head_dim; first += kNumbers) {
      const bool three = side.bits == 3;  // two bits of all, and then one
      const Plane low(three ? 2 : side.bits, 0, head_dim, first);
      const Plane high(1, head_dim / 4, head_dim, first);
      for (int token = 0; token < kTile; ++token) {
        __m512i codes = low.Of(vectors[token]);
        if (three) codes = _mm512_or_si512(codes, _mm512_slli_epi64(high.Of(vectors[token]), 2));
        _mm512_storeu_si512(copy + token * head_dim + first, _mm512_shuffle_epi8(levels, codes));
      }
    }
  }

  // Queries of one KV head: row k of a tile holds digits of numbers 4k to 4k + 3, digit p of query
  // g in column 4p + g. After the tiles, each query's unit, in lanes 4 g to 4 g + 3.
  static void Arrange(const float* queries, int count, int64_t head_dim, Line* tiles) {
    const int64_t slices = head_dim / kNumbers;
    std::memset(tiles, 0, (slices * kTile + 1) * sizeof(Line));
    float* units = tiles[slices * kTile].lanes;
    for (int g = 0; g < count; ++g) {
      const float* query = queries + g * head_dim;
      float largest = 0;
      for (int64_t d = 0; d < head_dim; ++d)
        if (std::abs(query[d]) > largest || std::isnan(query[d])) largest = std::abs(query[d]);
      const float unit = largest / kMostSigned;
      std::fill_n(units + 4 * g, 4, unit);
      if (!(unit > 0 && std::isfinite(unit))) continue;  // zeros; or not finite, as all scores then
      for (int64_t d = 0; d < head_dim; ++d) {
        int32_t rest = (int32_t)std::lrintf(query[d] / unit);
        Line* row = &tiles[d / kNumbers * kTile + d % kNumbers / 4];
        for (int part = 2; part >= 0; --part) {  // the lowest digit first, from -128 to 127
          const int8_t digit = (int8_t)rest;
          ((int8_t*)&row->lanes[part * kQueries + g])[d % 4] = digit;
          rest = (rest - digit) >> 8;
        }
      }
    }
  }

  static void Score(const Line* queries, const Source (&sources)[kGroups], int groups,
                    int64_t slices, Ahead& ahead, float* scores) {
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
    Vec most = Vec{}, none = Vec{};  // none: 0, or NaN where a weight is not finite
    for (int step = 0; step < groups * kTile / 4; ++step) {
      const Vec some = Load(scores + step * kLanes);
      most = Larger(some, most), none += some * 0.0f;
    }
    most = Together<kQueries>(most, Larger), none = Together<kQueries>(none, Added);
    const Vec units = most / kMostUnsigned + none;
    const Vec steps = most > 0 ? kMostUnsigned / most : Vec{};
    for (int64_t slice = 0; slice < slices; ++slice) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      for (int group = 0; group < groups; ++group) {
        ahead.Fetch();
        ArrangeWeights(scores + 4 * group * kLanes, steps, weights);
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
          Store(to, Load(to) + sum * units[4 * g]);
        }
    }
  }
  static int64_t FetchesOfMix(int64_t slices, int groups) { return slices * groups; }

 private:
  static constexpr float kMostSigned = (1 << 23) - (1 << 16), kMostUnsigned = (1 << 24) - 8;

  static Vec Whole(const int32_t* numbers) {
    return __builtin_convertvector(*(const Ints*)numbers, Vec);
  }

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
