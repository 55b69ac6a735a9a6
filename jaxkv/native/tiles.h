// A unit of attention in the processor's matrix tiles (AMX): bfloat16, and codes of whole numbers,
// which bfloat16 holds exactly.
//
// A tile multiplies pairs of bfloat16 and adds in float32. Queries are cut into three numbers of 8
// bits each, which are all of a float32, and weights into two, which are off by 2^-18 at most; each
// part is a column or a row of its own.
#pragma once
#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define JAXKV_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "codes.h"
#include "online.h"

namespace jaxkv {

constexpr int kTile = 16;               // rows of a tile, and columns of 4 bytes
constexpr int64_t kSlice = 2 * kTile;   // numbers of a vector that are in a tile's row
constexpr int kQueries = 4;             // of one KV head, that share a tile
constexpr int kGroups = kBlock / kTile; // tokens of a block go into so many tiles

// The system gives a process the tiles' registers when it first asks.
inline bool TilesAllowed() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
}

// Before a tile is loaded from what was just written: compilers do not know that it reads memory.
inline void Written() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// All tiles of full size, for as long as this lives.
class TilesInUse {
 public:
  TilesInUse() {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; ++tile) shape.row_bytes[tile] = 64, shape.rows[tile] = kTile;
    Written();
    _tile_loadconfig(&shape);
  }
  ~TilesInUse() { _tile_release(); }
};

// The highest bits of each number, as many as bfloat16 has; what is left stays.
inline Words TakeTop(Vec& numbers) {
  const Words top = (Words)numbers & 0xffff0000;
  numbers -= (Vec)top;
  return top;
}
// The same, rounded.
inline Words TakeNearest(Vec& numbers) {
  const Words top = ((Words)numbers + 0x8000) & 0xffff0000;
  numbers -= (Vec)top;
  return top;
}

// Queries of one KV head as tiles: row k holds numbers 2k and 2k + 1, part p of query g is in
// column 4p + g.
inline void ArrangeTiles(const float* queries, int count, int64_t head_dim, uint32_t* tiles) {
  std::fill_n(tiles, head_dim / kSlice * kTile * kTile, 0);
  for (int64_t d = 0; d < head_dim; d += kSlice, tiles += kTile * kTile)
    for (int g = 0; g < count; ++g) {
      const Vec first = Load(queries + g * head_dim + d), second = Load(queries + g * head_dim + d + kTile);
      Vec even = __builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      Vec odd = __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
      for (int part = 0; part < 3; ++part) {
        const Words pairs = TakeTop(even) >> 16 | TakeTop(odd);
        for (int k = 0; k < kTile; ++k) tiles[k * kTile + part * kQueries + g] = pairs[k];
      }
    }
}

