// The products of attention in the processor's vectors, of whole numbers: products of four bytes of
// one side, not negative, and four of the other, added up in each lane (AVX-512 VNNI).
#pragma once
#include "whole_numbers.h"
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define JAXKV_VNNI 1

namespace jaxkv {

struct Vnni : WholeNumbers {
  static constexpr int kWays = 1;         // mixes hold their numbers in order
  static constexpr int kTokens = kLanes;  // whose scores with one query stand together

  static bool Serves(const Attention&) { return true; }
  struct InUse {};

  // Rows of digits; after them, what sums begin with. Levels are larger by 128 in the products, so
  // that none is negative.
  static void Arrange(const float* queries, int count, int64_t head_dim, Line* lines) {
    const int64_t rows = head_dim / 4;
    std::memset(lines, 0, (rows + 1) * sizeof(Line));
    Start& start = (Start&)lines[rows];
    for (int g = 0; g < count; ++g) {
      int32_t sums[3] = {};
      start.units[g] = PutDigits(queries + g * head_dim, head_dim, g, lines, sums);
      for (int part = 0; part < 3; ++part) start.sums[part][g] = -128 * sums[part];
    }
  }

  static void Score(const Line* queries, const Source (&sources)[kGroups], int groups,
                    int64_t slices, int count, Ahead& ahead, float* scores) {
    WithCount<kQueries>(count, [&](auto number) {
      constexpr int G = decltype(number)::value;
      for (int group = 0; group < groups; ++group) {
        for (int64_t slice = 0; slice < slices; ++slice) ahead.Fetch();
        if (group + 1 < groups && !sources[group + 1].near)
          FetchNear(sources[group + 1], slices);
        Multiply<G>(queries, sources[group], slices, scores + group * kTile);
        for (int64_t slice = 0; slice < slices; ++slice) ahead.Fetch();
      }
    });
  }
  static int64_t FetchesOfScore(int64_t slices, int groups) { return 2 * slices * groups; }

  // Adds a block to the mixes of up to 4 queries.
  static void Mix(const float* scores, const Source (&sources)[kGroups], int groups,
                  int64_t slices, Ahead& ahead, int count, int64_t head_dim, float* mix) {
    const Weights weights(scores, groups, count);
    WithCount<kQueries>(count, [&](auto number) {
      constexpr int G = decltype(number)::value;
      for (int64_t slice = 0; slice < slices; ++slice) {
        Vec sums[G][4];
        for (int group = 0; group < groups; ++group) ahead.Fetch();
        AddUp<G, false>(weights, sources, groups, slice, sums);
        for (int group = 0; group < groups; ++group) ahead.Fetch();
        AddUp<G, true>(weights, sources, groups, slice, sums);
        UNROLL for (int g = 0; g < G; ++g) {
          TransposeFours(sums[g]);
          float* to = mix + g * head_dim + slice * kNumbers;
          UNROLL for (int i = 0; i < 4; ++i)
            Store(to + i * kLanes, Load(to + i * kLanes) + sums[g][i] * weights.units[g]);
        }
      }
    });
  }
  static int64_t FetchesOfMix(int64_t slices, int groups) { return 2 * slices * groups; }

 private:
  struct Start {
    float units[kQueries];
    int32_t sums[3][kQueries];
  };
  static_assert(sizeof(Start) == sizeof(Line));

  // Weights of a block, in units of each query's largest.
  struct Weights {
    float units[kQueries];
    alignas(64) int32_t fours[3][kQueries][kBlock / 4];  // digits of four tokens side by side

    Weights(const float* weights, int groups, int count) {
      Vec most[kQueries], none[kQueries];  // none: 0, or NaN where a weight is not finite
      for (int g = 0; g < count; ++g) {
        most[g] = none[g] = Vec{};
        for (int group = 0; group < groups; ++group) {
          const Vec some = Load(weights + g * kBlock + group * kLanes);
          most[g] = Larger(some, most[g]), none[g] += some * 0.0f;
        }
      }
      for (int g = 0; g < count; ++g) most[g] = Together<kLanes>(most[g], Larger);
      for (int g = 0; g < count; ++g) {
        units[g] = AnyNaN(none[g]) ? std::nanf("") : most[g][0] / kMostUnsigned;
        const Vec steps = most[g] > 0 ? kMostUnsigned / most[g] : Vec{};
        for (int group = 0; group < groups; ++group) {
          const Vec fixed = Load(weights + g * kBlock + group * kLanes) * steps + 0.5f;
          const Words words = (Words)__builtin_convertvector(fixed, Ints);
          UNROLL for (int part = 0; part < 3; ++part)
            _mm_store_si128((__m128i*)&fours[part][g][4 * group],
                            _mm512_cvtepi32_epi8((__m512i)(words >> (16 - 8 * part))));
        }
      }
    }

