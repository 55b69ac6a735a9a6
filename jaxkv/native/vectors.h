// Vectors of 16 floats: loads of every element type of a cache, sums over lanes, exp and tanh.
// GCC's and Clang's vector extensions, so one source serves every processor; where these make poor
// code of a widening, the processor's own instruction.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

// In the products, so that sums are kept in registers rather than in an array.
#define UNROLL _Pragma("GCC unroll 16")

// What several products share: else GCC loads it anew for each of them.
#if defined(__x86_64__)
#define KEEP_IN_REGISTER(part) asm("" : "+v"(part))
#else
#define KEEP_IN_REGISTER(part)
#endif

// Where the compiler would have what it is given go through memory.
#define ALWAYS_INLINE __attribute__((always_inline))

namespace jaxkv {

constexpr int kLanes = 16;

typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes), aligned(2)));
typedef int8_t Bytes __attribute__((vector_size(kLanes), aligned(1)));
typedef uint8_t UnsignedBytes __attribute__((vector_size(kLanes), aligned(1)));
typedef int16_t SignedShorts __attribute__((vector_size(2 * kLanes)));

// What a register holds. Products are made of these: of vectors that are wider than registers
// compilers make code that goes through memory (GCC 12 on AVX2: 5 times slower).
#if defined(__AVX512F__)
constexpr int kPart = 16;
#elif defined(__AVX__)
constexpr int kPart = 8;
#else
constexpr int kPart = 4;
#endif
constexpr int kParts = kLanes / kPart;
typedef float Part __attribute__((vector_size(4 * kPart), aligned(4)));
typedef int32_t PartInts __attribute__((vector_size(4 * kPart), aligned(4)));
typedef uint32_t PartWords __attribute__((vector_size(4 * kPart), aligned(4)));

struct alignas(64) Line { float lanes[kLanes]; };  // of the processor's caches

// Room for floats, kept from call to call: the system takes longer to map fresh memory than a
// small layer takes to read.
class Scratch {
 public:
  float* Room(int64_t size) {
    if ((int64_t)lines_.size() * kLanes < size) lines_.resize((size + kLanes - 1) / kLanes);
    return lines_.data()->lanes;
  }

 private:
  std::vector<Line> lines_;
};

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };
struct Float8 { uint8_t bits; };  // e4m3, as in the OCP's specification of 8-bit floats

inline Words Bits(const void* p) {
  return __builtin_convertvector(*reinterpret_cast<const Shorts*>(p), Words);
}
inline Vec Load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline Vec Load(const BFloat16* p) { return (Vec)(Bits(p) << 16); }
inline Vec Load(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  Vec wide;
  const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1));
  std::memcpy(&wide, &low, 32), std::memcpy((float*)&wide + 8, &high, 32);
  return wide;
#else
  const Words half = Bits(p), exponent = half & 0x7c00;
  const Words normal = ((half & 0x7fff) << 13) + (112 << 23);  // float's exponent bias is larger
  const Words not_finite = exponent == 0x7c00 ? Words{} + 0x7f800000 : Words{};
  // A float16 too small for a normal number is one in float, and is never made from a denormal:
  // XLA's threads may read those as zero.
  const Vec small = __builtin_convertvector(Ints(half & 0x3ff), Vec) * 0x1p-24f;
  const Words magnitude = exponent == 0 ? (Words)small : normal | not_finite;
  return (Vec)(magnitude | (half & 0x8000) << 16);
#endif
}
inline Vec Load(const int8_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  const auto wide = __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), SignedShorts);
  return __builtin_convertvector(__builtin_convertvector(wide, Ints), Vec);
