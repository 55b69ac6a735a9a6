// The online softmax of a unit of attention: some slots of one query, and for every query head
// that reads them a running maximum and total.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "centre.h"
#include "slots.h"
#include "vectors.h"

namespace jaxkv {

constexpr float kLowest = -1e30f;  // a finite "minus infinity"

// Codes of several widths in one vector, one run of numbers after the other.
struct Runs {
  static constexpr int64_t kMostLevels = 64;

  int64_t count = 0;                 // 0 for a vector of one width
  const int32_t* widths;             // [count, 2]: bits of a code, and how many numbers have them
  const int8_t* levels;              // [count, kMostLevels]
  const float* scales;               // [256]: what a byte for the scale stands for
  const uint8_t* of_slots;           // [slots, heads]: these bytes
};

// How one side's vectors are stored: elements, or codes of `bits` that stand for whole `levels`.
struct Side {
  const char* vectors;               // [slots, heads, bytes]
  int64_t bytes;                     // of a vector
  const uint16_t* scales = nullptr;  // bfloat16 [slots, heads]
  int64_t bits = 0;                  // 0 for elements
  const int8_t* levels = nullptr;    // [16]
  Runs runs;                         // in place of `scales` and `levels`

  const char* Row(int64_t slot, int64_t heads) const { return vectors + slot * heads * bytes; }
  bool HasScales() const { return scales || runs.count; }
};

// One layer, and the queries that read it.
struct Attention {
  Side keys, values;
  const float* queries;  // [queries, heads, group, head_dim], scaled
  const float* sinks;    // [heads, group]
  float* out;            // like queries
  float* log_total;      // [queries, heads, group]: of all scores' exponentials, the sink's too
  float* second_share;   // likewise: of probability, that went to values of the second centre
  int64_t heads, group, head_dim;
  float softcap;
  Slots slots;
  Centring centre;

  int64_t chunks = 1;      // of the query that has most
  float* arranged;         // queries, as the units want them
  float *highest, *total, *second;  // [queries, rows, chunks]
  float* mix;              // [queries, chunks, rows, head_dim]

  int64_t most_chunks = 1, smallest = kBlock;  // chunks, and slots of one

  int64_t rows() const { return heads * group; }
  int64_t Chunks(int64_t q) const {
    return std::clamp<int64_t>((slots.End(q) - slots.Begin(q)) / smallest, 1, most_chunks);
  }
  float* MixOf(int64_t q, int64_t chunk, int64_t row) {
    return &mix[((q * chunks + chunk) * rows() + row) * head_dim];
  }
};

// Query heads that share a KV head: up to 4 where tokens are taken 4 at a time, else one.
struct Rows {
  int64_t head, row;  // row: of all queries
  int count;
  float* scores = nullptr;  // [steps][kLanes]; lane g * K + i
  Vec highest = Vec{} + kLowest, total = Vec{}, second = Vec{};
  // Of the last block: each lane's highest, and what it left of all that was mixed before.
  Vec most = Vec{}, keep = Vec{};
};

// Scales of a block's codes, which are left out of the products. A sign says that a vector was
// stored less the second centre.
template <int K>
class Scales {
 public:
  template <typename Order>
  void Load(const Side& side, int64_t heads, const Block& block, Order order) {
    wide_.resize(side.HasScales() ? heads * kBlock / kLanes : 0);
    if (!side.HasScales()) return;
    const int steps = block.Steps<K>();
    int64_t vectors[kBlock];  // of the first head
    for (int step = 0; step < steps; ++step)
      for (int i = 0; i < K; ++i)
        vectors[step * K + i] = block.Slot(order.Token(step, i)) * heads;
    const auto load = [&](const auto* scales, const auto& wide) {
      float* to = wide_.data()->lanes;
      for (int64_t head = 0; head < heads; ++head, ++scales, to += kBlock)
#pragma GCC unroll 8
        for (int i = 0; i < steps * K; ++i) to[i] = wide(scales[vectors[i]]);
    };
    if (side.runs.count)
      load(side.runs.of_slots, [&](uint8_t scale) { return side.runs.scales[scale]; });
    else
      load(side.scales, [](uint16_t scale) { return Widen(scale); });
  }
  explicit operator bool() const { return !wide_.empty(); }
  // Of a step's tokens, for each query: a part of the lanes.
  Part At(int64_t head, int step, int part) const {
    const float* of_tokens = Of(head) + step * K;
    return K == kLanes ? LoadPart(of_tokens + part * kPart) : LoadFours(of_tokens);
  }
  // Which of a block's tokens were stored less the second centre, a bit each.
  template <typename Order>
  uint64_t OfSecond(int64_t head, int steps, Order order) const {
    if (!*this) return 0;
    const float* const scales = Of(head);
    Ints signs = {};
    for (int step = 0; step < steps * K; step += kLanes) signs |= (Ints)jaxkv::Load(scales + step);
    if (!Any(signs < 0)) return 0;
    uint64_t tokens = 0;
    for (int step = 0; step < steps; ++step)
      for (int i = 0; i < K; ++i)
        tokens |= (uint64_t)std::signbit(scales[step * K + i]) << order.Token(step, i);
    return tokens;
  }

