// The products of attention in the processor's vectors: K tokens and G queries of one KV head.
#pragma once
#include <cstdint>
#include <type_traits>

#include "vectors.h"

namespace jaxkv {

template <int N>
using Number = std::integral_constant<int, N>;

// The scores of K tokens and G queries of one KV head: lane g * K + i.
template <typename T, int G, int K>
inline Vec Score(const T* const* keys, const float* queries, int64_t head_dim) {
  // Tokens whose sums are in registers at once.
  constexpr int kAtOnce = kParts == 1 ? K : G == 1 ? 4 : G < 4 ? 2 : 1;
  constexpr int kLoaded = kParts == 1 ? kAtOnce : 1;  // of these, likewise
  Part sums[kParts][kPart];  // lane g * K + i, folded; those of no query are zero
  UNROLL for (int lane = G * K; lane < kLanes; ++lane) sums[lane / kPart][lane % kPart] = Part{};
  UNROLL for (int first = 0; first < K; first += kAtOnce) {
    Part some[G][kAtOnce][kParts] = {};
    auto add = [&](auto number, int64_t d) ALWAYS_INLINE {
      constexpr int N = decltype(number)::value;
      UNROLL for (int i = 0; i < kAtOnce; i += kLoaded) {
        Part key[kLoaded][N][kParts];
        UNROLL for (int j = 0; j < kLoaded; ++j) {
          LoadMany(keys[first + i + j] + d, key[j]);
          if (G > 1) KeepInRegisters(key[j]);
        }
        UNROLL for (int g = 0; g < G; ++g) {
          Part query[N][kParts];
          LoadMany(queries + g * head_dim + d, query);
          KeepInRegisters(query);
          UNROLL for (int n = 0; n < N; ++n)
            UNROLL for (int part = 0; part < kParts; ++part)
              UNROLL for (int j = 0; j < kLoaded; ++j)
                some[g][i + j][part] += key[j][n][part] * query[n][part];
        }
      }
    };
    int64_t d = 0;
    for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) add(Number<2>{}, d);
    if (d < head_dim) add(Number<1>{}, d);
    UNROLL for (int g = 0; g < G; ++g)
      UNROLL for (int i = 0; i < kAtOnce; ++i) {
        const int lane = g * K + first + i;
        sums[lane / kPart][lane % kPart] = Folded(some[g][i]);
      }
  }
  return SumEach(sums);
}

// mix[g] += weights[step][g * K + i] * values[step][i], for G queries of one KV head.
template <typename T, int G, int K>
inline void Mix(const T* const* values, const float* weights, int steps, int64_t head_dim,
                float* mix) {
  auto add = [&](auto number, int64_t d) ALWAYS_INLINE {
    constexpr int N = decltype(number)::value;
    Part sums[G][N][kParts];
    UNROLL for (int g = 0; g < G; ++g) LoadMany(mix + g * head_dim + d, sums[g]);
    for (int step = 0; step < steps; ++step)
      UNROLL for (int i = 0; i < K; ++i) {
        Part value[N][kParts];
        LoadMany(values[step * K + i] + d, value);
        if (G > 1) KeepInRegisters(value);
        UNROLL for (int g = 0; g < G; ++g)
          UNROLL for (int n = 0; n < N; ++n)
            UNROLL for (int part = 0; part < kParts; ++part)
              sums[g][n][part] += weights[step * kLanes + g * K + i] * value[n][part];
      }
    UNROLL for (int g = 0; g < G; ++g) StoreMany(mix + g * head_dim + d, sums[g]);
  };
  int64_t d = 0;
  if constexpr (kParts == 1)  // a weight serves as many numbers as there are registers for
    for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes) add(Number<4>{}, d);
  for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) add(Number<2>{}, d);
  if (d < head_dim) add(Number<1>{}, d);
}

// function(G) for up to kLanes / K queries.
template <int K, typename Function>
inline void WithCount(int count, const Function& function) {
  if (K == kLanes || count == 1) function(Number<1>{});
  if constexpr (K != kLanes) {
    if (count == 2) function(Number<2>{});
    if (count == 3) function(Number<3>{});
    if (count == 4) function(Number<4>{});
  }
}

}  // namespace jaxkv
