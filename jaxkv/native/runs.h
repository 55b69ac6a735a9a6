// Keys in codes of several widths, widened 64 numbers at once by look-up of bytes (AVX-512 VBMI).
#pragma once
#include <algorithm>
#include <cstring>

#include "codes.h"
#include "tiles.h"

namespace jaxkv {

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
class WideRuns {
 public:
  static bool Serves(const Side& side, int64_t head_dim) {
    int64_t levels = 0, widest = 0;
    for (int64_t run = 0; run < side.runs.count; ++run) {
      const int64_t bits = side.runs.widths[2 * run];
      levels += int64_t{1} << bits, widest = std::max(widest, bits);
    }
    return head_dim % kNumbers == 0 && head_dim <= 2 * kNumbers && side.bytes <= kMostBytes &&
           levels <= kMostLevels && widest <= kMostBits;
  }

  WideRuns(const Side& side, int64_t head_dim) : slices_(head_dim / kNumbers) {
    for (int part = 0; part < 2; ++part) held_[part] = Lowest(side.bytes - part * kNumbers);
    int64_t number = 0, byte = 0, level = 0;
    for (int64_t run = 0; run < side.runs.count; ++run) {
      const int64_t bits = side.runs.widths[2 * run], count = side.runs.widths[2 * run + 1];
      for (int64_t i = 0; i < count; ++i)
        numbers_[(number + i) / kNumbers].first_level[(number + i) % kNumbers] = level;
      for (int64_t low = 0, plane = 0; low < bits; ++plane) {  // as `Unpack` has them
        const int64_t width = bits - low >= 4 ? 4 : bits - low >= 2 ? 2 : 1;
        const int64_t size = count * width / 8;
        for (int64_t i = 0; i < count; ++i) {
          Plane& own = numbers_[(number + i) / kNumbers].planes[plane];
          const int64_t at = (number + i) % kNumbers;
          own.bytes[at] = byte + i % size;
          own.shifts[at] = (at % 8 * 8 + i / size * width - low) & 63;
          own.masks[at] = ((1 << width) - 1) << low;
        }
        byte += size, low += width;
      }
      for (int64_t i = 0; i < int64_t{1} << bits; ++i, ++level) {
        uint32_t word;
        std::memcpy(&word, &side.runs.levels[run * Runs::kMostLevels + i], 4);
        for (int part = 0; part < 4; ++part) levels_[part][level] = word >> (8 * part);
      }
      number += count;
    }
  }

  // Numbers as `Widen` leaves them: of each 64, the first fours of all 16, then the second ones.
  static void Arrange(const float* from, float* to, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
      const int64_t at = i % kNumbers;
      to[i] = from[i - at + at / 4 % 4 * 16 + at / 16 * 4 + at % 4];
    }
  }

  // Of four tokens, since what is looked up in stays in registers.
  void Widen(const char* const (&vectors)[4], float* const (&wide)[4]) const {
    for (int64_t slice = 0; slice < slices_; ++slice) {
      const Numbers& own = numbers_[slice];
      __m512i bytes[2], shifts[2], masks[2], levels[4][2];
      UNROLL for (int i = 0; i < 2; ++i) {
        const Plane& plane = own.planes[i];
        bytes[i] = Get(plane.bytes), shifts[i] = Get(plane.shifts), masks[i] = Get(plane.masks);
        UNROLL for (int part = 0; part < 4; ++part)
          levels[part][i] = Get(levels_[part] + i * kNumbers);
      }
      const __m512i first_level = Get(own.first_level);
      UNROLL for (int token = 0; token < 4; ++token) {
        const __m512i low = _mm512_maskz_loadu_epi8(held_[0], vectors[token]);
        const __m512i high = _mm512_maskz_loadu_epi8(held_[1], vectors[token] + kNumbers);
        __m512i codes[2], of[4];  // of: bytes of all floats
        UNROLL for (int i = 0; i < 2; ++i) {
          const __m512i some = _mm512_permutex2var_epi8(low, bytes[i], high);
          codes[i] = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts[i], some), masks[i]);
        }
        const __m512i level = _mm512_add_epi8(_mm512_or_si512(codes[0], codes[1]), first_level);
        UNROLL for (int part = 0; part < 4; ++part)
          of[part] = _mm512_permutex2var_epi8(levels[part][0], level, levels[part][1]);
        const __m512i halves[4] = {
            _mm512_unpacklo_epi8(of[0], of[1]), _mm512_unpackhi_epi8(of[0], of[1]),
            _mm512_unpacklo_epi8(of[2], of[3]), _mm512_unpackhi_epi8(of[2], of[3])};
        float* to = wide[token] + slice * kNumbers;
        UNROLL for (int i = 0; i < 2; ++i) {
          _mm512_storeu_si512(to + 32 * i, _mm512_unpacklo_epi16(halves[i], halves[i + 2]));
          _mm512_storeu_si512(to + 32 * i + 16, _mm512_unpackhi_epi16(halves[i], halves[i + 2]));
        }
      }
    }
  }

 private:
  static constexpr int64_t kNumbers = 64, kMostBytes = 128, kMostLevels = 128, kMostBits = 6;
  struct Plane {
    alignas(64) uint8_t bytes[kNumbers] = {}, shifts[kNumbers] = {}, masks[kNumbers] = {};
  };
  struct Numbers {
    Plane planes[2];
    alignas(64) uint8_t first_level[kNumbers] = {};
  };

  static __m512i Get(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
  static __mmask64 Lowest(int64_t count) {
    return count <= 0 ? 0 : count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
  }

  const int64_t slices_;
  __mmask64 held_[2];
  Numbers numbers_[2];
  alignas(64) uint8_t levels_[4][kMostLevels] = {};
};
#else
struct WideRuns {  // not on this processor
  WideRuns(const Side&, int64_t) {}
  static bool Serves(const Side&, int64_t) { return false; }
  static void Arrange(const float*, float*, int64_t) {}
  void Widen(const char* const (&)[4], float* const (&)[4]) const {}
};
#endif

}  // namespace jaxkv
