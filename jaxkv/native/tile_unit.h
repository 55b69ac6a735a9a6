// A unit of attention in tiles.
#pragma once
#include "amx_bfloat16.h"
#include "amx_int8.h"
#include "vnni.h"
#if defined(__AVX512BW__)
#include <algorithm>
#include <cstdint>
#include <vector>

namespace jaxkv {

template <typename Tiles>
class TileUnit {
 public:
  static constexpr int kWays = Tiles::kWays;  // in which mixes hold their numbers

  static bool Serves(const Attention& job) {
    return job.head_dim % Tiles::kNumbers == 0 && job.head_dim <= kMostNumbers &&
           Tiles::Serves(job);
  }

  // Query q and the KV heads that have key positions' list `list`. The first of a chunk's queries
  // fetches for all.
  TileUnit(Attention& job, int64_t q, int64_t list, int64_t chunk, const Blocks& blocks,
           bool first)
      : job_(job), q_(q), chunk_(chunk), first_head_(job.heads / job.slots.lists * list),
        end_head_(first_head_ + job.heads / job.slots.lists), first_(first), blocks_(blocks),
        slices_(job.head_dim / Tiles::kNumbers), keys_(job.keys, job.head_dim),
        values_(job.values, job.head_dim), centre_(job.centre) {
    constexpr int kAtOnce = kLanes / K;  // queries whose scores stand together
    for (int64_t head = first_head_; head < end_head_; ++head)
      for (int64_t g = 0; g < job.group; g += kQueries) {
        const int64_t row = head * job.group + g;
        const int count = std::min<int64_t>(kQueries, job.group - g);
        shared_.push_back({head, q * job.rows() + row, count});
        for (int i = 0; i < count; i += kAtOnce)
          shared_.back().rows.push_back({head, q * job.rows() + row + i,
                                         std::min(kAtOnce, count - i), scores_ + i * kBlock});
        std::fill_n(job.MixOf(q, chunk, row), count * job.head_dim, 0.0f);
      }
    copy_.resize(kBlock * slices_);
  }

  // A block of slots; false if none was left.
  bool Step() {
    if (!blocks_.Advance()) return false;
    [[maybe_unused]] const typename Tiles::InUse in_use;
    Add(blocks_.Now(), blocks_.Next());
    return true;
  }

  void Finish() {
    for (const Shared& shared : shared_)
      for (const Rows& rows : shared.rows) Report<K>(job_, rows, chunk_);
  }

  // All queries, in place of job.queries.
  static void Arrange(Attention& job, Scratch& scratch) {
    const int64_t rows = job.slots.Queries() * job.rows(), size = LinesOfQueries(job);
    const int64_t shared = (job.group + kQueries - 1) / kQueries;  // tiles of a KV head
    job.arranged = scratch.Room(rows / job.group * shared * size * kLanes);
    Line* to = (Line*)job.arranged;
    for (int64_t row = 0; row < rows; row += job.group)
      for (int64_t g = 0; g < job.group; g += kQueries, to += size)
        Tiles::Arrange(job.queries + (row + g) * job.head_dim,
                       std::min<int64_t>(kQueries, job.group - g), job.head_dim, to);
  }

 private:
  static constexpr int K = Tiles::kTokens;
  // Queries of one KV head that share a tile.
  struct Shared {
    int64_t head, row;  // row: of all queries
    int count;
    std::vector<Rows> rows = {};
  };

  static int64_t LinesOfQueries(const Attention& job) {
    return job.head_dim / Tiles::kNumbers * kTile + 1;
  }

