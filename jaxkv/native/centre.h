// What vectors are stored less (jaxkv/codecs/centred.py): its share of the scores.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "slots.h"
#include "vector_products.h"

namespace jaxkv {

// Of one layer. No queries where vectors are stored whole.
struct Centring {
  // [centres, queries, heads, group, features], zeros up to whole vectors
  const float* queries = nullptr;
  int64_t of_second = 0;           // where those of the second centre begin; 0 if there is none
  const float* tables;             // [digits, 2, pairs, kBase]; jaxkv/codecs/rope.py
  int64_t digits = 0, pairs = 0, features = 0;

  static constexpr int64_t kBaseBits = 7, kBase = 1 << kBaseBits;

  // Of a position's features: cosines, sines, and 1 unless all numbers are rotated.
  int64_t Used() const { return 2 * pairs + HasRest(); }
  bool HasRest() const { return features > 2 * pairs; }
};

// For a unit, a block at a time. Tokens are side by side: sums of all their features are in lanes.
class Centre {
 public:
  explicit Centre(const Centring& all) : all_(all) {}
  explicit operator bool() const { return all_.queries != nullptr; }

  void Start(const Block& block) {
    if (!*this) return;
    columns_.resize(all_.Used() * kStride / kLanes);
    float* const columns = columns_.data()->lanes;
    count_ = block.count;
    // What lies behind a run of tokens is written too, and by the next run again.
    for (int token = 0, run; token < count_; token += run) {
      const int32_t* const positions = block.positions + token;
      const int most = count_ - token;
      for (run = 1; run < most && positions[run] >> kBits == positions[0] >> kBits;) ++run;
      Turn(positions[0] >> kBits);
      if (turns_.empty()) Fill<0>(positions, run, columns + token);
      else if ((int64_t)turns_.size() == 2 * all_.pairs) Fill<1>(positions, run, columns + token);
      else Fill<2>(positions, run, columns + token);
    }
    if (all_.HasRest()) std::fill_n(columns + 2 * all_.pairs * kStride, kBlock, 1.0f);
  }

  // The block's scores with `count` queries from `row` on, [count][kBlock]. Tokens whose bit is set
  // have the second centre. Null where vectors are stored whole.
  const float* Of(int64_t row, int count, uint64_t of_second) {
    if (!*this) return nullptr;
    const float* queries = all_.queries + row * all_.features;
    WithCount<4>(count, [&](auto number) {
      constexpr int G = decltype(number)::value;
      constexpr int kMost = kParts == 1 ? 4 : 2;  // parts whose sums are in registers at once
      const int parts = (count_ + kPart - 1) / kPart;
      for (int part = 0; part < parts; part += kMost)
        Multiply<G, kMost>(queries, part, scores_);
      if (all_.of_second == 0) return;
      for (int part = 0; part < parts; ++part) {
        const uint64_t some = of_second >> part * kPart & ((uint64_t{1} << kPart) - 1);
        if (some == 0) continue;  // few tokens have it
        Multiply<G, 1>(queries + all_.of_second, part, seconds_);
        for (int i = part * kPart; i < (part + 1) * kPart; ++i)
          for (int g = 0; of_second >> i & 1 && g < G; ++g)
            scores_[g * kBlock + i] = seconds_[g * kBlock + i];
      }
    });
    return scores_;
  }

 private:
  static constexpr int64_t kStride = kBlock + kLanes;  // past the last token, what `Fill` writes
  static constexpr int64_t kBits = Centring::kBaseBits, kBase = Centring::kBase;

  // Features of `run` tokens whose positions differ in their first digit alone.
  template <int kTurns>
  void Fill(const int32_t* positions, int run, float* column) {
    int32_t digits[kBlock];
    bool in_a_row = (positions[0] & (kBase - 1)) + run <= kBase;
    for (int i = 0; i < run; ++i) {
      digits[i] = positions[i] & (kBase - 1);
      in_a_row &= digits[i] == digits[0] + i;
    }
    const int64_t sines = all_.pairs * kBase, to_sines = all_.pairs * kStride;
    float of_tokens[2][kBlock] = {};
    for (int64_t pair = 0; pair < all_.pairs; ++pair, column += kStride) {
      const float *cos = all_.tables + pair * kBase, *sin = cos + sines;
      if (in_a_row) {
        cos += digits[0], sin += digits[0];
      } else {
        for (int i = 0; i < run; ++i)
          of_tokens[0][i] = cos[digits[i]], of_tokens[1][i] = sin[digits[i]];
        cos = of_tokens[0], sin = of_tokens[1];
      }
      float turns[kTurns + 1][2];
      for (int turn = 0; turn < kTurns; ++turn)
        for (int i = 0; i < 2; ++i) turns[turn][i] = turns_[2 * (turn * all_.pairs + pair) + i];
      for (int i = 0; i < run; i += kPart) {
        Part c = LoadPart(cos + i), s = LoadPart(sin + i);
        UNROLL for (int turn = 0; turn < kTurns; ++turn) {
          const Part turned = c * turns[turn][0] - s * turns[turn][1];
          s = To12Bits(s * turns[turn][0] + c * turns[turn][1]), c = To12Bits(turned);
        }
        StorePart(column + i, c), StorePart(column + to_sines + i, s);
      }
    }
  }

  // By what all digits but the first turn each pair: cosine and sine, digit after digit.
  void Turn(int64_t digits) {
    if (digits == turned_) return;
    turned_ = digits, turns_.clear();
    for (int64_t number = 1; number < all_.digits; ++number, digits >>= kBits) {
      const int64_t digit = digits & (kBase - 1);
      if (digit == 0) continue;  // a rotation by nothing
      const float* cos = all_.tables + number * 2 * all_.pairs * kBase + digit;
      turns_.resize(turns_.size() + 2 * all_.pairs);
      float* to = &turns_[turns_.size() - 2 * all_.pairs];
      for (int64_t pair = 0; pair < all_.pairs; ++pair, cos += kBase)
        *to++ = cos[0], *to++ = cos[all_.pairs * kBase];
    }
  }

  static Part To12Bits(Part numbers) {  // to nearest, ties to even
    constexpr int kDropped = 12;
    PartWords bits = (PartWords)numbers;
    bits += ((1 << (kDropped - 1)) - 1) + (bits >> kDropped & 1);
    return (Part)(bits & ~uint32_t{0} << kDropped);
  }

  // Sums of N parts of the tokens.
  template <int G, int N>
  void Multiply(const float* queries, int part, float* scores) const {
    Part sums[G][N] = {};
    const float* column = columns_.data()->lanes + part * kPart;
    const int64_t used = all_.Used();
    for (int64_t feature = 0; feature < used; ++feature, column += kStride) {
      Part some[N];
      UNROLL for (int n = 0; n < N; ++n) {
        some[n] = LoadPart(column + n * kPart);
        KEEP_IN_REGISTER(some[n]);
      }
      UNROLL for (int g = 0; g < G; ++g)
        UNROLL for (int n = 0; n < N; ++n)
          sums[g][n] += queries[g * all_.features + feature] * some[n];
    }
    UNROLL for (int g = 0; g < G; ++g)
      UNROLL for (int n = 0; n < N; ++n)
        StorePart(scores + g * kBlock + (part + n) * kPart, sums[g][n]);
  }

  const Centring& all_;
  int count_ = 0;
  int64_t turned_ = 0;
  std::vector<Line> columns_;   // [features][kStride]
  std::vector<float> turns_;    // [digits that turn][pairs][2]
  alignas(64) float scores_[4 * kBlock], seconds_[4 * kBlock];
};

}  // namespace jaxkv
