// A unit of attention in the processor's vectors, for every element type.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "ahead.h"
#include "codes.h"
#include "online.h"

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

// Tokens K at a time: 16 for one query a KV head, else 4 and up to 4 queries.
template <typename T, int K>
class Unit {
 public:
  // KV heads [first_head, end_head) of sequence b.
  Unit(Attention& job, int64_t b, int64_t first_head, int64_t end_head, int64_t chunk)
      : job_(job), b_(b), chunk_(chunk) {
    constexpr int kMost = K == kLanes ? 1 : kLanes / K;
    for (int64_t head = first_head; head < end_head; ++head)
      for (int64_t g = 0; g < job.group; g += kMost) {
        const int64_t row = head * job.group + g;
        const int count = std::min<int64_t>(kMost, job.group - g);
        rows_.push_back({head, b * job.rows() + row, count});
        std::fill_n(job.MixOf(b, chunk, row), count * job.head_dim, 0.0f);
      }
    scores_.resize(rows_.size() * kScores);
    for (size_t i = 0; i < rows_.size(); ++i) rows_[i].scores = &scores_[i * kScores];
  }

  // Logical slots [from, to), seen as key positions' list `list` says.
  void Run(int64_t list, int64_t from, int64_t to) {
    Block blocks[2];
    bool more = job_.slots.Collect(b_, list, from, to, blocks[0]);
    for (int now = 0; more; now ^= 1) {
      more = job_.slots.Collect(b_, list, from, to, blocks[1 - now]);
      const Block& block = blocks[now];
      const InRuns order{block.Steps<K>()};
      Ahead ahead(job_, rows_.front().head, rows_.back().head + 1, blocks[1 - now],
                  2 * order.steps * rows_.size());
      key_scales_.Load(job_.keys.scales, job_.heads, block, order);
      value_scales_.Load(job_.values.scales, job_.heads, block, order);
      ForEach(job_.keys, block, ahead, [&](auto g, int step, const Rows& rows, auto& keys) {
        constexpr int G = decltype(g)::value;
        const float* queries = &job_.arranged[rows.row * job_.head_dim];
        Store(rows.scores + step * kLanes, Score<Wide, G, K>(keys, queries, job_.head_dim));
      });
      for (Rows& rows : rows_)
        Shrink<K>(rows, Softmax(block, order, job_.softcap, key_scales_, value_scales_, rows),
                  job_.head_dim, MixOf(rows));
      ForEach(job_.values, block, ahead, [&](auto g, int step, const Rows& rows, auto& values) {
        constexpr int G = decltype(g)::value;
        Mix<Wide, G, K>(values, rows.scores + step * kLanes, job_.head_dim, MixOf(rows));
      });
    }
    for (Rows& rows : rows_) Report<K>(job_, rows, chunk_);
  }

 private:
  static constexpr int kScores = kBlock / K * kLanes;
  // Codes are widened a head at a time; elements are in the products.
  static constexpr bool kCodes = std::is_same_v<T, Code>;
  using Wide = std::conditional_t<kCodes, float, T>;

  float* MixOf(const Rows& rows) {
    return job_.MixOf(b_, chunk_, rows.row - b_ * job_.rows());
  }

  // function(G, step, rows, pointers) over a block's tokens, elements in memory order.
  template <typename Function>
  void ForEach(const Side& side, const Block& block, Ahead& ahead, const Function& function) {
    const InRuns order{block.Steps<K>()};
    const Wide* of_head[K];
    if constexpr (kCodes) {
      widened_.resize(kBlock * job_.head_dim);
      for (const Rows& rows : rows_) {
        for (int token = 0; token < block.count; ++token)
          WidenCodes(side, job_.head_dim,
                     side.Row(block.slots[token], job_.heads) + rows.head * side.bytes,
                     &widened_[token * job_.head_dim]);
        for (int step = 0; step < order.steps; ++step) {
          for (int i = 0; i < K; ++i)
            of_head[i] = &widened_[std::min(order.Token(step, i), block.count - 1) * job_.head_dim];
          OfCount(rows, step, of_head, function);
        }
      }
    } else {
      for (int step = 0; step < order.steps; ++step) {
        const T* tokens[K];
        for (int i = 0; i < K; ++i)
          tokens[i] = (const T*)side.Row(block.Slot(order.Token(step, i)), job_.heads);
        for (const Rows& rows : rows_) {
          ahead.Fetch();
          UNROLL for (int i = 0; i < K; ++i) of_head[i] = tokens[i] + rows.head * job_.head_dim;
          OfCount(rows, step, of_head, function);
        }
      }
    }
  }

  template <typename Function>
  static void OfCount(const Rows& rows, int step, const Wide* const (&of_head)[K],
                      const Function& function) {
    if (K == kLanes || rows.count == 1) function(Number<1>{}, step, rows, of_head);
    if constexpr (K != kLanes) {
      if (rows.count == 2) function(Number<2>{}, step, rows, of_head);
      if (rows.count == 3) function(Number<3>{}, step, rows, of_head);
      if (rows.count == 4) function(Number<4>{}, step, rows, of_head);
    }
  }

  Attention& job_;
  const int64_t b_, chunk_;
  std::vector<Rows> rows_;
  std::vector<float> scores_, widened_;
  Scales<K> key_scales_, value_scales_;
};

}  // namespace jaxkv
