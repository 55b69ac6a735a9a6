// What XLA calls: the arguments of a custom call become a job.
#include <memory>

#include "attention.h"
#include "pages.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxkv {
namespace {

const int32_t* DataOrNull(const ffi::Buffer<ffi::S32>& buffer) {
  return buffer.element_count() > 0 ? buffer.typed_data() : nullptr;
}

// `table` and `key_positions` are empty where the addressing has none; see slots.h.
ffi::Error Decode(ffi::ThreadPool pool, ffi::AnyBuffer cache, ffi::Buffer<ffi::U16> scales,
                  ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::F32> queries,
                  ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> lengths,
                  ffi::Buffer<ffi::F32> sinks, ffi::Buffer<ffi::S32> table,
                  ffi::Buffer<ffi::S32> key_positions, int64_t extent, int64_t page_size,
                  int64_t window, int64_t kept_window, int64_t kept_sinks, float softcap,
                  ffi::ResultBuffer<ffi::F32> out) {
  const auto cache_shape = cache.dimensions();  // layers, 2, slots, heads, head_dim
  const auto shape = queries.dimensions();      // batch, heads, group, head_dim
  const auto type = cache.element_type();
  const int64_t width = type == ffi::F32 ? 4 : type == ffi::S8 ? 1 : 2;
  const int64_t vectors = cache_shape[2] * cache_shape[3];
  const int64_t half_layer = vectors * cache_shape[4] * width;
  // Like XLA's own slices, a layer out of range is the nearest that exists.
  const int64_t number = std::clamp<int64_t>(layer.typed_data()[0], 0, cache_shape[0] - 1);

  PreferLargePages(cache.untyped_data(), cache.size_bytes());
  Attention job;
  job.keys = (const char*)cache.untyped_data() + 2 * number * half_layer;
  job.values = (const char*)job.keys + half_layer;
  if (scales.element_count() > 0) {
    job.key_scales = scales.typed_data() + 2 * number * vectors;
    job.value_scales = job.key_scales + vectors;
  }
  job.queries = queries.typed_data();
  job.sinks = sinks.typed_data();
  job.out = out->typed_data();
  job.heads = shape[1], job.group = shape[2], job.head_dim = shape[3];
  job.softcap = softcap;

  Slots& slots = job.slots;
  slots.batch = shape[0], slots.extent = extent, slots.num_slots = cache_shape[2];
  slots.query_positions = positions.typed_data();
  slots.lengths = lengths.typed_data();
  slots.window = window, slots.kept_window = kept_window, slots.kept_sinks = kept_sinks;
  slots.table = DataOrNull(table);
  slots.pages = table.element_count() / shape[0], slots.page_size = page_size;
  slots.key_positions = DataOrNull(key_positions);
  if (slots.key_positions) slots.lists = key_positions.element_count() / shape[0] / extent;

  const int64_t threads = pool.num_threads();
  if (type == ffi::F32) {
    Attend<float>(job, threads);
  } else if (type == ffi::U16) {
    Attend<BFloat16>(job, threads);
  } else if (type == ffi::F16) {
    Attend<Float16>(job, threads);
  } else if (type == ffi::S8) {
    Attend<int8_t>(job, threads);
  } else {
    return ffi::Error::InvalidArgument("jaxkv: a cache of this element type is not supported");
  }
  return ffi::Error::Success();
}

// Rows [rows, in] times each weight, [in, out], or [out, in] if `table`.
ffi::Error Products(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, bool table,
                    ffi::RemainingArgs weights, ffi::RemainingRets results) {
  Product job;
  job.x = x.typed_data();
  job.rows = x.dimensions()[0], job.in = x.dimensions()[1];
  auto type = ffi::F32;
  for (size_t i = 0; i < weights.size(); ++i) {
    auto weight = weights.get<ffi::AnyBuffer>(i);
    auto result = results.get<ffi::Buffer<ffi::F32>>(i);
    if (weight.has_error()) return weight.error();
    if (result.has_error()) return result.error();
    type = weight->element_type();
    PreferLargePages(weight->untyped_data(), weight->size_bytes());
    job.weights.push_back({weight->untyped_data(), job.in, weight->dimensions()[table ? 0 : 1],
                           table, (*result)->typed_data()});
  }
  if (type == ffi::F32) {
    Multiply<float>(job, pool.num_threads());
  } else if (type == ffi::BF16) {
    Multiply<BFloat16>(job, pool.num_threads());
  } else {
    return ffi::Error::InvalidArgument("jaxkv: weights of this element type are not supported");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxkv

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxkvDecode, jaxkv::Decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("extent")
                                  .Attr<int64_t>("page_size")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("kept_window")
                                  .Attr<int64_t>("kept_sinks")
                                  .Attr<float>("softcap")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxkvProducts, jaxkv::Products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("table")
                                  .RemainingArgs()
                                  .RemainingRets());
