// One decode step's attention over one layer of a cache. Each visible slot is read once, in memory
// order, by all threads; nothing is copied out of the cache. Units of slots are handed out, and
// joined at the end.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "pool.h"
#include "tile_unit.h"
#include "unit.h"

namespace jaxkv {

constexpr int64_t kSmallestUnit = 64 << 10;  // bytes
constexpr int64_t kUnitsPerThread = 2;  // sequences differ in length, and threads in speed
constexpr int64_t kWorthWaking = 256 << 10;  // bytes that are read while a thread wakes up

// Joins the chunks of one query head, and gives its sink its share.
inline void Join(Attention& job, int64_t row, float* sum) {
  const float sink = job.sinks[row % job.rows()];
  const float* highest = &job.highest[row * job.chunks];
  const float* total = &job.total[row * job.chunks];
  const float most = std::max(sink, *std::max_element(highest, highest + job.chunks));
  float everything = std::exp(sink - most), second = 0;
  std::fill_n(sum, job.head_dim, 0.0f);
  for (int64_t chunk = 0; chunk < job.chunks; ++chunk) {
    const float* mix = job.MixOf(row / job.rows(), chunk, row % job.rows());
    const float weight = Exp(Vec{} + (highest[chunk] - most))[0];
    everything += weight * total[chunk];
    second += weight * job.second[row * job.chunks + chunk];
    for (int64_t d = 0; d < job.head_dim; d += kLanes)
      Store(sum + d, Load(sum + d) + Load(mix + d) * weight);
  }
  for (int64_t d = 0; d < job.head_dim; ++d) sum[d] = everything == 0 ? 0 : sum[d] / everything;
  job.second_share[row] = everything == 0 ? 0 : second / everything;
  job.log_total[row] = everything == 0 ? kLowest : most + std::log(everything);
}

template <typename Unit>
void RunUnit(Attention& job, int64_t unit) {
  const Slots& slots = job.slots;
  const int64_t chunk = unit % job.chunks, list = unit / job.chunks % slots.lists;
  const int64_t b = unit / job.chunks / slots.lists;
  const int64_t begin = slots.Begin(b), span = slots.End(b) - begin;
  const int64_t from = begin + span * chunk / job.chunks;
  const int64_t to = begin + span * (chunk + 1) / job.chunks;
  const int64_t heads = job.heads / slots.lists;
  Unit(job, b, list * heads, (list + 1) * heads, chunk).Run(list, from, to);
}

template <typename Unit>
void AttendIn(Attention& job, int64_t threads) {
  const Slots& slots = job.slots;
  int64_t longest = 0, all = 0;
  for (int64_t b = 0; b < slots.batch; ++b) {
    const int64_t span = slots.End(b) - slots.Begin(b);
    longest = std::max(longest, span), all += span;
  }
  const int64_t slot_bytes = job.heads * (job.keys.bytes + job.values.bytes);
  const int64_t most_chunks = std::max<int64_t>(1, kUnitsPerThread * threads / slots.batch);
  const int64_t smallest = std::max<int64_t>(kBlock, kSmallestUnit / slot_bytes);
  job.chunks = std::clamp<int64_t>(longest / smallest, 1, most_chunks);
  const int64_t rows = slots.batch * job.rows();
  static thread_local Scratch arranged, highest, total, second, mix, sum;
  Unit::Arrange(job, arranged);
  job.highest = highest.Room(rows * job.chunks), job.total = total.Room(rows * job.chunks);
  job.second = second.Room(rows * job.chunks);
  job.mix = mix.Room(rows * job.chunks * job.head_dim);
  Pool::Get().Run(slots.batch * slots.lists * job.chunks, threads, all * slot_bytes > kWorthWaking,
                  [&](int64_t unit) { RunUnit<Unit>(job, unit); });
  for (int64_t row = 0; row < rows; ++row) {
    Join(job, row, sum.Room(job.head_dim));
    Restore(Unit::kWays, sum.Room(job.head_dim), job.out + row * job.head_dim, job.head_dim);
  }
}

template <typename T>
void Attend(Attention& job, int64_t threads) {
#if JAXKV_TILES
  constexpr bool kCodes = std::is_same_v<T, int8_t> || std::is_same_v<T, Code>;
  if constexpr (kCodes || std::is_same_v<T, BFloat16>) {
    using Tiles = TileUnit<std::conditional_t<kCodes, Int8Tiles, BFloat16Tiles>>;
    if (Tiles::Serves(job)) return AttendIn<Tiles>(job, threads);
  }
#endif
  if (job.group == 1) return AttendIn<Unit<T, kLanes>>(job, threads);
  AttendIn<Unit<T, 4>>(job, threads);
}

}  // namespace jaxkv
