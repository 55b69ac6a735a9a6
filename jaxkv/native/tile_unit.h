// A unit of attention in tiles.
#pragma once
#include "amx_bfloat16.h"
#include "amx_int8.h"
#include "runs.h"
#include "vnni.h"
#if defined(__AVX512BW__)
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace jaxkv {

template <typename Tiles>
class TileUnit {
 public:
  static constexpr int kWays = Tiles::kWays;  // in which mixes hold their numbers

  static bool Serves(const Attention& job) {
    return job.head_dim % Tiles::kNumbers == 0 && job.head_dim <= kMostNumbers &&
           (!job.keys.runs.count || WideRuns::Serves(job.keys, job.head_dim)) &&
           Tiles::Serves(job);
  }

  // Query q and the KV heads that have key positions' list `list`. The first of a chunk's queries
  // fetches for all.
  TileUnit(Attention& job, int64_t q, int64_t list, int64_t chunk, const Blocks& blocks,
           bool first)
      : job_(job), q_(q), chunk_(chunk), first_head_(job.heads / job.slots.lists * list),
        end_head_(first_head_ + job.heads / job.slots.lists), first_(first), blocks_(blocks),
        centre_(job.centre) {
    for (int64_t head = first_head_; head < end_head_; ++head)
      for (int64_t g = 0; g < job.group; g += kQueries) {
        const int64_t row = head * job.group + g;
        const int count = std::min<int64_t>(kQueries, job.group - g);
        rows_.push_back({head, q * job.rows() + row, count, scores_});
        std::fill_n(job.MixOf(q, chunk, row), count * job.head_dim, 0.0f);
      }
    slices_ = job.head_dim / Tiles::kNumbers;
    copy_.resize(kBlock * slices_);
    if (job.keys.runs.count) wide_runs_.emplace(job.keys, job.head_dim);
  }

  // A block of slots; false if none was left.
  bool Step() {
    if (!blocks_.Advance()) return false;
    [[maybe_unused]] const typename Tiles::InUse in_use;
    Add(blocks_.Now(), blocks_.Next());
    return true;
  }

  void Finish() {
    for (Rows& rows : rows_) Report<kQueries>(job_, rows, chunk_);
  }

  // All queries, in place of job.queries.
  static void Arrange(Attention& job, Scratch& scratch) {
    const int64_t rows = job.slots.Queries() * job.rows(), size = LinesOfQueries(job);
    if (job.keys.runs.count) {
      job.arranged = scratch.Room(rows * job.head_dim);
      return WideRuns::Arrange(job.queries, job.arranged, rows * job.head_dim);
    }
    const int64_t shared = (job.group + kQueries - 1) / kQueries;  // tiles of a KV head
    job.arranged = scratch.Room(rows / job.group * shared * size * kLanes);
    Line* to = (Line*)job.arranged;
    for (int64_t row = 0; row < rows; row += job.group)
      for (int64_t g = 0; g < job.group; g += kQueries, to += size)
        Tiles::Arrange(job.queries + (row + g) * job.head_dim,
                       std::min<int64_t>(kQueries, job.group - g), job.head_dim, to);
  }

 private:
  static int64_t LinesOfQueries(const Attention& job) {
    return job.head_dim / Tiles::kNumbers * kTile + 1;
  }

  void Add(const Block& block, const Block& next) {
    const InTurn<kQueries> order;
    const int groups = (block.count + kTile - 1) / kTile;
    for (int first = 0; first < block.count; first += kTile) {
      bool& in_a_row = in_a_row_[first / kTile];
      in_a_row = first + kTile <= block.count;
      for (int i = 1; i < kTile && in_a_row; ++i)
        in_a_row = block.slots[first + i] == block.slots[first] + i;
    }
    key_scales_.Load(job_.keys, job_.heads, block, order);
    value_scales_.Load(job_.values, job_.heads, block, order);
    centre_.Start(block);
    const int64_t fetches =
        2 + Tiles::FetchesOfScore(slices_, groups) + Tiles::FetchesOfMix(slices_, groups);
    Ahead ahead(job_, first_head_, end_head_, next, first_ ? rows_.size() * fetches : 0);
    for (Rows& rows : rows_) {
      float* mix = job_.MixOf(q_, chunk_, rows.row - q_ * job_.rows());
      if (wide_runs_) {
        ScoreRuns(block, rows, ahead);
      } else {
        FindSources(job_.keys, block, rows.head);
        Tiles::Score(QueriesOf(rows), sources_, groups, slices_, ahead, scores_);
      }
      ahead.Fetch();
      const Vec keep =
          Softmax<kQueries>(block, order, job_.softcap, key_scales_, value_scales_, centre_, rows);
      for (int step = block.Steps<kQueries>(); step < groups * kTile / 4; ++step)
        Store(scores_ + step * kLanes, Vec{});  // of no token
      ahead.Fetch();
      Shrink<kQueries>(rows, keep, job_.head_dim, mix);
      FindSources(job_.values, block, rows.head);
      Tiles::Mix(scores_, sources_, groups, slices_, ahead, rows.count, job_.head_dim, mix);
    }
  }

  // Scores of keys that no tile takes, in vectors.
  void ScoreRuns(const Block& block, const Rows& rows, Ahead& ahead) {
    const float* queries = job_.arranged + rows.row * job_.head_dim;
    wide_.resize(kQueries * job_.head_dim);
    const char* vectors[kQueries];
    float* wide[kQueries];
    for (int i = 0; i < kQueries; ++i) wide[i] = &wide_[i * job_.head_dim];
    for (int step = 0; step < block.Steps<kQueries>(); ++step) {
      if (step % 2 == 0) ahead.Fetch();
      for (int i = 0; i < kQueries; ++i)
        vectors[i] = job_.keys.Row(block.Slot(step * kQueries + i), job_.heads) +
                     rows.head * job_.keys.bytes;
      wide_runs_->Widen(vectors, wide);
      WithCount<kQueries>(rows.count, [&](auto number) {
        Store(scores_ + step * kLanes,
              jaxkv::Score<float, decltype(number)::value, kQueries>(wide, queries, job_.head_dim));
      });
    }
  }

  // One head's vectors: as they are where a tile can be loaded from there, else copied.
  void FindSources(const Side& side, const Block& block, int64_t head) {
    for (int first = 0; first < block.count; first += kTile) {
      Source& source = sources_[first / kTile];
      const auto vector = [&](int token) {
        return side.Row(block.Slot(first + token), job_.heads) + head * side.bytes;
      };
      if (in_a_row_[first / kTile] && Tiles::AsStored(side)) {
        source = {vector(0), job_.heads * side.bytes};
        continue;
      }
      const char* vectors[kTile];
      for (int token = 0; token < kTile; ++token) vectors[token] = vector(token);
      char* copy = (char*)&copy_[first * slices_];
      Tiles::Copy(side, vectors, job_.head_dim, copy);
      source = {copy, slices_ * (int64_t)sizeof(Line)};
    }
  }

  const Line* QueriesOf(const Rows& rows) const {
    const int64_t shared = (job_.group + kQueries - 1) / kQueries;
    const int64_t number = rows.row / job_.group * shared + rows.row % job_.group / kQueries;
    return (const Line*)job_.arranged + number * LinesOfQueries(job_);
  }

  Attention& job_;
  const int64_t q_, chunk_, first_head_, end_head_;
  const bool first_;
  Blocks blocks_;
  int64_t slices_;
  bool in_a_row_[kGroups];  // whether a tile's tokens are in slots one after the other
  Source sources_[kGroups];
  std::vector<Rows> rows_;
  alignas(64) float scores_[kBlock * kQueries];
  std::vector<Line> copy_;
  std::optional<WideRuns> wide_runs_;  // where keys are in codes of several widths
  std::vector<float> wide_;
  Scales<kQueries> key_scales_, value_scales_;
  Centre<kQueries> centre_;
};

}  // namespace jaxkv
#endif
