// What vectors are stored less (jaxkv/codecs/centred.py): its share of the scores.
#pragma once
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
  const float* tables;             // [digits, 2, kBase, pairs]; jaxkv/codecs/rope.py
  int64_t digits = 0, pairs = 0, features = 0;

  static constexpr int64_t kBaseBits = 7, kBase = 1 << kBaseBits;

  // A position's features: cosines, sines, and 1 unless all numbers are rotated.
  void Features(int64_t position, float* row) const {
    std::memset(row, 0, features * sizeof(float));
    if (features > 2 * pairs) row[2 * pairs] = 1;
    for (int64_t number = 0; number < digits; ++number) {
      const int64_t digit = position >> number * kBaseBits & (kBase - 1);
      if (number > 0 && digit == 0) continue;  // a rotation by nothing
      const float* cos = tables + (number * 2 * kBase + digit) * pairs;
      const float* sin = cos + kBase * pairs;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        float &c = row[pair], &s = row[pairs + pair];
        const float turned_c = c * cos[pair] - s * sin[pair];
        const float turned_s = s * cos[pair] + c * sin[pair];
        c = number == 0 ? cos[pair] : To12Bits(turned_c);
        s = number == 0 ? sin[pair] : To12Bits(turned_s);
      }
    }
  }

 private:
  static float To12Bits(float number) {
    constexpr int kDropped = 12;
    uint32_t bits;
    std::memcpy(&bits, &number, 4);
    bits += (1 << (kDropped - 1)) - 1 + (bits >> kDropped & 1);  // to nearest, ties to even
    bits &= ~uint32_t{0} << kDropped;
    std::memcpy(&number, &bits, 4);
    return number;
  }
};

// For a unit, which takes tokens K at a time.
template <int K>
class Centre {
 public:
  explicit Centre(const Centring& all) : all_(all) {}

  void Start(const Block& block) {
    if (!*this) return;
    features_.resize(kBlock * all_.features);
    count_ = block.count;
    for (int token = 0; token < count_; ++token)
      all_.Features(block.positions[token], &features_[token * all_.features]);
  }
  explicit operator bool() const { return all_.queries != nullptr; }

  // Scores of a step's tokens, some of which have the second centre; of `count` queries from `row`
  // on.
  template <typename Order>
  Vec At(int64_t row, int count, int step, Order order, Ints is_second) const {
    const Vec first = Of(all_.queries, row, count, step, order);
    if (all_.of_second == 0 || !Any(is_second)) return first;  // few tokens have it
    return is_second ? Of(all_.queries + all_.of_second, row, count, step, order) : first;
  }

 private:
  template <typename Order>
  Vec Of(const float* queries, int64_t row, int count, int step, Order order) const {
    const float* tokens[K];
    for (int i = 0; i < K; ++i)
      tokens[i] = &features_[std::min(order.Token(step, i), count_ - 1) * all_.features];
    Vec scores;
    WithCount<K>(count, [&](auto g) {
      scores = Score<float, decltype(g)::value, K>(tokens, queries + row * all_.features,
                                                   all_.features);
    });
    return scores;
  }

  const Centring& all_;
  int count_ = 0;
  std::vector<float> features_;
};

}  // namespace jaxkv
