// What tiles of whole numbers have in common: codes stand for levels of 8 bits, and are multiplied as
// such.
//
// Queries and weights become fixed-point numbers of 24 bits, in units of their largest (a query's,
// a block's), and their three digits of 8 bits are columns and rows of their own. Sums are exact.
#pragma once
#include "tiles.h"
#if defined(__AVX512BW__)
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

struct WholeNumbers {
  static constexpr int kNumbers = 64;  // of a vector, in a tile's row

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
  // g in column 4p + g, the highest first. After the tiles, each query's unit, in lanes 4 g to
  // 4 g + 3. digits(number, g, where its byte of column 0 is) puts them there.
  template <typename Digits>
  static void ArrangeQueries(const float* queries, int count, int64_t head_dim, Line* tiles,
                             const Digits& digits) {
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
        Line& row = tiles[d / kNumbers * kTile + d % kNumbers / 4];
        digits((int32_t)std::lrintf(query[d] / unit), g, (uint8_t*)row.lanes + d % 4);
      }
    }
  }

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

 protected:
  static constexpr float kMostSigned = (1 << 23) - (1 << 16), kMostUnsigned = (1 << 24) - 8;

  static Vec Whole(const int32_t* numbers) {
    return __builtin_convertvector(*(const Ints*)numbers, Vec);
  }
};

}  // namespace jaxkv
#endif
