// A few rows times matrices of weights, at the rate at which the weights can be read. All weights
// of a call share the rows, and are one job for the threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "pool.h"
#include "vector_products.h"

namespace jaxkv {

constexpr int kTogether = 4;  // rows of a weight that are read at once
// Of a weight [in, out] a unit takes rows as wide as there is room for their sums in a near cache, so
// that it reads in the order of memory. Smaller units make more to sum, larger ones leave too few.
constexpr int64_t kMostColumns = 2048;
constexpr int64_t kUnitBytes = 256 << 10;
constexpr int64_t kProductWorthWaking = 256 << 10;

// y[m] = x[m] W for a weight [in, out], or x[m] W^T for a table [out, in].
struct Weight {
  const void* data;
  int64_t in, out;
  bool table;
  float* y;  // [rows, out]

  int64_t parts, taken;   // of [in, out], along in: units, and the rows of one
  int64_t strips, width;  // along out: units, and the columns of one
  float* sums;                   // [parts, strips, rows, width]
  int64_t first_unit, units;
};

struct Product {
  const float* x;  // [rows, in]
  int64_t rows, in;
  std::vector<Weight> weights;
  float* arranged;  // x, in the order in which a table's elements are loaded
};

// function(M, first) for M of `rows` rows at a time, up to `Most`: with more, sums leave the registers.
template <int Most, typename Function>
inline void InRegisters(int64_t rows, const Function& function, int64_t first = 0) {
  for (; first + Most <= rows; first += Most) function(Number<Most>{}, first);
  if constexpr (Most > 1) InRegisters<Most - 1>(rows, function, first);
}

// sums[m] = x[m] W for all rows of x, `count` rows and `width` columns of a weight. All have strides.
// A few rows of the weight at a time, which are in the nearest cache for all of x: rows are often a
// multiple of 4 KiB apart, and of such lines that cache keeps eight. Others are fetched meanwhile, into
// the cache that is next to it and has more room: rows are too short for the processor to see where
// they lead.
template <typename T>
void Columns(const T* weight, int64_t stride, int64_t count, int64_t width, const float* x,
             int64_t in, float* sums, int64_t out, int64_t all) {
  // Of R rows from `first` on and M of x, added to what is there from the rows before.
  auto add = [&](auto number, auto of_x, int64_t first, int64_t m0) {
    constexpr int R = decltype(number)::value, M = decltype(of_x)::value;
    const T* const rows = weight + first * stride;
    float factor[M][R];
    UNROLL for (int m = 0; m < M; ++m)
      UNROLL for (int r = 0; r < R; ++r) factor[m][r] = x[(m0 + m) * in + first + r];
    for (int64_t c = 0; c < width; c += 2 * kLanes) {
      if (m0 == 0)
        UNROLL for (int r = 0; r < R; ++r) FetchPair(rows + (2 * R + r) * stride + c);
      UNROLL for (int part = 0; part < kParts; ++part) {
        float* const to = sums + m0 * out + c + part * kPart;
        Part sum[M][2] = {}, row[2];
        if (first > 0) UNROLL for (int m = 0; m < M; ++m) LoadPair(to + m * out, 0, sum[m]);
        UNROLL for (int r = 0; r < R; ++r) {
          LoadPair(rows + r * stride + c, part, row);
          UNROLL for (int m = 0; m < M; ++m)
            UNROLL for (int n = 0; n < 2; ++n) sum[m][n] += factor[m][r] * row[n];
        }
        UNROLL for (int m = 0; m < M; ++m)
          UNROLL for (int n = 0; n < 2; ++n) *(Part*)(to + m * out + n * kLanes) = sum[m][n];
      }
    }
  };
  constexpr int kMost = kParts == 1 ? 8 : 4;
  auto add_to_all = [&](auto number, int64_t first) {
    InRegisters<kMost>(all, [&](auto of_x, int64_t m) { add(number, of_x, first, m); });
  };
  int64_t row = 0;
  for (; row + kTogether <= count; row += kTogether) add_to_all(Number<kTogether>{}, row);
  for (; row < count; ++row) add_to_all(Number<1>{}, row);
}

// y[m][r] = table[r] . x[m] for `count` rows of a table and all of x, which are arranged.
template <typename T, int K>
void Dots(const T* table, int64_t in, int64_t count, const float* x, float* y, int64_t out,
          int64_t all) {
  for (int64_t first = 0; first < count; first += K) {
    const T* rows[K];
    for (int64_t r = 0; r < K; ++r) rows[r] = table + std::min(first + r, count - 1) * in;
    InRegisters<kLanes / K>(all, [&](auto of_x, int64_t m0) {
      constexpr int M = decltype(of_x)::value;
      const Vec each = Score<T, M, K>(rows, x + m0 * in, in);
      for (int m = 0; m < M; ++m)
        std::memcpy(y + (m0 + m) * out + first, (const float*)&each + m * K,
                    4 * std::min<int64_t>(K, count - first));
    });
  }
}

template <typename T>
void RunProductUnit(const Product& job, int64_t unit) {
  size_t number = 0;
  while (unit >= job.weights[number].first_unit + job.weights[number].units) ++number;
  const Weight& weight = job.weights[number];
  unit -= weight.first_unit;
  const T* data = (const T*)weight.data;
  if (weight.table) {
    const int64_t first = unit * weight.width;
    const int64_t count = std::min(weight.width, weight.out - first);
    const auto dots = job.rows == 1 ? Dots<T, kLanes> : Dots<T, 4>;
    dots(data + first * weight.in, weight.in, count, job.arranged, weight.y + first, weight.out,
         job.rows);
  } else {
    const int64_t part = unit / weight.strips, column = unit % weight.strips * weight.width;
    const int64_t row = part * weight.taken;
    Columns(data + row * weight.out + column, weight.out, std::min(weight.taken, weight.in - row),
            std::min(weight.width, weight.out - column), job.x + row, weight.in,
            weight.sums + unit * job.rows * weight.width, weight.width, job.rows);
  }
}

// Adds the parts up.
template <typename T>
void Finish(const Weight& weight, int64_t rows) {
  if (weight.table) return;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t c = 0; c < weight.out; c += 2 * kLanes) {
      Vec sum[2] = {};
      for (int64_t part = 0; part < weight.parts; ++part) {
        const int64_t unit = part * weight.strips + c / weight.width;
        const float* of_part = weight.sums + (unit * rows + m) * weight.width + c % weight.width;
        sum[0] += Load(of_part), sum[1] += Load(of_part + kLanes);
      }
      Restore(kWaysOf<T>, (const float*)sum, weight.y + m * weight.out + c, 2 * kLanes);
    }
}

