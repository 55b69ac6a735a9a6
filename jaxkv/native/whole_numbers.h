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
#include <vector>

#include "codes.h"
#include "runs.h"

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

  int64_t size() const { return size_; }

  // Where there are kSize bytes; 64 for more.
  template <int kSize>
  __m512i Of(const char* vector) const {
    return _mm512_and_si512(_mm512_srlv_epi64(Bytes<kSize>(vector + offset_), shifts_), mask_);
  }

 private:
  // Where the plane's bytes are fewer, each code's more than once.
  template <int kSize>
  static __m512i Bytes(const char* p) {
    if (kSize == 64) return _mm512_loadu_si512(p);
    if (kSize == 32) return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p));
    if (kSize == 16) return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
    return _mm512_set1_epi64(*(const int64_t*)p);
  }

  int64_t size_, offset_;
  __m512i mask_, shifts_;
};

// One side's vectors as levels, a byte each.
class LevelsReader {
 public:
  LevelsReader(const Side& side, int64_t head_dim) : side_(side), head_dim_(head_dim) {
    const bool in_planes = !side.runs.count && side.bits < 8 && Plane::Serves(side.bits, head_dim);
    const bool three = side.bits == 3;  // two bits of all, and then one
    for (int64_t first = 0; first < head_dim; first += kNumbers) {
      if (RunLevels::Serves(side, head_dim)) runs_.emplace_back(side, first);
      if (in_planes) planes_.emplace_back(three ? 2 : side.bits, 0, head_dim, first);
      if (in_planes && three) thirds_.emplace_back(1, head_dim / 4, head_dim, first);
    }
  }

  // Whether vectors are read as they lie.
  bool AsStored() const { return !side_.runs.count && side_.bits == 8; }

  // Of 16 tokens, one's after the other's; a head's are `offset` bytes from where tokens begin.
  void Copy(const char* const* tokens, int64_t offset, char* copy) const {
    if (runs_.empty() && planes_.empty()) {
      for (int token = 0; token < kTile; ++token)
        Levels(side_, head_dim_, tokens[token] + offset, (int8_t*)copy + token * head_dim_);
      return;
    }
    const int64_t slices = head_dim_ / kNumbers;
    for (int64_t slice = 0; slice < slices; ++slice, copy += kNumbers) {
      if (!runs_.empty()) {
        const auto copy_runs = side_.bytes <= kNumbers ? &LevelsReader::CopyRuns<false>
                                                       : &LevelsReader::CopyRuns<true>;
        (this->*copy_runs)(slice, tokens, offset, copy);
        continue;
      }
      const int64_t size = planes_[slice].size();
      const auto copy_planes = size >= 64   ? &LevelsReader::CopyPlanes<64>
                               : size == 32 ? &LevelsReader::CopyPlanes<32>
                               : size == 16 ? &LevelsReader::CopyPlanes<16>
                                            : &LevelsReader::CopyPlanes<8>;
      (this->*copy_planes)(slice, tokens, offset, copy);
    }
  }

 private:
  static constexpr int kNumbers = 64;

  template <bool kLong>
  void CopyRuns(int64_t slice, const char* const* tokens, int64_t offset, char* copy) const {
    const RunLevels own = runs_[slice];  // in registers
    LookUp(tokens, offset, copy, [&](const char* vector) { return own.Of<kLong>(vector); });
  }

  template <int kSize>
  void CopyPlanes(int64_t slice, const char* const* tokens, int64_t offset, char* copy) const {
    const __m512i levels = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)side_.levels));
    const Plane low = planes_[slice];
    if (thirds_.empty())
      return LookUp(tokens, offset, copy, [&](const char* vector) {
        return _mm512_shuffle_epi8(levels, low.Of<kSize>(vector));
      });
    const auto with_third = [&](auto size) {
      const Plane high = thirds_[slice];
      LookUp(tokens, offset, copy, [&](const char* vector) {
        const __m512i third = _mm512_slli_epi64(high.Of<decltype(size)::value>(vector), 2);
        return _mm512_shuffle_epi8(levels, _mm512_or_si512(low.Of<kSize>(vector), third));
      });
    };
    if (thirds_[slice].size() >= 64) return with_third(Number<64>{});
    with_third(Number<std::max(8, kSize / 2)>{});  // half as many bytes
  }

  template <typename LevelsOf>
  void LookUp(const char* const* tokens, int64_t offset, char* copy,
              const LevelsOf& levels_of) const {
    const int64_t stride = head_dim_;
    UNROLL for (int token = 0; token < kTile; ++token)
      _mm512_storeu_si512(copy + token * stride, levels_of(tokens[token] + offset));
  }

  const Side& side_;
  const int64_t head_dim_;
  // Of each 64 numbers.
  std::vector<RunLevels> runs_;
  std::vector<Plane> planes_, thirds_;
};

struct WholeNumbers {
  static constexpr int kNumbers = 64;  // of a vector, in a tile's row
  typedef LevelsReader Reader;

  // A query as whole numbers of three signed digits of 8 bits, the highest first: row k takes digits p
  // of numbers 4k to 4k + 3 as the four bytes of lane 4p + g. Adds up the digits; returns the unit.
  static float PutDigits(const float* query, int64_t head_dim, int g, Line* rows,
                         int32_t (&sums)[3]) {
    Vec most = {}, none = {};  // none: 0, or NaN where a number is not finite
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const Vec numbers = Load(query + d);
      most = Larger(Larger(numbers, -numbers), most), none += numbers * 0.0f;
    }
    none = Together<kLanes>(none, Added);
    const float unit = Together<kLanes>(most, Larger)[0] / kMostSigned + none[0];
    if (!(unit > 0)) return unit;  // zeros; or not finite, as all scores then
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      Ints numbers = (Ints)_mm512_cvtps_epi32((__m512)(Load(query + d) / unit));
      for (int part = 2; part >= 0; --part) {
        const Ints digits = numbers << 24 >> 24;
        numbers = (numbers - digits) >> 8;
        sums[part] += _mm512_reduce_add_epi32((__m512i)digits);
        int32_t fours[4];
        _mm_storeu_si128((__m128i*)fours, _mm512_cvtepi32_epi8((__m512i)digits));
        for (int i = 0; i < 4; ++i)
          std::memcpy(&rows[d / 4 + i].lanes[part * kQueries + g], &fours[i], 4);
      }
    }
    return unit;
  }

 protected:
  static constexpr float kMostSigned = (1 << 23) - (1 << 16), kMostUnsigned = (1 << 24) - 8;

  static Vec Whole(const int32_t* numbers) {
    return __builtin_convertvector(*(const Ints*)numbers, Vec);
  }
};

}  // namespace jaxkv
#endif
