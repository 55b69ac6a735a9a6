// The products of attention in the processor's vectors, of whole numbers: products of four bytes of
// one side, not negative, and four of the other, added up in each lane (AVX-512 VNNI).
#pragma once
#include "whole_numbers.h"
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define JAXKV_VNNI 1

namespace jaxkv {

struct Vnni : WholeNumbers {
  static constexpr int kWays = 1;  // mixes hold their numbers in order

  // One query takes a quarter of the columns, and widening int8 for it costs less.
  static bool Serves(const Attention& job) {
    return job.group > 1 || job.keys.bits < 8 || job.values.bits < 8;
  }
  struct InUse {};

  // A query's number is larger by 2^23 here, so that no digit is negative. What that adds to a
  // product is 2^23 times the sum of a token's numbers, of which column 12 + g is.
  static void Arrange(const float* queries, int count, int64_t head_dim, Line* tiles) {
    ArrangeQueries(queries, count, head_dim, tiles, [](int32_t number, int g, uint8_t* byte) {
      const int32_t shifted = number + (1 << 23);
      for (int part = 0; part < 3; ++part)
        byte[4 * (part * kQueries + g)] = shifted >> (16 - 8 * part) & 0xff;
      byte[4 * (3 * kQueries + g)] = 1;
    });
  }

  static void Score(const Line* queries, const Source (&sources)[kGroups], int groups,
                    int64_t slices, Ahead& ahead, float* scores) {
    const Vec units = Load(queries[slices * kTile].lanes);
    for (int group = 0; group < groups; ++group) {
      const Source& source = sources[group];
      for (int64_t slice = 0; slice < 2 * slices; ++slice) ahead.Fetch();
      __m512i sums[kTile] = {};  // of each token, all columns
      for (int64_t slice = 0; slice < slices; ++slice)
        for (int k = 0; k < kTile; ++k) {
          const __m512i digits = _mm512_load_si512(&queries[slice * kTile + k]);
          const char* numbers = source.vectors + slice * kNumbers + 4 * k;
          UNROLL for (int i = 0; i < kTile; ++i)
            AddProducts(sums[i], digits, numbers + i * source.stride);
        }
      UNROLL for (int step = 0; step < kTile / 4; ++step) {
        Vec v[4];
        UNROLL for (int i = 0; i < 4; ++i)
          v[i] = __builtin_convertvector((Ints)sums[4 * step + i], Vec);
        TransposeFours(v);
        v[0] -= v[3] * 128.0f;
        const Vec all = v[0] * 65536.0f + (v[1] * 256.0f + v[2]);
        Store(scores + (4 * group + step) * kLanes, Transposed(all) * units);
      }
    }
  }
  static int64_t FetchesOfScore(int64_t slices, int groups) { return 2 * slices * groups; }

  // Adds a block to the mixes of up to 4 queries.
  static void Mix(const float* scores, const Source (&sources)[kGroups], int groups,
                  int64_t slices, Ahead& ahead, int count, int64_t head_dim, float* mix) {
    const Units of_block(scores, groups);
    Weights weights;
    for (int step = 0; step < groups * kTile / 4; ++step) {
      const Vec fixed = Load(scores + step * kLanes) * of_block.steps + 0.5f;
      const Words words = (Words)__builtin_convertvector(fixed, Ints);
      UNROLL for (int part = 0; part < 3; ++part)
        _mm_store_si128((__m128i*)weights.fours[step][part],
                        _mm512_cvtepi32_epi8((__m512i)(words >> (16 - 8 * part))));
    }
    WithCount<kQueries>(count, [&](auto number) {
      constexpr int G = decltype(number)::value;
      for (int64_t slice = 0; slice < slices; ++slice) {
        Vec sums[G][4];
        AddUp<G, false>(weights, sources, groups, slice, ahead, sums);
        AddUp<G, true>(weights, sources, groups, slice, ahead, sums);
        UNROLL for (int g = 0; g < G; ++g) {
          TransposeFours(sums[g]);
          float* to = mix + g * head_dim + slice * kNumbers;
          UNROLL for (int i = 0; i < 4; ++i)
            Store(to + i * kLanes, Load(to + i * kLanes) + sums[g][i] * of_block.units[4 * g]);
        }
      }
    });
  }
  static int64_t FetchesOfMix(int64_t slices, int groups) { return 2 * slices * groups; }

 private:
  // Digits of weights: of four tokens side by side, for each query.
  struct Weights {
    alignas(64) int32_t fours[kBlock / 4][3][kQueries];
  };

  // By the instruction's name: GCC 12 copies the sums of its intrinsic, and many of them spill.
  static void AddProducts(__m512i& sums, __m512i digits, __m512i numbers) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(digits), "v"(numbers));
  }
  // With the same four numbers in every lane.
  static void AddProducts(__m512i& sums, __m512i digits, const char* four) {
    typedef int32_t Four __attribute__((aligned(1), may_alias));
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(digits), "m"(*(const Four*)four));
  }

  // Half of a slice's numbers, weighed: of each 16, the first or the second 8, four in a vector.
  template <int G, bool kSecond>
  static void AddUp(const Weights& weights, const Source (&sources)[kGroups], int groups,
                    int64_t slice, Ahead& ahead, Vec (&sums)[G][4]) {
    for (int group = 0; group < groups; ++group) ahead.Fetch();
    __m512i parts[3][G][2];
    UNROLL for (int part = 0; part < 3; ++part)
      UNROLL for (int g = 0; g < G; ++g)
        UNROLL for (int i = 0; i < 2; ++i) parts[part][g][i] = _mm512_setzero_si512();
#pragma GCC unroll 1
    for (int step = 0; step < groups * kTile / 4; ++step) {
      const Source& source = sources[step / 4];
      const char* vector = source.vectors + slice * kNumbers + step % 4 * 4 * source.stride;
      __m512i tokens[4];
      UNROLL for (int i = 0; i < 4; ++i)
        tokens[i] = _mm512_loadu_si512(vector + i * source.stride);
      const auto bytes = kSecond ? _mm512_unpackhi_epi8 : _mm512_unpacklo_epi8;
      const __m512i first = bytes(tokens[0], tokens[1]), last = bytes(tokens[2], tokens[3]);
      const __m512i numbers[2] = {_mm512_unpacklo_epi16(first, last),
                                  _mm512_unpackhi_epi16(first, last)};
      UNROLL for (int part = 0; part < 3; ++part)
        UNROLL for (int g = 0; g < G; ++g) {
          const __m512i digits = _mm512_set1_epi32(weights.fours[step][part][g]);
          UNROLL for (int i = 0; i < 2; ++i) AddProducts(parts[part][g][i], digits, numbers[i]);
        }
    }
    UNROLL for (int g = 0; g < G; ++g)
      UNROLL for (int i = 0; i < 2; ++i)
        sums[g][2 * kSecond + i] = Wide(parts[0][g][i]) * 65536.0f +
                                   (Wide(parts[1][g][i]) * 256.0f + Wide(parts[2][g][i]));
  }

  static Vec Wide(__m512i numbers) { return __builtin_convertvector((Ints)numbers, Vec); }
};

}  // namespace jaxkv
#endif
