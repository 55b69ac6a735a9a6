// Fetching ahead.
#pragma once
#include <cstdint>

#include "online.h"

namespace jaxkv {

// The lines of a block that comes next, into the cache that is nearest to this core but for one, a
// few at a time all through the work on another: the processor does not look as far by itself, and
// waits if it is asked for many at once.
class Ahead {
 public:
  // Of KV heads [first, end); all of it after `calls` of Fetch, or nothing if none are made.
  Ahead(const Attention& job, int64_t first, int64_t end, const Block& next, int64_t calls)
      : job_(job), first_(first), end_head_(end), next_(next), side_(&job.keys) {
    const int64_t bytes = (end - first) * (job.keys.bytes + job.values.bytes);
    each_ = calls == 0 ? 0 : (next.count * ((bytes + 63) / 64) + calls - 1) / calls;
  }

  void Fetch() {
    for (int64_t i = 0; i < each_; ++i, line_ += 64) {
      if (line_ >= end_ && !NextRun()) return;
      __builtin_prefetch(line_, 0, 2);
    }
  }

 private:
  bool NextRun() {
    if (token_ == next_.count) {
      if (side_ == &job_.values || next_.count == 0) return false;
      side_ = &job_.values, token_ = 0;
    }
    const int first = token_++;
    if (job_.slots.lists == 1)  // all heads, so rows touch
      while (token_ < next_.count && next_.slots[token_] == next_.slots[token_ - 1] + 1) ++token_;
    line_ = side_->Row(next_.slots[first], job_.heads) + first_ * side_->bytes;
    end_ = side_->Row(next_.slots[token_ - 1], job_.heads) + end_head_ * side_->bytes;
    return true;
  }

  const Attention& job_;
  const int64_t first_, end_head_;
  const Block& next_;
  const Side* side_;
  int token_ = 0;
  int64_t each_;
  const char *line_ = nullptr, *end_ = nullptr;
};

}  // namespace jaxkv
