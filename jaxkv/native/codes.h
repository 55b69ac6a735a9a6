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
// all bytes before the second ones. Put at bit `low` of what `codes` holds.
inline const uint8_t* AddPlane(const uint8_t* plane, int width, int low, int64_t head_dim,
                               uint8_t* codes) {
  const int64_t size = head_dim * width / 8;
  const uint64_t mask = 0x0101010101010101u * ((1 << width) - 1);
  for (int part = 0; part < 8 / width; ++part)
    for (int64_t j = 0; j < size; j += 8) {  // head_dim is in whole sixteens: 8 bytes, or 2 or 4
      const int64_t some = size - j < 8 ? size - j : 8;
      uint64_t word = 0, held;
      std::memcpy(&word, plane + j, some);
      uint8_t* place = codes + part * size + j;
      std::memcpy(&held, place, some);
      word = (word >> part * width & mask) << low | (low ? held : 0);
      std::memcpy(place, &word, some);
    }
  return plane + size;
}

// A vector's levels; those of int8 are its codes.
inline void Levels(const Side& side, int64_t head_dim, const char* vector, int8_t* levels) {
  if (side.bits == 8) {
    std::memcpy(levels, vector, head_dim);
    return;
  }
  const uint8_t* packed = (const uint8_t*)vector;
  uint8_t* codes = (uint8_t*)levels;
  if (side.bits == 3) {
    packed = AddPlane(packed, 2, 0, head_dim, codes);
    AddPlane(packed, 1, 2, head_dim, codes);
  } else {
    AddPlane(packed, side.bits, 0, head_dim, codes);
  }
  for (int64_t d = 0; d < head_dim; d += 16) {
    Bytes16 some;
    std::memcpy(&some, codes + d, 16);
    some = LookUp(side.levels, some);
    std::memcpy(codes + d, &some, 16);
  }
}

constexpr int64_t kMostLevels = 1024;  // of a vector

inline void WidenCodes(const Side& side, int64_t head_dim, const char* vector, float* wide) {
  int8_t levels[kMostLevels];
  Levels(side, head_dim, vector, levels);
  for (int64_t d = 0; d < head_dim; d += kLanes) Store(wide + d, Load(levels + d));
}

}  // namespace jaxkv