  void Add(const Block& block, const Block& next) {
    const InTurn<K> order;
    const int groups = (block.count + kTile - 1) / kTile, steps = block.Steps<K>();
    const BlockRows key_rows(job_.keys, job_.heads, block);
    const BlockRows value_rows(job_.values, job_.heads, block);
    key_scales_.Load(job_.keys, job_.heads, block, order);
    value_scales_.Load(job_.values, job_.heads, block, order);
    centre_.Start(block);
    const int64_t fetches =
        2 + Tiles::FetchesOfScore(slices_, groups) + Tiles::FetchesOfMix(slices_, groups);
    Ahead ahead(job_, first_head_, end_head_, next, first_ ? shared_.size() * fetches : 0);
    for (Shared& shared : shared_) {
      float* const mix = job_.MixOf(q_, chunk_, shared.row - q_ * job_.rows());
      FindSources(key_rows, keys_, shared.head * job_.keys.bytes);
      Tiles::Score(QueriesOf(shared), sources_, groups, slices_, shared.count, ahead, scores_);
      ahead.Fetch();
      const float* of_centre = centre_.Of(shared.row, shared.count,
                                          key_scales_.OfSecond(shared.head, steps, order));
      for (Rows& rows : shared.rows)
        Complete<K>(block, order, job_.softcap, key_scales_, of_centre, rows.row - shared.row,
                    rows);
      for (Rows& rows : shared.rows) Raise<K>(rows);
      for (Rows& rows : shared.rows) {
        Weigh<K>(block, order, value_scales_, rows);
        for (int step = steps; step < groups * kTile / K; ++step)
          Store(rows.scores + step * kLanes, Vec{});  // of no token
        Shrink<K>(rows, job_.head_dim, mix + (rows.row - shared.row) * job_.head_dim);
      }
      ahead.Fetch();
      FindSources(value_rows, values_, shared.head * job_.values.bytes);
      Tiles::Mix(scores_, sources_, groups, slices_, ahead, shared.count, job_.head_dim, mix);
    }
  }

  // Where the block's tokens are; past the last token of a tile, the last again.
  struct BlockRows {
    const char* tokens[kBlock];  // of the first head
    int64_t stride;
    bool in_a_row[kGroups];  // whether a tile's tokens are in slots one after the other
    int groups;

    BlockRows(const Side& side, int64_t heads, const Block& block)
        : stride(heads * side.bytes), groups((block.count + kTile - 1) / kTile) {
      for (int token = 0; token < groups * kTile; ++token)
        tokens[token] = side.Row(block.Slot(token), heads);
      for (int group = 0; group < groups; ++group) {
        const char* const* own = tokens + group * kTile;
        in_a_row[group] = true;
        for (int i = 1; i < kTile; ++i) in_a_row[group] &= own[i] == own[i - 1] + stride;
      }
    }
  };

  // One head's vectors: as they are where a tile can be loaded from there, else copied.
  void FindSources(const BlockRows& rows, const typename Tiles::Reader& reader, int64_t offset) {
    for (int group = 0; group < rows.groups; ++group) {
      const char* const* const tokens = rows.tokens + group * kTile;
      if (rows.in_a_row[group] && reader.AsStored()) {
        sources_[group] = {tokens[0] + offset, rows.stride};
        continue;
      }
      char* const copy = (char*)&copy_[group * kTile * slices_];
      reader.Copy(tokens, offset, copy);
      sources_[group] = {copy, slices_ * (int64_t)sizeof(Line), true};
    }
  }

  const Line* QueriesOf(const Shared& queries) const {
    const int64_t shared = (job_.group + kQueries - 1) / kQueries;
    const int64_t number = queries.row / job_.group * shared + queries.row % job_.group / kQueries;
    return (const Line*)job_.arranged + number * LinesOfQueries(job_);
  }

  Attention& job_;
  const int64_t q_, chunk_, first_head_, end_head_;
  const bool first_;
  Blocks blocks_;
  const int64_t slices_;
  const typename Tiles::Reader keys_, values_;
  Source sources_[kGroups];
  std::vector<Shared> shared_;
  alignas(64) float scores_[kBlock * kQueries];
  std::vector<Line> copy_;
  Scales<K> key_scales_, value_scales_;
  Centre centre_;
};

}  // namespace jaxkv
#endif