template <typename T>
void Multiply(Product& job, int64_t threads) {
  static thread_local Scratch sums, arranged;
  int64_t units = 0, size = 0, bytes = 0;
  for (Weight& weight : job.weights) {
    const int64_t row_bytes = weight.in * sizeof(T);
    if (weight.table) {
      weight.width = std::max<int64_t>(1, kUnitBytes / row_bytes / kLanes) * kLanes;
      weight.units = (weight.out + weight.width - 1) / weight.width;
    } else {
      weight.strips = (weight.out + kMostColumns - 1) / kMostColumns;
      weight.width = (weight.out / weight.strips + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
      weight.strips = (weight.out + weight.width - 1) / weight.width;
      const int64_t rows = kUnitBytes / sizeof(T) / weight.width;
      weight.taken = std::max<int64_t>(1, rows / kTogether) * kTogether;
      weight.parts = (weight.in + weight.taken - 1) / weight.taken;
      weight.units = weight.parts * weight.strips;
      size += weight.units * job.rows * weight.width;
    }
    weight.first_unit = units;
    units += weight.units, bytes += weight.in * weight.out * sizeof(T);
  }
  float* next = sums.Room(size);
  bool tables = false;
  for (Weight& weight : job.weights) {
    weight.sums = next;
    if (!weight.table) next += weight.units * job.rows * weight.width;
    tables |= weight.table;
  }
  if (tables) {
    job.arranged = arranged.Room(job.rows * job.in);
    for (int64_t m = 0; m < job.rows; ++m)
      Arrange<T>(job.x + m * job.in, &job.arranged[m * job.in], job.in);
  }
  Pool::Get().Run(units, threads, bytes > kProductWorthWaking,
                  [&](int64_t unit) { RunProductUnit<T>(job, unit); });
  for (const Weight& weight : job.weights) Finish<T>(weight, job.rows);
}

}  // namespace jaxkv
