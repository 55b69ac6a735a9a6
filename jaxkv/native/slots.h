// Which slots of a cache each query sees, whatever the addressing.
#pragma once
#include <algorithm>
#include <cstdint>

namespace jaxkv {

constexpr int kBlock = 64;  // slots that are worked on together
// The first of a unit, which nobody has fetched, ends at the next multiple of this.
constexpr int kFirstBlock = 16;

// Up to kBlock visible slots, taken K at a time in one of two orders.
struct Block {
  int64_t slots[kBlock];
  int32_t positions[kBlock];  // of the tokens that are in them
  int count = 0;

  template <int K>
  int Steps() const { return (count + K - 1) / K; }
  // Past the last token, which a step may reach, the last again.
  int64_t Slot(int token) const { return slots[std::min(token, count - 1)]; }
};

// Of K runs, each in memory order, the next token. (The processor fetches ahead in each run by
// itself, and keeps up with many at once.)
struct InRuns {
  int steps;
  int Token(int step, int i) const { return step + i * steps; }
};

template <int K>
struct InTurn {
  int Token(int step, int i) const { return step * K + i; }
};

// One layer's slots. Sequence b has `extent` logical ones; by default logical slot p is slot
// b * extent + p and holds position p. Queries q are `tokens` of each sequence, one after the other.
struct Slots {
  int64_t batch, tokens, extent, num_slots;
  const int32_t* query_positions;            // [batch, tokens]
  const int32_t* lengths;                    // [batch]
  int64_t window = 0;                        // newest positions that are visible; 0 for all
  // Pages: logical slot p is slot table[b, p / page_size] * page_size + p % page_size.
  const int32_t* table = nullptr;  // [batch, pages]; -1 for no page
  int64_t pages = 0, page_size = 1;
  // What each logical slot holds; -1 for nothing.
  const int32_t* key_positions = nullptr;  // [batch, lists, extent]
  int64_t lists = 1;                       // as many as KV heads, if each keeps its own tokens
  int64_t kept_window = 0, kept_sinks = 0;  // of the cache itself: newest and first positions
  // Where a step's tokens form a tree: its first slot, and which of its tokens query q sees, bit j
  // for token j. A query's position is that in its own text, of which the others are no part.
  const int32_t* starts = nullptr;  // [batch]
  const int32_t* sees = nullptr;    // [batch, tokens]

  int64_t Queries() const { return batch * tokens; }

  // The logical slots [begin, end) among which are all that query q sees; by default those of its
  // own text, in order.
  int64_t End(int64_t q) const {
    if (key_positions) return query_positions[q] < 0 ? 0 : extent;
    return std::max<int64_t>(
        0, std::min({extent, (int64_t)lengths[q / tokens], (int64_t)query_positions[q] + 1}));
  }
  int64_t Begin(int64_t q) const {
    if (key_positions) return 0;
    int64_t first = 0;
    for (const int64_t newest : {window, kept_window})
      if (newest > 0) first = std::max(first, query_positions[q] + 1 - newest);
    return std::min(first, End(q));
  }

  // Fills a block with the next slots in [cursor, end) that query q sees, `most` of them.
  void Collect(int64_t q, int64_t list, int64_t& cursor, int64_t end, int most,
               Block& block) const {
    const int64_t b = q / tokens;
    block.count = 0;
    while (cursor < end && block.count < most) {
      int64_t run_end = end, first = b * extent, moved = 0;  // slot of the run's logical slot 0
      if (sees && !key_positions) {
        moved = Moved(q, cursor);
        if (cursor + moved >= extent) break;  // it was dropped
        run_end = cursor < starts[b] ? std::min<int64_t>(end, starts[b]) : cursor + 1;
      }
      if (table) {
        const int64_t page = (cursor + moved) / page_size;
        const int64_t place = (int64_t)table[b * pages + page] * page_size;
        run_end = std::min(run_end, (page + 1) * page_size - moved);
        if (place < 0 || place + page_size > num_slots) {
          cursor = run_end;
          continue;
        }
        first = place - page * page_size;
      }
      if (!key_positions) {
        const int64_t some = std::min<int64_t>(run_end - cursor, most - block.count);
        first += moved + cursor;
        for (int64_t i = 0; i < some; ++i) block.slots[block.count + i] = first + i;
        for (int64_t i = 0; i < some; ++i) block.positions[block.count + i] = cursor + i;
        block.count += some, cursor += some;
        continue;
      }
      const int32_t* held = key_positions + (b * lists + list) * extent;
      for (; cursor < run_end && block.count < most; ++cursor)
        if (Sees(q, held[cursor])) {
          block.positions[block.count] = held[cursor];
          block.slots[block.count++] = first + cursor;
        }
    }
  }

 private:
  // How much further on than its place in the text of query q a token is stored.
  int64_t Moved(int64_t q, int64_t in_text) const {
    if (in_text < starts[q / tokens]) return 0;
    const int64_t depth = in_text - starts[q / tokens];
    uint32_t rest = sees[q];
    for (int64_t i = 0; i < depth; ++i) rest &= rest - 1;
    return rest == 0 ? extent : __builtin_ctz(rest) - depth;
  }
  bool Sees(int64_t q, int64_t key) const {
    const int64_t query = query_positions[q];
    if (const int64_t token = sees ? key - starts[q / tokens] : -1; token >= 0) {
      const uint32_t own = sees[q];
      if (token >= 32 || !(own >> token & 1)) return false;
      key = starts[q / tokens] + __builtin_popcount(own & ((1u << token) - 1));
    }
    if (key < 0 || key > query) return false;
    if (window > 0 && key <= query - window) return false;
    return kept_window == 0 || key > query - kept_window || key < kept_sinks;
  }
};

// What query q sees of the logical slots [from, to), a block at a time, and the next one beside it.
class Blocks {
 public:
  Blocks(const Slots& slots, int64_t q, int64_t list, int64_t from, int64_t to)
      : slots_(slots), q_(q), list_(list), cursor_(from), to_(to) {
    Collect(kFirstBlock - from % kFirstBlock);
  }

  // Goes on to the next block; false if there is none.
  bool Advance() {
    if (Next().count == 0) return false;
    now_ = 1 - now_;
    Collect(kBlock);
    return true;
  }
  const Block& Now() const { return blocks_[now_]; }
  const Block& Next() const { return blocks_[1 - now_]; }

 private:
  void Collect(int most) {
    slots_.Collect(q_, list_, cursor_, to_, most, blocks_[1 - now_]);
  }

  const Slots& slots_;
  const int64_t q_, list_;
  int64_t cursor_, to_;
  int now_ = 0;
  Block blocks_[2];
};

}  // namespace jaxkv
