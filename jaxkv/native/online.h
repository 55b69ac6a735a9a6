// The online softmax of a unit of attention: some slots of one query, and for every query head
// that reads them a running maximum and total.
#pragma once
#include <algorithm>
#include <cstdint>
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
  const float* levels;               // [count, kMostLevels]
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
  float Scale(int64_t vector) const {
    return runs.count ? runs.scales[runs.of_slots[vector]] : Widen(scales[vector]);
  }
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
};

// Scales of a block's codes, which are left out of the products. A sign says that a vector was
// stored less the second centre.
template <int K>
class Scales {
 public:
  template <typename Order>
  void Load(const Side& side, int64_t heads, const Block& block, Order order) {
    wide_.resize(side.HasScales() ? heads * kBlock : 0);
    if (!side.HasScales()) return;
    for (int step = 0; step < block.Steps<K>(); ++step)
      for (int i = 0; i < K; ++i) {
        const int64_t first = block.Slot(order.Token(step, i)) * heads;
        float* const of_token = &wide_[step * K + i];
        for (int64_t head = 0; head < heads; ++head)
          of_token[head * kBlock] = side.Scale(first + head);
      }
  }
  explicit operator bool() const { return !wide_.empty(); }
  // Of a step's tokens, for each query: a part of the lanes.
  Part At(int64_t head, int step, int part) const {
    const float* of_tokens = &wide_[head * kBlock + step * K];
    return K == kLanes ? LoadPart(of_tokens + part * kPart) : LoadFours(of_tokens);
  }
  // Of these, which were stored less the second centre.
  Ints AreOfSecond(int64_t head, int step) const {
    Part scales[kParts] = {};
    if (*this)
      UNROLL for (int part = 0; part < kParts; ++part) scales[part] = At(head, step, part);
    return *reinterpret_cast<const Ints*>(scales) < 0;
  }

 private:
  std::vector<float> wide_;  // [heads][tokens]
};

inline Part Magnitudes(Part scales) { return (Part)((PartInts)scales & 0x7fffffff); }

// Scores to weights. Returns what becomes of all that was mixed so far, which shrinks if there is a
// new highest score.
template <int K, bool kFull, typename Order>
Vec SoftmaxOf(const Block& block, Order order, float softcap, const Scales<K>& key_scales,
              const Scales<K>& value_scales, const Centre<K>& centre, Rows& rows) {
  const int steps = block.Steps<K>();
  int32_t first[kLanes];  // each lane's token, at step 0
  if constexpr (!kFull)
    for (int i = 0; i < kLanes; ++i) first[i] = order.Token(0, i % K);
  const int stride = order.Token(1, 0) - order.Token(0, 0);
  const auto of_tokens = [&](Part v, int step, int part, float where_none) {
    if constexpr (kFull) return v;
    const PartInts tokens = *reinterpret_cast<const PartInts*>(first + part * kPart);
    return tokens + step * stride < block.count ? v : Part{} + where_none;
  };
  // function(step, part, scores), for all scores.
  const auto for_all = [&](const auto& function) {
    for (int step = 0; step < steps; ++step)
      UNROLL for (int part = 0; part < kParts; ++part)
        function(step, part, rows.scores + step * kLanes + part * kPart);
  };
  if (key_scales)
    for_all([&](int step, int part, float* scores) {
      const Part scales = key_scales.At(rows.head, step, part);
      StorePart(scores, LoadPart(scores) * Magnitudes(scales));
    });
  if (centre || softcap > 0)
    for (int step = 0; step < steps; ++step) {
      Vec score = Load(rows.scores + step * kLanes);
      if (centre)
        score += centre.At(rows.row, rows.count, step, order,
                           key_scales.AreOfSecond(rows.head, step));
      if (softcap > 0) score = softcap * Tanh(score / softcap);
      Store(rows.scores + step * kLanes, score);
    }
  Part highest[kParts], most[kParts], keep[kParts], total[kParts], second[kParts];
  std::memcpy(highest, &rows.highest, sizeof highest);
  std::memcpy(most, &rows.highest, sizeof most);
  for_all([&](int step, int part, float* scores) {
    const Part score = of_tokens(LoadPart(scores), step, part, kLowest);
    if constexpr (!kFull) StorePart(scores, score);
    most[part] = score > most[part] ? score : most[part];
  });
  Vec all;
  std::memcpy(&all, most, sizeof all);
  all = Together<K>(all, Larger);
  std::memcpy(most, &all, sizeof most);
  std::memcpy(total, &rows.total, sizeof total);
  std::memcpy(second, &rows.second, sizeof second);
  UNROLL for (int part = 0; part < kParts; ++part) {
    keep[part] = ExpOfPart(highest[part] - most[part]);
    total[part] *= keep[part], second[part] *= keep[part];
  }
  const auto weight_of = [&](int step, int part, float* scores) {
    const Part exponential = ExpOfPart(LoadPart(scores) - most[part]);
    const Part weight = of_tokens(exponential, step, part, 0);
    total[part] += weight;
    return weight;
  };
  if (value_scales)
    for_all([&](int step, int part, float* scores) {
      const Part weight = weight_of(step, part, scores);
      const Part scales = value_scales.At(rows.head, step, part);
      second[part] += (PartInts)scales < 0 ? weight : Part{};
      StorePart(scores, weight * Magnitudes(scales));
    });
  else
    for_all([&](int step, int part, float* scores) {
      StorePart(scores, weight_of(step, part, scores));
    });
  rows.highest = all;
  std::memcpy(&rows.total, total, sizeof total);
  std::memcpy(&rows.second, second, sizeof second);
  Vec kept;
  std::memcpy(&kept, keep, sizeof kept);
  return kept;
}

template <int K, typename Order, typename... Others>
Vec Softmax(const Block& block, Order order, Others&&... others) {
  if (block.count == block.Steps<K>() * K)
    return SoftmaxOf<K, true>(block, order, others...);
  return SoftmaxOf<K, false>(block, order, others...);
}

// What was mixed so far, of up to kLanes / K queries.
template <int K>
void Shrink(const Rows& rows, Vec keep, int64_t head_dim, float* mix) {
  for (int g = 0; g < rows.count; ++g, mix += head_dim) {
    if (keep[g * K] == 1) continue;
    for (int64_t d = 0; d < head_dim; d += kLanes) Store(mix + d, Load(mix + d) * keep[g * K]);
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
