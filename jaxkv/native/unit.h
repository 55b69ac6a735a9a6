// A unit of attention in the processor's vectors, for every element type.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "ahead.h"
#include "centre.h"
#include "codes.h"
#include "online.h"
#include "vector_products.h"

namespace jaxkv {

// Tokens K at a time: 16 for one query a KV head, else 4 and up to 4 queries.
template <typename T, int K>
class Unit {
 public:
  static constexpr int kWays = kWaysOf<T>;  // in which mixes hold their numbers

  // All queries, in the order in which elements are loaded.
  static void Arrange(Attention& job, Scratch& scratch) {
    const int64_t rows = job.slots.Queries() * job.rows(), size = job.head_dim;
    job.arranged = scratch.Room(rows * size);
    for (int64_t row = 0; row < rows; ++row)
      jaxkv::Arrange<T>(job.queries + row * size, job.arranged + row * size, size);
  }

  // Query q and the KV heads that have key positions' list `list`. The first of a chunk's queries
  // fetches for all.
  Unit(Attention& job, int64_t q, int64_t list, int64_t chunk, const Blocks& blocks, bool first)
      : job_(job), q_(q), chunk_(chunk), first_(first), blocks_(blocks), centre_(job.centre) {
    const int64_t heads = job.heads / job.slots.lists;
    constexpr int kMost = K == kLanes ? 1 : kLanes / K;
    for (int64_t head = list * heads; head < (list + 1) * heads; ++head)
      for (int64_t g = 0; g < job.group; g += kMost) {
        const int64_t row = head * job.group + g;
        const int count = std::min<int64_t>(kMost, job.group - g);
        rows_.push_back({head, q * job.rows() + row, count});
        std::fill_n(job.MixOf(q, chunk, row), count * job.head_dim, 0.0f);
      }
    scores_.resize(rows_.size() * kScores);
    for (size_t i = 0; i < rows_.size(); ++i) rows_[i].scores = &scores_[i * kScores];
  }

  // A block of slots; false if none was left.
  bool Step() {
    if (!blocks_.Advance()) return false;
    const Block& block = blocks_.Now();
    const InRuns order{block.Steps<K>()};
    Ahead ahead(job_, rows_.front().head, rows_.back().head + 1, blocks_.Next(),
                first_ ? 2 * order.steps * rows_.size() : 0);
    key_scales_.Load(job_.keys, job_.heads, block, order);
    value_scales_.Load(job_.values, job_.heads, block, order);
    centre_.Start(block);
    ForEachHead<1>(job_.keys, block, [&](auto g, Rows& rows, int step, int, auto keys) {
      constexpr int G = decltype(g)::value;
      ahead.Fetch();
      const float* queries = &job_.arranged[rows.row * job_.head_dim];
      Store(rows.scores + step * kLanes, Score<Wide, G, K>(keys, queries, job_.head_dim));
    });
    for (Rows& rows : rows_) {
      const float* of_centre =
          centre_.Of(rows.row, rows.count, key_scales_.OfSecond(rows.head, order.steps, order));
      Complete<K>(block, order, job_.softcap, key_scales_, of_centre, 0, rows);
      Raise<K>(rows);
      Weigh<K>(block, order, value_scales_, rows);
      Shrink<K>(rows, job_.head_dim, MixOf(rows));
    }
    ForEachHead<kStepsOfMix>(
        job_.values, block, [&](auto g, Rows& rows, int step, int steps, auto values) {
          constexpr int G = decltype(g)::value;
          for (int i = 0; i < steps; ++i) ahead.Fetch();
          const float* weights = rows.scores + step * kLanes;
          Mix<Wide, G, K>(values, weights, steps, job_.head_dim, MixOf(rows));
        });
    return true;
  }

  void Finish() {
    for (Rows& rows : rows_) Report<K>(job_, rows, chunk_);
  }

 private:
  static constexpr int kScores = kBlock / K * kLanes;
  static constexpr int kStepsOfMix = kLanes / K;  // whose values are added up in registers
  // Codes are widened some tokens at a time; elements are in the products.
  static constexpr bool kCodes = std::is_same_v<T, Code>;
  using Wide = std::conditional_t<kCodes, float, T>;

  float* MixOf(const Rows& rows) {
    return job_.MixOf(q_, chunk_, rows.row - q_ * job_.rows());
  }

  // function(G, rows, step, steps, vectors) for all KV heads, `kAtOnce` steps of a block at a time, of
  // whose tokens these are the vectors. So memory is read in order.
  template <int kAtOnce, typename Function>
  void ForEachHead(const Side& side, const Block& block, const Function& function) {
    const InRuns order{block.Steps<K>()};
    const int64_t row = job_.heads * job_.head_dim;
    if constexpr (kCodes) widened_.resize(kAtOnce * K * row);
    for (int step = 0; step < order.steps; step += kAtOnce) {
      const int steps = std::min(kAtOnce, order.steps - step);
      const Wide *tokens[kAtOnce * K], *vectors[kAtOnce * K];
      for (int i = 0; i < steps * K; ++i) {
        const char* stored = side.Row(block.Slot(order.Token(step + i / K, i % K)), job_.heads);
        tokens[i] = kCodes ? Widened(side, stored, &widened_[i * row]) : (const Wide*)stored;
      }
      for (Rows& rows : rows_) {
        for (int i = 0; i < steps * K; ++i) vectors[i] = tokens[i] + rows.head * job_.head_dim;
        WithCount<K>(rows.count, [&](auto g) { function(g, rows, step, steps, vectors); });
      }
    }
  }

  // One token's vectors, of this unit's heads.
  const Wide* Widened(const Side& side, const char* stored, float* wide) const {
    for (int64_t head = rows_.front().head; head <= rows_.back().head; ++head)
      WidenCodes(side, job_.head_dim, stored + head * side.bytes, wide + head * job_.head_dim);
    return (const Wide*)wide;
  }

  Attention& job_;
  const int64_t q_, chunk_;
  const bool first_;
  Blocks blocks_;
  std::vector<Rows> rows_;
  std::vector<float> scores_, widened_;
  Scales<K> key_scales_, value_scales_;
  Centre centre_;
};

}  // namespace jaxkv
