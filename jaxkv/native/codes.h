// Vectors that are stored as codes: what each stands for, before its vector's scale.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__SSSE3__)
#include <immintrin.h>
#endif

#include "online.h"

namespace jaxkv {

struct Code {};  // an element type whose elements have no address of their own

typedef uint8_t Bytes16 __attribute__((vector_size(16)));

inline Bytes16 LookUp(const int8_t* levels, Bytes16 codes) {
#if defined(__SSSE3__)
  return (Bytes16)_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)levels), (__m128i)codes);
#else
  Bytes16 found;
  for (int i = 0; i < 16; ++i) found[i] = levels[codes[i]];
  return found;
#endif
}

// One plane of a vector (jaxkv/codecs/packing.py): `width` bits of each code, the first codes of
// all bytes before the second ones. Put at bit `low` of what `codes` holds, a Word at a time.
template <typename Word>
inline void AddPlane(const uint8_t* plane, int64_t size, int width, int low, uint8_t* codes) {
  Word mask, held{};
  std::memset(&mask, (1 << width) - 1, sizeof mask);
  for (int shift = 0; shift < 8; shift += width)
    for (int64_t j = 0; j < size; j += sizeof(Word), codes += sizeof(Word)) {
      Word word;
      std::memcpy(&word, plane + j, sizeof word);
      if (low) std::memcpy(&held, codes, sizeof held);
      word = (Word)((Word)(word >> shift) & mask) << low | held;
      std::memcpy(codes, &word, sizeof word);
    }
}

// Codes of so many bits, a byte each. Returns where they end.
inline const uint8_t* Unpack(int64_t bits, int64_t count, const uint8_t* plane, uint8_t* codes) {
  typedef uint16_t Words16 __attribute__((vector_size(16)));
  for (int64_t low = 0; low < bits; ) {
    const int width = bits - low >= 4 ? 4 : bits - low >= 2 ? 2 : 1;  // low bits first
    const int64_t size = count * width / 8;
    if (size % 16 == 0)
      AddPlane<Words16>(plane, size, width, low, codes);
    else if (size % 8 == 0)
      AddPlane<uint64_t>(plane, size, width, low, codes);
    else if (size % 4 == 0)
      AddPlane<uint32_t>(plane, size, width, low, codes);
    else if (size % 2 == 0)
      AddPlane<uint16_t>(plane, size, width, low, codes);
    else
      AddPlane<uint8_t>(plane, size, width, low, codes);
    plane += size, low += width;
  }
  return plane;
}

constexpr int64_t kMostNumbers = 1024;  // of a vector

inline void LevelsOfRuns(const Runs& runs, const char* vector, int8_t* levels) {
  const uint8_t* from = (const uint8_t*)vector;
  uint8_t codes[kMostNumbers];
  for (int64_t run = 0; run < runs.count; ++run) {
    const int64_t bits = runs.widths[2 * run], count = runs.widths[2 * run + 1];
    from = Unpack(bits, count, from, codes);
    for (int64_t i = 0; i < count; ++i)
      *levels++ = runs.levels[run * Runs::kMostLevels + codes[i]];
  }
}

// A vector's levels; those of int8 are its codes.
inline void Levels(const Side& side, int64_t head_dim, const char* vector, int8_t* levels) {
  if (side.runs.count) return LevelsOfRuns(side.runs, vector, levels);
  if (side.bits == 8) {
    std::memcpy(levels, vector, head_dim);
    return;
  }
  uint8_t* codes = (uint8_t*)levels;
  Unpack(side.bits, head_dim, (const uint8_t*)vector, codes);
  for (int64_t d = 0; d < head_dim; d += 16) {
    Bytes16 some;
    std::memcpy(&some, codes + d, 16);
    some = LookUp(side.levels, some);
    std::memcpy(codes + d, &some, 16);
  }
}

inline void WidenCodes(const Side& side, int64_t head_dim, const char* vector, float* wide) {
  int8_t levels[kMostNumbers];
  Levels(side, head_dim, vector, levels);
  for (int64_t d = 0; d < head_dim; d += kLanes) Store(wide + d, Load(levels + d));
}

}  // namespace jaxkv
