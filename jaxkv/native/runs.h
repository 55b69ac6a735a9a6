// Keys in codes of several widths, looked up 64 numbers at once (AVX-512 VBMI).
#pragma once
#include "tiles.h"
#if defined(__AVX512BW__)
#include <algorithm>

#include "codes.h"

namespace jaxkv {

#if defined(__AVX512VBMI__)
// The levels of 64 of a vector's numbers.
class RunLevels {
 public:
  static bool Serves(const Side& side, int64_t head_dim) {
    int64_t levels = 0, widest = 0;
    for (int64_t run = 0; run < side.runs.count; ++run) {
      const int64_t bits = side.runs.widths[2 * run];
      levels += int64_t{1} << bits, widest = std::max(widest, bits);
    }
    return side.runs.count && head_dim % kNumbers == 0 && side.bytes <= kMostBytes &&
           levels <= kMostLevels && widest <= kMostBits;
  }

  // Numbers [first, first + 64).
  RunLevels(const Side& side, int64_t first) {
    for (int part = 0; part < 2; ++part) held_[part] = Lowest(side.bytes - part * kNumbers);
    alignas(64) Controls planes[2] = {};
    alignas(64) uint8_t first_level[kNumbers] = {}, levels[kMostLevels] = {};
    int64_t number = 0, byte = 0, level = 0;
    for (int64_t run = 0; run < side.runs.count; ++run) {
      const int64_t bits = side.runs.widths[2 * run], count = side.runs.widths[2 * run + 1];
      const int64_t begin = std::max(number, first), end = std::min(number + count, first + 64);
      for (int64_t i = begin; i < end; ++i) first_level[i - first] = level;
      for (int64_t low = 0, plane = 0; low < bits; ++plane) {  // as `Unpack` has them
        const int64_t width = bits - low >= 4 ? 4 : bits - low >= 2 ? 2 : 1;
        const int64_t size = count * width / 8;
        for (int64_t i = begin; i < end; ++i) {
          Controls& own = planes[plane];
          const int64_t at = i - first, of_run = i - number;
          own.bytes[at] = byte + of_run % size;
          own.shifts[at] = (at % 8 * 8 + of_run / size * width - low) & 63;
          own.masks[at] = ((1 << width) - 1) << low;
        }
        byte += size, low += width;
      }
      for (int64_t i = 0; i < int64_t{1} << bits; ++i, ++level)
        levels[level] = side.runs.levels[run * Runs::kMostLevels + i];
      number += count;
    }
    for (int i = 0; i < 2; ++i) {
      bytes_[i] = _mm512_load_si512(planes[i].bytes);
      shifts_[i] = _mm512_load_si512(planes[i].shifts);
      levels_[i] = _mm512_load_si512(levels + i * kNumbers);
    }
    low_bits_ = _mm512_load_si512(planes[0].masks);
    all_bits_ = _mm512_or_si512(low_bits_, _mm512_load_si512(planes[1].masks));
    first_level_ = _mm512_load_si512(first_level);
  }

  // Whether vectors have more than 64 bytes is known before.
  template <bool kLong>
  __m512i Of(const char* vector) const {
    const __m512i low = _mm512_maskz_loadu_epi8(held_[0], vector);
    __m512i codes[2], high;
    if constexpr (kLong) high = _mm512_maskz_loadu_epi8(held_[1], vector + kNumbers);
    UNROLL for (int i = 0; i < 2; ++i) {
      const __m512i some = kLong ? _mm512_permutex2var_epi8(low, bytes_[i], high)
                                 : _mm512_permutexvar_epi8(bytes_[i], low);
      codes[i] = _mm512_multishift_epi64_epi8(shifts_[i], some);
    }
    constexpr int kFirstWhereSet = 0xca;
    const __m512i code =
        _mm512_ternarylogic_epi64(low_bits_, codes[0], codes[1], kFirstWhereSet);
    const __m512i level = _mm512_add_epi8(_mm512_and_si512(code, all_bits_), first_level_);
    return _mm512_permutex2var_epi8(levels_[0], level, levels_[1]);
  }

 private:
  static constexpr int64_t kNumbers = 64, kMostBytes = 128, kMostLevels = 128, kMostBits = 6;
  struct Controls {
    alignas(64) uint8_t bytes[kNumbers], shifts[kNumbers], masks[kNumbers];
  };

  static __mmask64 Lowest(int64_t count) {
    return count <= 0 ? 0 : count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
  }

  __mmask64 held_[2];
  __m512i bytes_[2], shifts_[2], levels_[2], low_bits_, all_bits_, first_level_;
};
#else
struct RunLevels {  // not on this processor
  static bool Serves(const Side&, int64_t) { return false; }
  RunLevels(const Side&, int64_t) {}
  template <bool>
  __m512i Of(const char*) const { return _mm512_setzero_si512(); }
};
#endif

}  // namespace jaxkv
#endif
