// A unit of attention: some slots of one sequence, and an online softmax (running maximum, total
// and mix) for every query head that reads them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "slots.h"
#include "vectors.h"

namespace jaxkv {

constexpr float kLowest = -1e30f;  // a finite "minus infinity"

// One layer, and the queries that read it.
struct Attention {
  const void *keys, *values;  // [slots, heads, head_dim]
  const uint16_t *key_scales = nullptr, *value_scales = nullptr;  // bfloat16 [slots, heads]
  const float* queries;  // [batch, heads, group, head_dim], scaled
  const float* sinks;    // [heads, group]
  float* out;            // like queries
  int64_t heads, group, head_dim;
  float softcap;
  Slots slots;

  int64_t chunks = 1;
  float* arranged;         // queries, in the order in which elements are loaded
  float *highest, *total;  // [batch, rows, chunks]
  float* mix;              // [batch, chunks, rows, head_dim]

  int64_t rows() const { return heads * group; }
  float* MixOf(int64_t b, int64_t chunk, int64_t row) {
    return &mix[((b * chunks + chunk) * rows() + row) * head_dim];
  }
};

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
        rows_.push_back({head, b * job.rows() + row, (int)std::min<int64_t>(kMost, job.group - g),
                         &job.arranged[(b * job.rows() + row) * job.head_dim],
                         job.MixOf(b, chunk, row)});
        std::fill_n(rows_.back().mix, rows_.back().count * job.head_dim, 0.0f);
      }
    scores_.resize(rows_.size() * kScores);
    for (size_t i = 0; i < rows_.size(); ++i) rows_[i].scores = &scores_[i * kScores];
  }

  // Logical slots [from, to), seen as key positions' list `list` says.
  void Run(int64_t list, int64_t from, int64_t to) {
    Block block;
    while (job_.slots.Collect(b_, list, from, to, block)) {
      key_scales_.Load(job_.key_scales, job_.heads, block);
      value_scales_.Load(job_.value_scales, job_.heads, block);
      ForEach((const T*)job_.keys, block, [&](auto g, int step, const Rows& rows, auto& keys) {
        constexpr int G = decltype(g)::value;
        Store(rows.scores + step * kLanes, Score<T, G, K>(keys, rows.queries, job_.head_dim));
      });
      for (Rows& rows : rows_) Softmax(block, rows);
      ForEach((const T*)job_.values, block, [&](auto g, int step, const Rows& rows, auto& values) {
        constexpr int G = decltype(g)::value;
        Mix<T, G, K>(values, rows.scores + step * kLanes, job_.head_dim, rows.mix);
      });
    }
    for (Rows& rows : rows_) {
      const Vec total = Together<K>(rows.total, Added);
      for (int g = 0; g < rows.count; ++g) {
        job_.highest[(rows.row + g) * job_.chunks + chunk_] = rows.highest[g * K];
        job_.total[(rows.row + g) * job_.chunks + chunk_] = total[g * K];
      }
    }
  }

 private:
  static constexpr int kScores = kBlock / K * kLanes;

  // Some of the query heads that share a KV head.
  struct Rows {
    int64_t head, row;
    int count;
    const float* queries;
    float* mix;
    float* scores = nullptr;  // [steps][kLanes]; lane g * K + i
    Vec highest = Vec{} + kLowest, total = Vec{};
  };

  // Scales of a block's codes, which are left out of the products.
  struct Scales {
    std::vector<float> wide;  // [heads][steps][K]

    void Load(const uint16_t* scales, int64_t heads, const Block& block) {
      if (!scales) return;
      wide.resize(heads * kBlock);
      for (int step = 0; step < block.Steps<K>(); ++step)
        for (int i = 0; i < K; ++i) {
          const uint16_t* of_slot = scales + block.Slot<K>(step, i) * heads;
          for (int64_t head = 0; head < heads; ++head)
            wide[head * kBlock + step * K + i] = Widen(of_slot[head]);
        }
    }
    // Of a step's tokens, for each query.
    Vec At(int64_t head, int step) const {
      const float* scales = &wide[head * kBlock + step * K];
      if constexpr (K == kLanes) return jaxkv::Load(scales);
      typedef float Four __attribute__((vector_size(16), aligned(4)));
      const Four four = *(const Four*)scales;
      return __builtin_shufflevector(four, four, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    }
  };

  // function(G, step, rows, pointers) over a block's tokens in memory order.
  template <typename Function>
  void ForEach(const T* vectors, const Block& block, const Function& function) {
    const int64_t stride = job_.heads * job_.head_dim;
    for (int step = 0; step < block.Steps<K>(); ++step) {
      const T* tokens[K];
      for (int i = 0; i < K; ++i) tokens[i] = vectors + block.Slot<K>(step, i) * stride;
      for (const Rows& rows : rows_) {
        const T* of_head[K];
        UNROLL for (int i = 0; i < K; ++i) of_head[i] = tokens[i] + rows.head * job_.head_dim;
        if (K == kLanes || rows.count == 1) function(Number<1>{}, step, rows, of_head);
        if constexpr (K != kLanes) {
          if (rows.count == 2) function(Number<2>{}, step, rows, of_head);
          if (rows.count == 3) function(Number<3>{}, step, rows, of_head);
          if (rows.count == 4) function(Number<4>{}, step, rows, of_head);
        }
      }
    }
  }

  // Scores to weights; what was mixed so far shrinks if there is a new highest score.
  void Softmax(const Block& block, Rows& rows) {
    const int steps = block.Steps<K>();
    Ints first;  // each lane's token, at step 0
    for (int i = 0; i < kLanes; ++i) first[i] = i % K * steps;
    Vec most = rows.highest;
    for (int step = 0; step < steps; ++step) {
      Vec score = Load(rows.scores + step * kLanes);
      if (job_.key_scales) score *= key_scales_.At(rows.head, step);
      if (job_.softcap > 0) score = job_.softcap * Tanh(score / job_.softcap);
      score = first + step < block.count ? score : Vec{} + kLowest;
      Store(rows.scores + step * kLanes, score);
      most = Larger(score, most);
    }
    most = Together<K>(most, Larger);
    const Vec keep = Exp(rows.highest - most);
    Vec total = rows.total * keep;
    for (int step = 0; step < steps; ++step) {
      Vec weight = Exp(Load(rows.scores + step * kLanes) - most);
      weight = first + step < block.count ? weight : Vec{};
      total += weight;
      if (job_.value_scales) weight *= value_scales_.At(rows.head, step);
      Store(rows.scores + step * kLanes, weight);
    }
    rows.highest = most, rows.total = total;
    for (int g = 0; g < rows.count; ++g) {
      if (keep[g * K] == 1) continue;
      float* mix = rows.mix + g * job_.head_dim;
      for (int64_t d = 0; d < job_.head_dim; d += kLanes)
        Store(mix + d, Load(mix + d) * keep[g * K]);
    }
  }

  Attention& job_;
  const int64_t b_, chunk_;
  std::vector<Rows> rows_;
  std::vector<float> scores_;
  Scales key_scales_, value_scales_;
};

}  // namespace jaxkv
