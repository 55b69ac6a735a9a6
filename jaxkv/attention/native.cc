// One decode step's attention over a jaxkv cache on a CPU. Each used slot of the layer is read
// once, in memory order, by all threads of XLA's own pool; nothing is copied out of the cache.
//
// A unit of work is a run of slots of one sequence. It keeps an online softmax (running maximum,
// total and mix) for every query head; the units of a sequence are joined at the end.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// In the two products, so that sums are kept in registers rather than in an array.
#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int kLanes = 16;
constexpr int kBlock = 64;           // slots whose scores are held at once
constexpr int kSmallestUnit = 128;   // slots worth handing to another thread
constexpr int kUnitsPerThread = 8;
constexpr int64_t kWakeBytes = 1 << 20;
constexpr int kSpins = 1 << 12;      // looks at a unit under way before sleeping until it is done
constexpr float kLowest = -1e30f;    // a finite "minus infinity"

typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes), aligned(2)));
typedef int8_t Bytes __attribute__((vector_size(kLanes), aligned(1)));
typedef int16_t SignedShorts __attribute__((vector_size(2 * kLanes)));

// The element types of a cache. bfloat16 is stored as its bits; float16 and int8 are widened in
// steps that compilers turn into vector instructions, which they do not for a plain conversion.
struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline Words Bits(const void* p) {
  return __builtin_convertvector(*reinterpret_cast<const Shorts*>(p), Words);
}
inline Vec Load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline Vec Load(const BFloat16* p) { return (Vec)(Bits(p) << 16); }
inline Vec Load(const Float16* p) {
  const Words half = Bits(p), exponent = half & 0x7c00;
  const Words normal = ((half & 0x7fff) << 13) + (112 << 23);  // float's exponent bias is larger
  const Words not_finite = exponent == 0x7c00 ? Words{} + 0x7f800000 : Words{};
  // A float16 too small for a normal number is one in float, and is never made from a denormal:
  // XLA's threads may read those as zero.
  const Vec small = __builtin_convertvector(Ints(half & 0x3ff), Vec) * 0x1p-24f;
  const Words magnitude = exponent == 0 ? (Words)small : normal | not_finite;
  return (Vec)(magnitude | (half & 0x8000) << 16);
}
inline Vec Load(const int8_t* p) {
  const auto wide = __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), SignedShorts);
  return __builtin_convertvector(__builtin_convertvector(wide, Ints), Vec);
}
inline float Widen(uint16_t bits) {  // one bfloat16
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline void Store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

// Folds two vectors of partial sums, each in groups of 2 * W lanes, into one of groups of W.
template <int W>
inline Vec Fold(Vec a, Vec b) {
#define FOLD(...) __builtin_shufflevector(a, b, __VA_ARGS__)
  if constexpr (W == 8)
    return FOLD(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           FOLD(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  else if constexpr (W == 4)
    return FOLD(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           FOLD(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  else if constexpr (W == 2)
    return FOLD(0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           FOLD(2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  else
    return FOLD(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           FOLD(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#undef FOLD
}

// Lane i of the result is the sum of the lanes of v[i].
inline Vec SumEach(const Vec (&v)[kLanes]) {
  Vec a[8], b[4];
  UNROLL for (int i = 0; i < 8; ++i) a[i] = Fold<8>(v[2 * i], v[2 * i + 1]);
  UNROLL for (int i = 0; i < 4; ++i) b[i] = Fold<4>(a[2 * i], a[2 * i + 1]);
  return Fold<1>(Fold<2>(b[0], b[1]), Fold<2>(b[2], b[3]));
}

// One number of all lanes, in log2(kLanes) steps.
template <typename Combine>
inline float Reduce(Vec v, Combine combine) {
#define TURN(...) v = combine(v, __builtin_shufflevector(v, v, __VA_ARGS__))
  TURN(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  TURN(4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  TURN(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  TURN(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#undef TURN
  return v[0];
}
inline Vec Larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec Added(Vec a, Vec b) { return a + b; }

// exp of each lane, to 2 ulp where x is in [-87, 88]; below, 1.6e-38; of NaN, NaN.
// Range reduction and polynomial as in Cephes' expf (Moshier).
inline Vec Exp(Vec x) {
  const Vec lowest = Vec{} - 87.0f;
  x = x < lowest ? lowest : x;
  const Vec n = x * 1.44269504f;
  const Ints k = __builtin_convertvector(n + (n > 0 ? Vec{} + 0.5f : Vec{} - 0.5f), Ints);
  const Vec whole = __builtin_convertvector(k, Vec);
  const Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1.0f) * (Vec)((k + 127) << 23);
}

struct Softmax {
  float highest = kLowest, total = 0;
};

// One call. Shared with the pool's threads, which may start after all work is done.
struct Job {
  const void *keys, *values;  // of the layer: [slots, heads, head_dim]
  const uint16_t *key_scales = nullptr, *value_scales = nullptr;  // bfloat16 [slots, heads], or none
  const float* queries;       // [batch, heads, group, head_dim], scaled
  const int32_t *positions, *lengths;
  const float* sinks;  // [heads, group]
  float* out;          // like queries
  int64_t batch, heads, group, head_dim, capacity, window;
  float softcap;

  int64_t chunks = 1, units = 1;
  std::vector<float> mix;        // [units, heads, group, head_dim]
  std::vector<Softmax> softmax;  // [units, heads, group]
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable finished;
  std::atomic<int64_t> done{0};

  int64_t rows() const { return heads * group; }
  // The slots [begin, end) that sequence b's query sees.
  int64_t End(int64_t b) const {
    return std::max<int64_t>(
        0, std::min({capacity, (int64_t)lengths[b], (int64_t)positions[b] + 1}));
  }
  int64_t Begin(int64_t b) const {
    return window > 0 ? std::clamp<int64_t>(positions[b] + 1 - window, 0, End(b)) : 0;
  }
};

// What to fetch while a token is worked on: the next block, in memory order, a little a token.
// (All at once would stall until it is there; left alone, the jumps from head to head are slow.)
struct Ahead {
  const char* start;
  int64_t bytes;  // a token; 0 where there is no next block

  void Fetch(int token) const {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(start + token * bytes + i, 0, 2);
  }
};

// scores[g * kBlock + t] = queries[g] . keys[t], for the G query heads that share a KV head.
template <typename T, int G>
void Score(const T* keys, int64_t stride, const float* queries, int64_t head_dim, int count,
           Ahead ahead, float* scores) {
  constexpr int kTokens = kLanes / G;  // so that G x kTokens sums fill one vector
  for (int t = 0; t < count; t += kTokens) {
    Vec sums[kLanes] = {};
    const T* key[kTokens];
    for (int i = 0; i < kTokens; ++i) {
      key[i] = keys + std::min(t + i, count - 1) * stride;
      ahead.Fetch(t + i);
    }
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      Vec query[G];
      UNROLL for (int g = 0; g < G; ++g) query[g] = Load(queries + g * head_dim + d);
      UNROLL for (int i = 0; i < kTokens; ++i) {
        const Vec k = Load(key[i] + d);
        UNROLL for (int g = 0; g < G; ++g) sums[g * kTokens + i] += k * query[g];
      }
    }
    const Vec each = SumEach(sums);
    for (int g = 0; g < G; ++g)
      std::memcpy(scores + g * kBlock + t, (const float*)&each + g * kTokens, 4 * kTokens);
  }
}

// mix[g] = mix[g] * keep[g] + sum over t of weights[g * kBlock + t] * values[t], N vectors from d.
template <typename T, int G, int N>
void Mix(const T* values, int64_t stride, const float* weights, const float* keep,
         int64_t head_dim, int count, Ahead ahead, float* mix) {
  Vec sums[G][N];
  UNROLL for (int g = 0; g < G; ++g)
    UNROLL for (int j = 0; j < N; ++j) sums[g][j] = Load(mix + g * head_dim + j * kLanes) * keep[g];
  for (int t = 0; t < count; ++t) {
    ahead.Fetch(t);
    UNROLL for (int j = 0; j < N; ++j) {
      const Vec v = Load(values + t * stride + j * kLanes);
      UNROLL for (int g = 0; g < G; ++g) sums[g][j] += weights[g * kBlock + t] * v;
    }
  }
  UNROLL for (int g = 0; g < G; ++g)
    UNROLL for (int j = 0; j < N; ++j) Store(mix + g * head_dim + j * kLanes, sums[g][j]);
}

// row[g * kBlock + t] *= scales[t], for codes whose scale is left out of the products.
template <int G>
void Scale(const uint16_t* scales, int64_t stride, int count, float* rows) {
  for (int t = 0; t < count; ++t) {
    const float scale = Widen(scales[t * stride]);
    for (int g = 0; g < G; ++g) rows[g * kBlock + t] *= scale;
  }
}

// `count` slots from `slot` on, for the G query heads from row `row` on, which share a KV head.
template <typename T, int G>
void Block(const Job& job, int64_t slot, int64_t row, int count, bool more,
           const float* queries, Softmax* softmax, float* mix) {
  const int64_t stride = job.heads * job.head_dim, head = row / job.group;
  const T* keys = (const T*)job.keys + slot * stride + head * job.head_dim;
  const T* values = (const T*)job.values + slot * stride + head * job.head_dim;
  const int64_t first_scale = slot * job.heads + head;
  float scores[G * kBlock], keep[G];
  // Of the next block, this head fetches the part that comes in its turn.
  const int64_t turn = (slot + kBlock) * stride + head * kBlock * job.head_dim;
  const int64_t bytes = more && row % job.group == 0 ? job.head_dim * sizeof(T) : 0;
  const Ahead ahead_keys{(const char*)((const T*)job.keys + turn), bytes};
  const Ahead ahead_values{(const char*)((const T*)job.values + turn), bytes};
  Score<T, G>(keys, stride, queries, job.head_dim, count, ahead_keys, scores);
  if (job.key_scales) Scale<G>(job.key_scales + first_scale, job.heads, count, scores);
  for (int g = 0; g < G; ++g) {
    float* s = scores + g * kBlock;
    if (job.softcap > 0)
      for (int t = 0; t < count; ++t) s[t] = job.softcap * std::tanh(s[t] / job.softcap);
    std::fill(s + count, s + kBlock, kLowest);
    Vec most = Load(s);
    for (int t = kLanes; t < kBlock; t += kLanes) most = Larger(Load(s + t), most);
    const float highest = std::max(softmax[g].highest, Reduce(most, Larger));
    keep[g] = std::exp(softmax[g].highest - highest);
    Vec total{};
    for (int t = 0; t < kBlock; t += kLanes) {
      const Vec weights = Exp(Load(s + t) - highest);
      Store(s + t, weights);
      total += weights;
    }
    softmax[g].total = softmax[g].total * keep[g] + Reduce(total, Added);
    softmax[g].highest = highest;
  }
  if (job.value_scales) Scale<G>(job.value_scales + first_scale, job.heads, count, scores);
  constexpr int kWide = 4;  // vectors, whose sums stay in registers
  int64_t d = 0;
  for (; d + kWide * kLanes <= job.head_dim; d += kWide * kLanes)
    Mix<T, G, kWide>(values + d, stride, scores, keep, job.head_dim, count,
                     d == 0 ? ahead_values : Ahead{nullptr, 0}, mix + d);
  for (; d < job.head_dim; d += kLanes)
    Mix<T, G, 1>(values + d, stride, scores, keep, job.head_dim, count,
                 d == 0 ? ahead_values : Ahead{nullptr, 0}, mix + d);
}

template <typename T>
void RunUnit(Job& job, int64_t unit) {
  const int64_t b = unit / job.chunks, chunk = unit % job.chunks;
  const int64_t begin = job.Begin(b), span = job.End(b) - begin;
  const int64_t from = begin + span * chunk / job.chunks;
  const int64_t to = begin + span * (chunk + 1) / job.chunks;
  const int64_t first = b * job.capacity;  // slot of the sequence
  for (int64_t t = from; t < to; t += kBlock) {
    const int count = std::min<int64_t>(kBlock, to - t);
    const bool more = t + kBlock < to;
    for (int64_t h = 0; h < job.heads; ++h) {
      for (int64_t g = 0; g < job.group;) {
        const int64_t row = h * job.group + g, left = job.group - g;
        const float* queries = job.queries + (b * job.rows() + row) * job.head_dim;
        Softmax* softmax = &job.softmax[unit * job.rows() + row];
        float* mix = &job.mix[(unit * job.rows() + row) * job.head_dim];
        if (left >= 4) {
          Block<T, 4>(job, first + t, row, count, more, queries, softmax, mix), g += 4;
        } else if (left >= 2) {
          Block<T, 2>(job, first + t, row, count, more, queries, softmax, mix), g += 2;
        } else {
          Block<T, 1>(job, first + t, row, count, more, queries, softmax, mix), g += 1;
        }
      }
    }
  }
}

template <typename T>
void Work(const std::shared_ptr<Job>& job) {
  for (int64_t unit; (unit = job->next.fetch_add(1)) < job->units;) {
    RunUnit<T>(*job, unit);
    if (job->done.fetch_add(1) + 1 == job->units) {
      std::lock_guard<std::mutex> lock(job->mutex);  // not between the waiter's look and its sleep
      job->finished.notify_all();
    }
  }
}

// Joins the units of each sequence into its output, and gives the sinks their share.
void Join(Job& job) {
  for (int64_t row = 0; row < job.batch * job.rows(); ++row) {
    const int64_t b = row / job.rows(), r = row % job.rows();
    float highest = job.sinks[r];
    float* out = job.out + row * job.head_dim;
    std::fill(out, out + job.head_dim, 0.0f);
    for (int64_t chunk = 0; chunk < job.chunks; ++chunk)
      highest = std::max(highest, job.softmax[(b * job.chunks + chunk) * job.rows() + r].highest);
    float total = std::exp(job.sinks[r] - highest);
    for (int64_t chunk = 0; chunk < job.chunks; ++chunk) {
      const int64_t at = (b * job.chunks + chunk) * job.rows() + r;
      const float weight = std::exp(job.softmax[at].highest - highest);
      total += weight * job.softmax[at].total;
      for (int64_t d = 0; d < job.head_dim; ++d) out[d] += weight * job.mix[at * job.head_dim + d];
    }
    for (int64_t d = 0; d < job.head_dim; ++d) out[d] = total == 0 ? 0 : out[d] / total;
  }
}

template <typename T>
void Attend(const std::shared_ptr<Job>& job, ffi::ThreadPool& pool) {
  int64_t longest = 0;
  for (int64_t b = 0; b < job->batch; ++b)
    longest = std::max(longest, job->End(b) - job->Begin(b));
  // Waking a thread takes as long as reading this much: less is not worth it.
  const int64_t bytes = 2 * longest * job->batch * job->heads * job->head_dim * sizeof(T);
  const int64_t threads = bytes < kWakeBytes ? 1 : std::max<int64_t>(1, pool.num_threads());
  // Several units a thread, as some start late and sequences differ in length.
  const int64_t most_chunks = threads == 1 ? 1 : kUnitsPerThread * threads / job->batch;
  job->chunks = std::clamp<int64_t>(longest / kSmallestUnit, 1, std::max<int64_t>(1, most_chunks));
  job->units = job->batch * job->chunks;
  job->softmax.resize(job->units * job->rows());
  job->mix.assign(job->units * job->rows() * job->head_dim, 0.0f);
  for (int64_t i = 1; i < std::min(job->units, threads); ++i)
    pool.Schedule([job] { Work<T>(job); });
  Work<T>(job);  // this thread takes its part, so that waiting below is for started work only
  for (int i = 0; i < kSpins && job->done < job->units; ++i) {
  }
  if (job->done < job->units) {
    std::unique_lock<std::mutex> lock(job->mutex);
    job->finished.wait(lock, [&] { return job->done == job->units; });
  }
  Join(*job);
}

ffi::Error Decode(ffi::ThreadPool pool, ffi::AnyBuffer cache, ffi::Buffer<ffi::U16> scales,
                  ffi::Buffer<ffi::S32> layer,
                  ffi::Buffer<ffi::F32> queries, ffi::Buffer<ffi::S32> positions,
                  ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::F32> sinks, int64_t capacity,
                  int64_t window, float softcap, ffi::ResultBuffer<ffi::F32> out) {
  const auto cache_shape = cache.dimensions();  // layers, 2, slots, heads, head_dim
  const auto shape = queries.dimensions();      // batch, heads, group, head_dim
  const auto type = cache.element_type();
  const int64_t width = type == ffi::F32 ? 4 : type == ffi::S8 ? 1 : 2;
  const int64_t vectors = cache_shape[2] * cache_shape[3];
  const int64_t half_layer = vectors * cache_shape[4] * width;
  // Like XLA's own slices, a layer out of range is the nearest that exists.
  const int64_t number = std::clamp<int64_t>(layer.typed_data()[0], 0, cache_shape[0] - 1);

  auto job = std::make_shared<Job>();
  job->keys = (const char*)cache.untyped_data() + 2 * number * half_layer;
  job->values = (const char*)job->keys + half_layer;
  if (scales.element_count() > 0) {
    job->key_scales = scales.typed_data() + 2 * number * vectors;
    job->value_scales = job->key_scales + vectors;
  }
  job->queries = queries.typed_data();
  job->positions = positions.typed_data();
  job->lengths = lengths.typed_data();
  job->sinks = sinks.typed_data();
  job->out = out->typed_data();
  job->batch = shape[0], job->heads = shape[1], job->group = shape[2], job->head_dim = shape[3];
  job->capacity = capacity, job->window = window, job->softcap = softcap;
  if (type == ffi::F32) {
    Attend<float>(job, pool);
  } else if (type == ffi::U16) {
    Attend<BFloat16>(job, pool);
  } else if (type == ffi::F16) {
    Attend<Float16>(job, pool);
  } else if (type == ffi::S8) {
    Attend<int8_t>(job, pool);
  } else {
    return ffi::Error::InvalidArgument("jaxkv: a cache of this element type is not supported");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxkvDecode, Decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("capacity")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap")
                                  .Ret<ffi::Buffer<ffi::F32>>());