// Of four vectors, the first four lanes of all, then the second four, and so on.
inline void TransposeFours(Vec (&v)[4]) {
  const Vec a = __builtin_shufflevector(v[0], v[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  const Vec b = __builtin_shufflevector(v[0], v[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  const Vec c = __builtin_shufflevector(v[2], v[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  const Vec d = __builtin_shufflevector(v[2], v[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#define EVEN(x, y) __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define ODD(x, y) __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
  v[0] = EVEN(a, c), v[1] = ODD(a, c), v[2] = EVEN(b, d), v[3] = ODD(b, d);
#undef EVEN
#undef ODD
}

// Weights of 16 tokens as a tile for one of values, whose rows are pairs of numbers of one token:
// even numbers are mixed by the first 8 rows, odd ones by the others; of each half, 4 rows are the
// queries' highest parts and 4 the rest.
inline void ArrangeWeights(const float* scores, uint32_t* weights) {
  Vec v[4];
  UNROLL for (int i = 0; i < 4; ++i) v[i] = Load(scores + i * kLanes);
  TransposeFours(v);  // of query g, 16 tokens
  UNROLL for (int g = 0; g < kQueries; ++g)
    UNROLL for (int part = 0; part < 2; ++part) {
      const Words top = TakeNearest(v[g]);
      *(Words*)&weights[(part * kQueries + g) * kTile] = top >> 16;
      *(Words*)&weights[(8 + part * kQueries + g) * kTile] = top;
    }
}

template <typename T>
class TileUnit {
 public:
  // KV heads [first_head, end_head) of sequence b.
  TileUnit(Attention& job, int64_t b, int64_t first_head, int64_t end_head, int64_t chunk)
      : job_(job), b_(b), chunk_(chunk), first_head_(first_head), end_head_(end_head) {
    for (int64_t head = first_head; head < end_head; ++head)
      for (int64_t g = 0; g < job.group; g += kQueries) {
        const int count = std::min<int64_t>(kQueries, job.group - g);
        rows_.push_back({head, b * job.rows() + head * job.group + g, count, scores_});
      }
    slices_ = job.head_dim / kSlice;
    mix_.resize(rows_.size() * slices_ * kTile);
  }

  // Logical slots [from, to), seen as key positions' list `list` says.
  void Run(int64_t list, int64_t from, int64_t to) {
    const TilesInUse tiles;
    Block blocks[2];
    bool more = job_.slots.Collect(b_, list, from, to, blocks[0]);
    for (int now = 0; more; now ^= 1) {
      more = job_.slots.Collect(b_, list, from, to, blocks[1 - now]);
      Add(blocks[now], more ? &blocks[1 - now] : nullptr);
    }
    for (size_t i = 0; i < rows_.size(); ++i) {
      Report<kQueries>(job_, rows_[i], chunk_);
      Gather(rows_[i], &mix_[i * slices_ * kTile]);
    }
  }

 private:
  // Where the vectors of a tile's tokens are: bfloat16, `stride` bytes from one to the next.
  struct Source {
    const char* vectors;
    int64_t stride;
  };

  void Add(const Block& block, const Block* next) {
    const InTurn<kQueries> order;
    key_scales_.Load(job_.keys.scales, job_.heads, block, order);
    value_scales_.Load(job_.values.scales, job_.heads, block, order);
    groups_ = (block.count + kTile - 1) / kTile;
    ahead_.Start(*this, next);
    for (size_t i = 0; i < rows_.size(); ++i) {
      Rows& rows = rows_[i];
      Line* mix = &mix_[i * slices_ * kTile];
      Sources(job_.keys, block, rows.head);
      ScoreAll(rows);
      const Vec keep = Softmax(block, order, job_.softcap, key_scales_, value_scales_, rows);
      for (int step = block.Steps<kQueries>(); step < groups_ * kTile / 4; ++step)
        Store(rows.scores + step * kLanes, Vec{});  // of no token
      Shrink(keep, mix);
      Sources(job_.values, block, rows.head);
      MixAll(rows, mix);
    }
  }

  // Lines of the next block, into the cache that is nearest to this core but for one, a few at a
  // time all through the work on this block: the processor does not look as far by itself, and
  // waits if it is asked for many at once.
  class Ahead {
   public:
    void Start(const TileUnit& unit, const Block* next) {
      unit_ = &unit, next_ = next, side_ = &unit.job_.keys, token_ = 0, line_ = end_ = nullptr;
      if (!next) return;
      const int64_t heads = unit.end_head_ - unit.first_head_;
      const int64_t bytes = heads * (unit.job_.keys.bytes + unit.job_.values.bytes);
      const int64_t passes = (unit.slices_ + 3) / 4;
      const int64_t calls = unit.rows_.size() * (2 * unit.slices_ + unit.groups_ * passes);
      each_ = (next->count * (bytes / 64 + 2) + calls - 1) / calls;
    }
    void Fetch() {
      if (!next_) return;
      for (int i = 0; i < each_; ++i, line_ += 64) {
        if (line_ >= end_ && !NextRun()) return;
        __builtin_prefetch(line_, 0, 2);
      }
    }

   private:
    bool NextRun() {
      if (token_ == next_->count) {
        if (side_ == &unit_->job_.values) return false;
        side_ = &unit_->job_.values, token_ = 0;
      }
      const Attention& job = unit_->job_;
      const int first = token_++;
      if (job.slots.lists == 1)  // all heads, so rows touch
        while (token_ < next_->count && next_->slots[token_] == next_->slots[token_ - 1] + 1) ++token_;
      line_ = side_->Row(next_->slots[first], job.heads) + unit_->first_head_ * side_->bytes;
      end_ = side_->Row(next_->slots[token_ - 1], job.heads) + unit_->end_head_ * side_->bytes;
      return true;
    }

    const TileUnit* unit_ = nullptr;
    const Block* next_ = nullptr;
    const Side* side_ = nullptr;
    int token_ = 0;
    int64_t each_ = 0;
    const char *line_ = nullptr, *end_ = nullptr;
  };

  // One head's vectors: as they are where a tile can be loaded from there, else copied or widened.
  void Sources(const Side& side, const Block& block, int64_t head) {
    const int64_t size = job_.head_dim * sizeof(BFloat16);
    copy_.resize(kBlock * slices_);
    for (int group = 0; group * kTile < block.count; ++group) {
      const int first = group * kTile;
      const char* vector = side.Row(block.slots[first], job_.heads) + head * side.bytes;
      if (std::is_same_v<T, BFloat16> && first + kTile <= block.count &&
          block.slots[first + kTile - 1] == block.slots[first] + kTile - 1) {
        sources_[group] = {vector, job_.heads * side.bytes};
        continue;
      }
      char* copy = (char*)&copy_[first * slices_];
      sources_[group] = {copy, size};
      for (int token = first; token < first + kTile; ++token, copy += size)
        Copy(side, side.Row(block.Slot(token), job_.heads) + head * side.bytes, job_.head_dim, copy);
    }
  }

  static void Copy(const Side& side, const char* vector, int64_t head_dim, char* copy) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      std::memcpy(copy, vector, side.bytes);
    } else if (side.bits == 8) {
      for (int64_t d = 0; d < head_dim; d += kSlice) {
        const int8_t* codes = (const int8_t*)vector + d;
        StoreNarrow(Load(codes), Load(codes + kTile), copy + d * sizeof(BFloat16));
      }
    } else {
      uint8_t codes[kMostLevels];
      Unpack(side, head_dim, vector, codes);
      char levels[sizeof(__m512i)] = {};
      StoreNarrow(Load(side.levels), Vec{}, levels);
      const __m512i table = _mm512_loadu_si512(levels);
      for (int64_t d = 0; d < head_dim; d += kSlice) {
        const __m256i some = _mm256_loadu_si256((const __m256i*)(codes + d));
        const __m512i found = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(some), table);
        std::memcpy(copy + d * sizeof(BFloat16), &found, sizeof found);
      }
    }
  }

  // Whole numbers as bfloat16.
  static void StoreNarrow(Vec first, Vec second, char* to) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    std::memcpy(to, &both, sizeof both);
  }

#define LOAD_SOURCE(tile, group, slice) \
  _tile_loadd(tile, sources_[group].vectors + (slice) * kSlice * sizeof(BFloat16), sources_[group].stride)

  // Each token's row of scores holds each query's three parts: rows.scores of their sums.
  void ScoreAll(Rows& rows) {
    alignas(64) float parts[kBlock * kTile];
    const uint32_t* queries = (const uint32_t*)job_.arranged + TileOf(rows) * kTile * kTile;
    Written();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t slice = 0; slice < slices_; ++slice) {
      ahead_.Fetch();
      _tile_loadd(4, queries + slice * kTile * kTile, 64);
      LOAD_SOURCE(5, 0, slice);
      _tile_dpbf16ps(0, 5, 4);
      if (groups_ > 1) {
        LOAD_SOURCE(6, 1, slice);
        _tile_dpbf16ps(1, 6, 4);
      }
      ahead_.Fetch();
      if (groups_ > 2) {
        LOAD_SOURCE(7, 2, slice);
        _tile_dpbf16ps(2, 7, 4);
      }
      if (groups_ > 3) {
        LOAD_SOURCE(5, 3, slice);
        _tile_dpbf16ps(3, 5, 4);
      }
    }
    _tile_stored(0, parts, 64);
    _tile_stored(1, parts + kTile * kTile, 64);
    _tile_stored(2, parts + 2 * kTile * kTile, 64);
    _tile_stored(3, parts + 3 * kTile * kTile, 64);
    for (int step = 0; step < groups_ * kTile / 4; ++step) {
      Vec v[4];
      UNROLL for (int i = 0; i < 4; ++i) v[i] = Load(parts + (4 * step + i) * kTile);
      TransposeFours(v);
      const Vec sum = v[2] + v[1] + v[0];  // lane i * 4 + g
      Store(rows.scores + step * kLanes,
            __builtin_shufflevector(sum, sum, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    }
  }

  // Adds a group's tokens to up to four slices of the mix at a time, as many as there are tiles for.
  void MixAll(const Rows& rows, Line* mix) {
    alignas(64) uint32_t weights[kTile * kTile];
    for (int64_t first = 0; first < slices_; first += 4, mix += 4 * kTile) {
      const int64_t slices = std::min<int64_t>(4, slices_ - first);
      Written();
      _tile_loadd(0, mix, 64);
      if (slices > 1) _tile_loadd(1, mix + kTile, 64);
      if (slices > 2) _tile_loadd(2, mix + 2 * kTile, 64);
      if (slices > 3) _tile_loadd(3, mix + 3 * kTile, 64);
      for (int group = 0; group < groups_; ++group) {
        ahead_.Fetch();
        ArrangeWeights(rows.scores + 4 * group * kLanes, weights);
        Written();
        _tile_loadd(4, weights, 64);
        LOAD_SOURCE(5, group, first);
        _tile_dpbf16ps(0, 4, 5);
        if (slices > 1) {
          LOAD_SOURCE(6, group, first + 1);
          _tile_dpbf16ps(1, 4, 6);
        }
        if (slices > 2) {
          LOAD_SOURCE(5, group, first + 2);
          _tile_dpbf16ps(2, 4, 5);
        }
        if (slices > 3) {
          LOAD_SOURCE(6, group, first + 3);
          _tile_dpbf16ps(3, 4, 6);
        }
      }
      _tile_stored(0, mix, 64);
      if (slices > 1) _tile_stored(1, mix + kTile, 64);
      if (slices > 2) _tile_stored(2, mix + 2 * kTile, 64);
      if (slices > 3) _tile_stored(3, mix + 3 * kTile, 64);
    }
  }
#undef LOAD_SOURCE

  void Shrink(Vec keep, Line* mix) const {
    bool all = true;
    for (int g = 0; g < kQueries; ++g) all &= keep[g * 4] == 1;
    if (all) return;
    for (int64_t row = 0; row < slices_ * kTile; ++row)
      Store(mix[row].lanes, Load(mix[row].lanes) * keep[row % kQueries * 4]);
  }

  void Gather(const Rows& rows, const Line* mix) {
    for (int g = 0; g < rows.count; ++g) {
      float* to = job_.MixOf(b_, chunk_, rows.row - b_ * job_.rows() + g);
      for (int64_t slice = 0; slice < slices_; ++slice, to += kSlice) {
        const Line* tile = mix + slice * kTile + g;
        const Vec even = Load(tile[0].lanes) + Load(tile[4].lanes);
        const Vec odd = Load(tile[8].lanes) + Load(tile[12].lanes);
        for (int i = 0; i < kTile; ++i) to[2 * i] = even[i], to[2 * i + 1] = odd[i];
      }
    }
  }

  // Which of all tiles of queries is the first of these.
  int64_t TileOf(const Rows& rows) const {
    const int64_t each = (job_.group + kQueries - 1) / kQueries;
    return (rows.row / job_.group * each + rows.row % job_.group / kQueries) * slices_;
  }

  Attention& job_;
  const int64_t b_, chunk_, first_head_, end_head_;
  int64_t slices_;
  int groups_ = 0;
  Source sources_[kGroups];
  std::vector<Rows> rows_;
  alignas(64) float scores_[kBlock * kQueries];
  std::vector<Line> mix_, copy_;
  Scales<kQueries> key_scales_, value_scales_;
  Ahead ahead_;
};

}  // namespace jaxkv
#endif
