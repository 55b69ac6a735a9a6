// One decode step's attention over one layer of a cache. Each visible slot is read once, in memory
// order, by all threads; nothing is copied out of the cache. Units of slots are handed out, and
// joined at the end.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "pool.h"
#include "tiles.h"
#include "unit.h"

namespace jaxkv {

constexpr int64_t kSmallestUnit = 64 << 10;  // bytes
constexpr int64_t kUnitsPerThread = 2;  // sequences differ in length, and threads in speed
constexpr int64_t kWorthWaking = 256 << 10;  // bytes that are read while a thread wakes up

#if JAXKV_TILES
// Whether the processor's tiles serve elements of this type.
template <typename T>
bool UsesTiles(const Attention& job) {
  if constexpr (std::is_same_v<T, BFloat16> || std::is_same_v<T, Code>)
    return job.head_dim % kSlice == 0 && TilesAllowed();
  return false;
}
#else
template <typename T>
bool UsesTiles(const Attention&) { return false; }
#endif

// Joins the chunks of one query head, and gives its sink its share.
inline void Join(Attention& job, int64_t row, float* sum) {
  const float sink = job.sinks[row % job.rows()];
  const float* highest = &job.highest[row * job.chunks];
  const float* total = &job.total[row * job.chunks];
  const float most = std::max(sink, *std::max_element(highest, highest + job.chunks));
  float everything = std::exp(sink - most);
  std::fill_n(sum, job.head_dim, 0.0f);
  for (int64_t chunk = 0; chunk < job.chunks; ++chunk) {
    const float* mix = job.MixOf(row / job.rows(), chunk, row % job.rows());
    const float weight = Exp(Vec{} + (highest[chunk] - most))[0];
    everything += weight * total[chunk];
    for (int64_t d = 0; d < job.head_dim; d += kLanes)
      Store(sum + d, Load(sum + d) + Load(mix + d) * weight);
  }
  for (int64_t d = 0; d < job.head_dim; ++d) sum[d] = everything == 0 ? 0 : sum[d] / everything;
}

template <typename T>
void RunUnit(Attention& job, bool tiles, int64_t unit) {
  const Slots& slots = job.slots;
  const int64_t chunk = unit % job.chunks, list = unit / job.chunks % slots.lists;
  const int64_t b = unit / job.chunks / slots.lists;
  const int64_t begin = slots.Begin(b), span = slots.End(b) - begin;
  const int64_t from = begin + span * chunk / job.chunks;
  const int64_t to = begin + span * (chunk + 1) / job.chunks;
  const int64_t heads = job.heads / slots.lists;
  const auto run = [&](auto&& unit) { unit.Run(list, from, to); };
#if JAXKV_TILES
  if (tiles) return run(TileUnit<T>(job, b, list * heads, (list + 1) * heads, chunk));
#endif
  if (job.group == 1)
    run(Unit<T, kLanes>(job, b, list * heads, (list + 1) * heads, chunk));
  else
    run(Unit<T, 4>(job, b, list * heads, (list + 1) * heads, chunk));
}

// Queries in the order in which a unit meets them, in place of job.queries.
template <typename T>
void ArrangeQueries(Attention& job, bool tiles) {
  static thread_local Scratch scratch;
  const int64_t rows = job.slots.batch * job.rows();
#if JAXKV_TILES
  if (tiles) {
    const int64_t shared = (job.group + kQueries - 1) / kQueries;  // tiles of a KV head
    const int64_t size = job.head_dim / kSlice * kTile * kTile;
    job.arranged = scratch.Room(rows / job.group * shared * size);
    uint32_t* to = (uint32_t*)job.arranged;
    for (int64_t row = 0; row < rows; row += job.group)
      for (int64_t g = 0; g < job.group; g += kQueries, to += size)
        ArrangeTiles(job.queries + (row + g) * job.head_dim, std::min<int64_t>(kQueries, job.group - g), job.head_dim, to);
    return;
  }
#endif
  job.arranged = scratch.Room(rows * job.head_dim);
  for (int64_t row = 0; row < rows; ++row)
    Arrange<T>(job.queries + row * job.head_dim, &job.arranged[row * job.head_dim], job.head_dim);
}

template <typename T>
void Attend(Attention& job, int64_t threads) {
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
  static thread_local Scratch highest, total, mix, sum;
  const bool tiles = UsesTiles<T>(job);
  ArrangeQueries<T>(job, tiles);
  job.highest = highest.Room(rows * job.chunks), job.total = total.Room(rows * job.chunks);
  job.mix = mix.Room(rows * job.chunks * job.head_dim);
  Pool::Get().Run(slots.batch * slots.lists * job.chunks, threads, all * slot_bytes > kWorthWaking,
                  [&](int64_t unit) { RunUnit<T>(job, tiles, unit); });
  for (int64_t row = 0; row < rows; ++row) {
    float* out = job.out + row * job.head_dim;
    if (tiles) {
      Join(job, row, out);
    } else {
      Join(job, row, sum.Room(job.head_dim));
      Restore<T>(sum.Room(job.head_dim), out, job.head_dim);
    }
  }
}

}  // namespace jaxkv