    static bool AnyNaN(Vec v) {
      return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q) != 0;
    }
  };

  // By the instruction's name: GCC 12 copies the sums of its intrinsic, and many of them spill.
  static void AddProducts(__m512i& sums, __m512i digits, __m512i numbers) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(digits), "v"(numbers));
  }
  // With the same four numbers in every lane.
  static void AddProducts(__m512i& sums, __m512i numbers, const float* four) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(numbers), "m"(*four));
  }

  // Into the nearest cache, since all of it is asked for at once.
  static void FetchNear(const Source& source, int64_t slices) {
    for (int token = 0; token < kTile; ++token)
      for (int64_t slice = 0; slice < slices; ++slice)
        __builtin_prefetch(source.vectors + token * source.stride + slice * kNumbers);
  }

  // The scores of 16 tokens with G queries. (On its own, so that sums stay in registers.)
  template <int G>
  static __attribute__((noinline)) void Multiply(const Line* queries, const Source& source,
                                                 int64_t slices, float* scores) {
    const Start& start = (const Start&)queries[slices * kTile];
    const __m512i flipped = _mm512_set1_epi8((char)0x80);
    __m512i sums[3][G];  // of each query, all tokens
    UNROLL for (int part = 0; part < 3; ++part)
      UNROLL for (int g = 0; g < G; ++g) sums[part][g] = _mm512_set1_epi32(start.sums[part][g]);
#pragma GCC unroll 1
    for (int64_t slice = 0; slice < slices; ++slice, queries += kTile) {
      __m512i quarters[4][4];  // of four tokens: in quarter q of [j], numbers of four 4 q + j
      UNROLL for (int i = 0; i < 4; ++i)
        TakeFours(source.vectors + 4 * i * source.stride + slice * kNumbers, source.stride, i,
                  quarters);
      UNROLL for (int j = 0; j < 4; ++j) {
        Vec fours[4];  // of all tokens
        UNROLL for (int i = 0; i < 4; ++i)
          fours[i] = (Vec)_mm512_xor_si512(quarters[j][i], flipped);
        TransposeFours(fours);
        UNROLL for (int q = 0; q < 4; ++q)
          UNROLL for (int part = 0; part < 3; ++part)
            UNROLL for (int g = 0; g < G; ++g)
              AddProducts(sums[part][g], (__m512i)fours[q],
                          &queries[4 * q + j].lanes[part * kQueries + g]);
      }
    }
    UNROLL for (int g = 0; g < G; ++g)
      Store(scores + g * kBlock, Joined(sums[0][g], sums[1][g], sums[2][g]) * start.units[g]);
  }

  static void TakeFours(const char* vectors, int64_t stride, int i, __m512i (&quarters)[4][4]) {
    __m512i v[4], pairs[4];
    UNROLL for (int j = 0; j < 4; ++j) v[j] = _mm512_loadu_si512(vectors + j * stride);
    UNROLL for (int j = 0; j < 2; ++j) {
      pairs[2 * j] = _mm512_unpacklo_epi32(v[2 * j], v[2 * j + 1]);
      pairs[2 * j + 1] = _mm512_unpackhi_epi32(v[2 * j], v[2 * j + 1]);
    }
    UNROLL for (int j = 0; j < 2; ++j) {
      quarters[2 * j][i] = _mm512_unpacklo_epi64(pairs[j], pairs[j + 2]);
      quarters[2 * j + 1][i] = _mm512_unpackhi_epi64(pairs[j], pairs[j + 2]);
    }
  }

  // Half of a slice's numbers, weighed: of each 16, the first or the second 8, four in a vector.
  template <int G, bool kSecond>
  static __attribute__((noinline)) void AddUp(const Weights& weights,
                                              const Source (&sources)[kGroups], int groups,
                                              int64_t slice, Vec (&sums)[G][4]) {
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
          const __m512i digits = _mm512_set1_epi32(weights.fours[part][g][step]);
          UNROLL for (int i = 0; i < 2; ++i) AddProducts(parts[part][g][i], digits, numbers[i]);
        }
    }
    UNROLL for (int g = 0; g < G; ++g)
      UNROLL for (int i = 0; i < 2; ++i)
        sums[g][2 * kSecond + i] = Joined(parts[0][g][i], parts[1][g][i], parts[2][g][i]);
  }

  // What three digits' sums make.
  static Vec Joined(__m512i high, __m512i middle, __m512i low) {
    return Wide(high) * 65536.0f + (Wide(middle) * 256.0f + Wide(low));
  }
  static Vec Wide(__m512i numbers) { return __builtin_convertvector((Ints)numbers, Vec); }
};

}  // namespace jaxkv
#endif