 private:
  const float* Of(int64_t head) const { return wide_.data()->lanes + head * kBlock; }

  std::vector<Line> wide_;  // [heads][tokens]
};

inline Part Magnitudes(Part scales) { return (Part)((PartInts)scales & 0x7fffffff); }

// The scores of some rows with a block, of which the last step may not be full.
template <int K, bool kFull, typename Order>
class Scores {
 public:
  Scores(const Block& block, Order order, float* scores)
      : scores_(scores), count_(block.count), steps_(block.Steps<K>()),
        stride_(order.Token(1, 0) - order.Token(0, 0)) {
    for (int i = 0; i < kLanes; ++i) first_[i] = order.Token(0, i % K);
  }

  // function(step, part, scores), for all scores.
  template <typename Function>
  void ForAll(const Function& function) const {
    for (int step = 0; step < steps_; ++step)
      UNROLL for (int part = 0; part < kParts; ++part)
        function(step, part, scores_ + step * kLanes + part * kPart);
  }

  Part OfTokens(Part v, int step, int part, float where_none) const {
    if constexpr (kFull) return v;
    const PartInts tokens = *reinterpret_cast<const PartInts*>(first_ + part * kPart);
    return tokens + step * stride_ < count_ ? v : Part{} + where_none;
  }

 private:
  float* const scores_;
  const int count_, steps_, stride_;
  int32_t first_[kLanes];  // each lane's token, at step 0
};

// function(scores), of a kind for full blocks or for others.
template <int K, typename Order, typename Function>
void WithScores(const Block& block, Order order, const Rows& rows, const Function& function) {
  if (block.count == block.Steps<K>() * K)
    function(Scores<K, true, Order>(block, order, rows.scores));
  else
    function(Scores<K, false, Order>(block, order, rows.scores));
}

// Scores in a block's order, [queries][kBlock], as lanes have them.
template <int K, typename Order>
const float* InLanes(Order order, int steps, int count, const float* scores, float* lanes) {
  if constexpr (std::is_same_v<Order, InTurn<kLanes>>) return scores;
  for (int g = 0; g < count; ++g)
    for (int step = 0; step < steps; ++step)
      for (int i = 0; i < K; ++i)
        lanes[step * kLanes + g * K + i] = scores[g * kBlock + order.Token(step, i)];
  return lanes;
}

// Products of codes to scores: times their scales, with what the vectors were stored less (of
// queries of which these rows are those from `first` on), and capped. Keeps the highest of each lane.
template <int K, typename Order>
void Complete(const Block& block, Order order, float softcap, const Scales<K>& key_scales,
              const float* of_centre, int64_t first, Rows& rows) {
  const int steps = block.Steps<K>();
  float lanes[kBlock * kLanes / K];  // those of no query stay what they are
  if (of_centre)
    of_centre = InLanes<K>(order, steps, rows.count, of_centre + first * kBlock, lanes);
  const auto completed = [&](int step, int part, const float* scores) {
    Part score = LoadPart(scores);
    if (key_scales) score *= Magnitudes(key_scales.At(rows.head, step, part));
    if (of_centre) score += LoadPart(of_centre + step * kLanes + part * kPart);
    return score;
  };
  WithScores<K>(block, order, rows, [&](const auto& all) {
    if (softcap > 0) {
      all.ForAll([&](int step, int part, float* scores) {
        StorePart(scores, completed(step, part, scores));
      });
      for (int step = 0; step < steps; ++step) {
        const Vec score = Load(rows.scores + step * kLanes);
        Store(rows.scores + step * kLanes, softcap * Tanh(score / softcap));
      }
    }
    Part most[kParts];
    std::memcpy(most, &rows.highest, sizeof most);
    all.ForAll([&](int step, int part, float* scores) {
      Part score = softcap > 0 ? LoadPart(scores) : completed(step, part, scores);
      score = all.OfTokens(score, step, part, kLowest);
      StorePart(scores, score);
      most[part] = score > most[part] ? score : most[part];
    });
    std::memcpy(&rows.most, most, sizeof most);
  });
}

// Where there is a new highest score, all that was mixed so far shrinks.
template <int K>
void Raise(Rows& rows) {
  const Vec highest = Together<K>(rows.most, Larger);
  rows.keep = Exp(rows.highest - highest);
  rows.total *= rows.keep, rows.second *= rows.keep;
  rows.highest = highest;
}

// Scores to weights.
template <int K, typename Order>
void Weigh(const Block& block, Order order, const Scales<K>& value_scales, Rows& rows) {
  Part highest[kParts], total[kParts], second[kParts];
  std::memcpy(highest, &rows.highest, sizeof highest);
  std::memcpy(total, &rows.total, sizeof total);
  std::memcpy(second, &rows.second, sizeof second);
  WithScores<K>(block, order, rows, [&](const auto& all) {
    const auto weight_of = [&](int step, int part, float* scores) {
      const Part exponential = ExpOfPart(LoadPart(scores) - highest[part]);
      const Part weight = all.OfTokens(exponential, step, part, 0);
      total[part] += weight;
      return weight;
    };
    if (value_scales)
      all.ForAll([&](int step, int part, float* scores) {
        const Part weight = weight_of(step, part, scores);
        const Part scales = value_scales.At(rows.head, step, part);
        second[part] += (PartInts)scales < 0 ? weight : Part{};
        StorePart(scores, weight * Magnitudes(scales));
      });
    else
      all.ForAll([&](int step, int part, float* scores) {
        StorePart(scores, weight_of(step, part, scores));
      });
  });
  std::memcpy(&rows.total, total, sizeof total);
  std::memcpy(&rows.second, second, sizeof second);
}

// What was mixed so far, of up to kLanes / K queries.
template <int K>
void Shrink(const Rows& rows, int64_t head_dim, float* mix) {
  for (int g = 0; g < rows.count; ++g, mix += head_dim) {
    const float keep = rows.keep[g * K];
    if (keep == 1) continue;
    for (int64_t d = 0; d < head_dim; d += kLanes) Store(mix + d, Load(mix + d) * keep);
  }
}

// What a unit found out, for `Join`.
template <int K>
void Report(Attention& job, const Rows& rows, int64_t chunk) {
  const Vec total = Together<K>(rows.total, Added), second = Together<K>(rows.second, Added);
  for (int g = 0; g < rows.count; ++g) {
    job.highest[(rows.row + g) * job.chunks + chunk] = rows.highest[g * K];
    job.total[(rows.row + g) * job.chunks + chunk] = total[g * K];
    job.second[(rows.row + g) * job.chunks + chunk] = second[g * K];
  }
}

}  // namespace jaxkv
