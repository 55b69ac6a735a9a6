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
inline Vec Score(const T* const (&keys)[K], const float* queries, int64_t head_dim) {
  Vec sums[kLanes] = {};
  auto add = [&](auto number, int64_t d) {
    constexpr int N = decltype(number)::value;
    Vec query[G][N];
    UNROLL for (int g = 0; g < G; ++g) LoadMany(queries + g * head_dim + d, query[g]);
    UNROLL for (int i = 0; i < K; ++i) {
      Vec key[N];
      LoadMany(keys[i] + d, key);
      UNROLL for (int g = 0; g < G; ++g)
        UNROLL for (int n = 0; n < N; ++n) sums[g * K + i] += key[n] * query[g][n];
    }
  };
  int64_t d = 0;
  for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) add(Number<2>{}, d);
  if (d < head_dim) add(Number<1>{}, d);
  return SumEach(sums);
}

// mix[g] += weights[g * K + i] * values[i], for K tokens and G queries of one KV head.
template <typename T, int G, int K>
inline void Mix(const T* const (&values)[K], const float* weights, int64_t head_dim, float* mix) {
  auto add = [&](auto number, int64_t d) {
    constexpr int N = decltype(number)::value;
    Vec sums[G][N];
    UNROLL for (int g = 0; g < G; ++g) LoadMany(mix + g * head_dim + d, sums[g]);
    UNROLL for (int i = 0; i < K; ++i) {
      Vec value[N];
      LoadMany(values[i] + d, value);
      UNROLL for (int g = 0; g < G; ++g)
        UNROLL for (int n = 0; n < N; ++n) sums[g][n] += weights[g * K + i] * value[n];
    }
    UNROLL for (int g = 0; g < G; ++g)
      UNROLL for (int n = 0; n < N; ++n) Store(mix + g * head_dim + d + n * kLanes, sums[g][n]);
  };
  int64_t d = 0;
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