#endif
}
inline Vec Load(const Float8* p) {
  const auto bytes = *reinterpret_cast<const UnsignedBytes*>(p);
  const Words word = __builtin_convertvector(__builtin_convertvector(bytes, Shorts), Words);
  const Words magnitude = word & 0x7f;
  const Words normal = (magnitude << 20) + (120 << 23);  // float's exponent bias is larger
  const Words small = (Words)(__builtin_convertvector(Ints(magnitude), Vec) * 0x1p-9f);
  const Words finite = magnitude < 8 ? small : normal;
  return (Vec)((magnitude == 0x7f ? Words{} + 0x7fc00000 : finite) | (word & 0x80) << 24);
}
inline float Widen(uint16_t bits) {  // one bfloat16
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline void Store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Part LoadPart(const float* p) { return *reinterpret_cast<const Part*>(p); }
// The same four floats, again and again. (GCC 12 would have them go through memory.)
inline Part LoadFours(const float* p) {
#if defined(__AVX512F__)
  return (Part)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
#elif defined(__AVX__)
  return (Part)_mm256_broadcast_ps((const __m128*)p);
#else
  return LoadPart(p);
#endif
}
inline void StorePart(float* p, Part v) { *reinterpret_cast<Part*>(p) = v; }

// One part of two vectors that are side by side, in the order in which `LoadMany` has them.
inline ALWAYS_INLINE void LoadPair(const float* p, int part, Part (&pair)[2]) {
  pair[0] = *reinterpret_cast<const Part*>(p + part * kPart);
  pair[1] = *reinterpret_cast<const Part*>(p + kLanes + part * kPart);
}
inline ALWAYS_INLINE void LoadPair(const BFloat16* p, int part, Part (&pair)[2]) {
  const PartWords both = *reinterpret_cast<const PartWords*>(p + 2 * part * kPart);
  pair[0] = (Part)(both << 16);
  pair[1] = (Part)(both & 0xffff0000);
}
// The lines of both, into the nearest cache but for one.
template <typename T>
inline void FetchPair(const T* p) {
  for (const T* line = p; line < p + 2 * kLanes; line += sizeof(Line) / sizeof(T))
    __builtin_prefetch(line, 0, 2);
}

// N vectors, in parts. bfloat16 comes in the order in which it is widened with one instruction a
// register: of each 32 elements first the even ones, then the odd. Whoever meets them is put in that
// order by `Arrange`, once, and back by `Restore`.
template <int N, typename T>
inline ALWAYS_INLINE void LoadMany(const T* p, Part (&v)[N][kParts]) {
  UNROLL for (int i = 0; i < N; ++i) {
    const Vec whole = Load(p + i * kLanes);
    std::memcpy(v[i], &whole, sizeof whole);
  }
}
template <int N>
inline ALWAYS_INLINE void LoadMany(const float* p, Part (&v)[N][kParts]) {
  UNROLL for (int i = 0; i < N; ++i)
    UNROLL for (int part = 0; part < kParts; ++part)
      v[i][part] = *reinterpret_cast<const Part*>(p + i * kLanes + part * kPart);
}
template <int N>
inline ALWAYS_INLINE void LoadMany(const BFloat16* p, Part (&v)[N][kParts]) {
  if constexpr (N == 1) {
    const Vec whole = Load(p);
    std::memcpy(v[0], &whole, sizeof whole);
  } else {
    UNROLL for (int i = 0; i < N; i += 2)
      UNROLL for (int part = 0; part < kParts; ++part) {
        Part pair[2];
        LoadPair(p + i * kLanes, part, pair);
        v[i][part] = pair[0], v[i + 1][part] = pair[1];
      }
  }
}
// Where registers are as wide as vectors: parts of one are loaded as a whole, through memory if not at
// once (float16 on AVX2: 3 times slower).
template <int N>
inline ALWAYS_INLINE void KeepInRegisters(Part (&v)[N][kParts]) {
  if (kParts > 1) return;
  UNROLL for (int i = 0; i < N; ++i)
    UNROLL for (int part = 0; part < kParts; ++part) KEEP_IN_REGISTER(v[i][part]);
}
template <int N>
inline void StoreMany(float* p, const Part (&v)[N][kParts]) {
  UNROLL for (int i = 0; i < N; ++i)
    UNROLL for (int part = 0; part < kParts; ++part)
      *reinterpret_cast<Part*>(p + i * kLanes + part * kPart) = v[i][part];
}
template <typename T>
constexpr int kWaysOf = std::is_same_v<T, BFloat16> ? 2 : 1;
template <typename T>
void Arrange(const float* from, float* to, int64_t size) {
  std::memcpy(to, from, 4 * size);
}
template <>
inline void Arrange<BFloat16>(const float* from, float* to, int64_t size) {
  const int64_t paired = size / (2 * kLanes) * (2 * kLanes);
  for (int64_t i = 0; i < paired; i += 2 * kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      to[i + lane] = from[i + 2 * lane];
      to[i + kLanes + lane] = from[i + 2 * lane + 1];
    }
  std::memcpy(to + paired, from + paired, 4 * (size - paired));
}
// Of each `ways` vectors, the first elements of all, then the second ones, and so on.
inline void Restore(int ways, const float* from, float* to, int64_t size) {
  const int64_t together = ways * kLanes, whole = size / together * together;
  for (int64_t i = 0; i < whole; i += together)
    for (int64_t lane = 0; lane < kLanes; ++lane)
      for (int way = 0; way < ways; ++way)
        to[i + lane * ways + way] = from[i + way * kLanes + lane];
  std::memcpy(to + whole, from + whole, 4 * (size - whole));
}

// Lane i of the result is the sum of the lanes of v[i].
inline ALWAYS_INLINE Part SumLanes(const Part (&v)[kPart]) {
  Part a[kPart / 2];
  // Two vectors of partial sums, each in groups of some lanes, become one with groups of half.
#define FOLD(from, to, number, low, high)                                      \
  UNROLL for (int i = 0; i < number; ++i)                                      \
      to[i] = __builtin_shufflevector(from[2 * i], from[2 * i + 1], PARENS low) + \
              __builtin_shufflevector(from[2 * i], from[2 * i + 1], PARENS high);
#define PARENS(...) __VA_ARGS__
#if defined(__AVX512F__)
  FOLD(v, a, 8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
       (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
  FOLD(a, a, 4, (0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
       (4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
  FOLD(a, a, 2, (0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29),
       (2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31))
  FOLD(a, a, 1, (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
       (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31))
#elif defined(__AVX__)
  FOLD(v, a, 4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))
  FOLD(a, a, 2, (0, 1, 4, 5, 8, 9, 12, 13), (2, 3, 6, 7, 10, 11, 14, 15))
  FOLD(a, a, 1, (0, 2, 4, 6, 8, 10, 12, 14), (1, 3, 5, 7, 9, 11, 13, 15))
#else
  FOLD(v, a, 2, (0, 1, 4, 5), (2, 3, 6, 7))
  FOLD(a, a, 1, (0, 2, 4, 6), (1, 3, 5, 7))
#endif
#undef FOLD
#undef PARENS
  return a[0];
}

// The sum of a vector's parts.
inline Part Folded(const Part (&v)[kParts]) {
  Part both[kParts];
  UNROLL for (int part = 0; part < kParts; ++part) both[part] = v[part];
  UNROLL for (int half = kParts / 2; half > 0; half /= 2)
    UNROLL for (int part = 0; part < half; ++part) both[part] += both[part + half];
  return both[0];
}

// Lane i of the result is the sum of the lanes of v[i].
inline ALWAYS_INLINE Vec SumEach(const Part (&v)[kParts][kPart]) {
  Vec all;
  UNROLL for (int part = 0; part < kParts; ++part) {
    const Part sums = SumLanes(v[part]);
    std::memcpy((float*)&all + part * kPart, &sums, sizeof sums);
  }
  return all;
}

// In each lane what all lanes of its group of `Size` neighbours make together.
template <int Size, typename Combine>
inline Vec Together(Vec v, Combine combine) {
#define TURN(...) v = combine(v, __builtin_shufflevector(v, v, __VA_ARGS__))
  if constexpr (Size > 8) TURN(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  if constexpr (Size > 4) TURN(4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  if constexpr (Size > 2) TURN(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  TURN(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#undef TURN
  return v;
}
// function(part of each of the vectors), for all parts.
template <typename Function, typename... Vecs>
inline ALWAYS_INLINE Vec InParts(const Function& function, Vecs... vectors) {
  Vec result;
  UNROLL for (int part = 0; part < kParts; ++part) {
    const Part some = function(reinterpret_cast<const Part*>(&vectors)[part]...);
    std::memcpy((float*)&result + part * kPart, &some, sizeof some);
  }
  return result;
}
inline Vec Larger(Vec a, Vec b) {
  return InParts([](Part a, Part b) { return a > b ? a : b; }, a, b);
}
inline bool Any(Ints lanes) {  // of what comparisons give
  int32_t some = 0;
  UNROLL for (int i = 0; i < kLanes; ++i) some |= lanes[i];
  return some != 0;
}
inline Vec Added(Vec a, Vec b) { return a + b; }

// exp of each lane, to 2 ulp where x is in [-87, 88]; below, 1.6e-38; of NaN, NaN.
// Range reduction and polynomial as in Cephes' expf (Moshier).
inline ALWAYS_INLINE Part ExpOfPart(Part x) {
  const Part lowest = Part{} - 87.0f;
  x = x < lowest ? lowest : x;
  constexpr float kWhole = 0x1.8p23f;  // what is added to this is rounded to a whole number
  const Part n = x * 1.44269504f + kWhole, whole = n - kWhole;
  const Part r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Part p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1.0f) * (Part)(((PartWords)n << 23) + (127 << 23));
}
inline ALWAYS_INLINE Vec Exp(Vec x) { return InParts(ExpOfPart, x); }

// tanh of each lane, to 2 ulp; Cephes' tanhf: a polynomial near 0, where 1 - ... would cancel.
inline Vec Tanh(Vec x) {
  const Vec size = x < 0 ? -x : x, square = x * x;
  Vec p = -5.70498872745e-3f * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vec ceiling = Vec{} + 9.0f;  // from here on it is 1
  const Vec far = 1.0f - 2.0f / (Exp(2.0f * (size > ceiling ? ceiling : size)) + 1.0f);
  return size < 0.625f ? p * square * x + x : (x < 0 ? -far : far);
}

}  // namespace jaxkv
