// One decode step's attention over one layer of a cache. Each slot that a query sees is read once for
// it, a block after the other, by all threads; nothing is copied out of the cache. Units of slots are
// handed out, and joined at the end. The sums of a query are its own: how many others stand beside it in
// the step changes none of its bits.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>

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
  const int64_t chunks = job.Chunks(row / job.rows());
  const float most = std::max(sink, *std::max_element(highest, highest + chunks));
  float everything = std::exp(sink - most), second = 0;
  std::fill_n(sum, job.head_dim, 0.0f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
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

// Where a chunk of the slots [begin, begin + span) begins, and the last one ends. Multiples of 16, so
// that 16 tokens that are multiplied together are of one page.
inline int64_t Boundary(int64_t begin, int64_t span, int64_t chunk, int64_t chunks) {
  const int64_t slot = begin + span * chunk / chunks;
  return chunk == chunks ? slot : std::max(begin, slot / kFirstBlock * kFirstBlock);
}

// A chunk of slots, for all queries of a sequence. These take turns, a block each: all but the first
// find it in a near cache.
template <typename Unit>
void RunUnit(Attention& job, int64_t unit) {
  const Slots& slots = job.slots;
  const int64_t chunk = unit % job.chunks, list = unit / job.chunks % slots.lists;
  const int64_t first = unit / job.chunks / slots.lists * slots.tokens;
  std::deque<Unit> units;  // which stay where they are
  for (int64_t q = first; q < first + slots.tokens; ++q) {
    const int64_t chunks = job.Chunks(q);
    if (chunk >= chunks) continue;
    const int64_t begin = slots.Begin(q), span = slots.End(q) - begin;
    const int64_t from = Boundary(begin, span, chunk, chunks);
    const int64_t to = Boundary(begin, span, chunk + 1, chunks);
    units.emplace_back(job, q, list, chunk, Blocks(slots, q, list, from, to), units.empty());
  }
  for (bool any = true; any;) {
    any = false;
    for (Unit& of_query : units) any |= of_query.Step();
  }
  for (Unit& of_query : units) of_query.Finish();
}

template <typename Unit>
void AttendIn(Attention& job, int64_t threads) {
  const Slots& slots = job.slots;
  const int64_t slot_bytes = job.heads * (job.keys.bytes + job.values.bytes);
  job.most_chunks = std::max<int64_t>(1, kUnitsPerThread * threads / slots.batch);
  job.smallest = std::max<int64_t>(kBlock, kSmallestUnit / slot_bytes);
  int64_t all = 0;
  for (int64_t q = 0; q < slots.Queries(); ++q) {
    job.chunks = std::max(job.chunks, job.Chunks(q));
    all += slots.End(q) - slots.Begin(q);
  }
  const int64_t rows = slots.Queries() * job.rows();
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
  [[maybe_unused]] constexpr bool kCodes = std::is_same_v<T, int8_t> || std::is_same_v<T, Code>;
#if JAXKV_AMX
  if constexpr (kCodes || std::is_same_v<T, BFloat16>) {
    using Tiles = TileUnit<std::conditional_t<kCodes, AmxInt8, AmxBFloat16>>;
    if (Tiles::Serves(job)) return AttendIn<Tiles>(job, threads);
  }
#endif
#if JAXKV_VNNI
  if constexpr (kCodes)
    if (TileUnit<Vnni>::Serves(job)) return AttendIn<TileUnit<Vnni>>(job, threads);
#endif
  if (job.group == 1) return AttendIn<Unit<T, kLanes>>(job, threads);
  AttendIn<Unit<T, 4>>(job, threads);
}

// Each is compiled in one of several files, and these side by side.
extern template void Attend<float>(Attention&, int64_t);
extern template void Attend<BFloat16>(Attention&, int64_t);
extern template void Attend<Float16>(Attention&, int64_t);
extern template void Attend<Float8>(Attention&, int64_t);
extern template void Attend<int8_t>(Attention&, int64_t);
extern template void Attend<Code>(Attention&, int64_t);

}  // namespace jaxkv
