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

// One side of one layer. `sides` is 1 if the buffer holds this side alone, else 2, keys first.
Side SideOf(const ffi::AnyBuffer& vectors, const ffi::AnyBuffer& scales,
            const ffi::Buffer<ffi::S8>& levels, int64_t layer, int64_t number, int64_t bits) {
  const auto shape = vectors.dimensions();  // layers, sides, slots, heads, numbers or bytes
  const auto type = vectors.element_type();
  const int64_t width = type == ffi::F32 ? 4 : type == ffi::S8 || type == ffi::U8 ? 1 : 2;
  // Like XLA's own slices, a layer out of range is the nearest that exists.
  layer = std::clamp<int64_t>(layer, 0, shape[0] - 1);
  const int64_t half = (layer * shape[1] + std::min(number, shape[1] - 1)) * shape[2] * shape[3];
  Side side;
  side.bytes = shape[4] * width;
  side.vectors = (const char*)vectors.untyped_data() + half * side.bytes;
  if (scales.element_type() == ffi::U8)
    side.runs.of_slots = (const uint8_t*)scales.untyped_data() + half;
  else if (scales.element_count() > 0)
    side.scales = (const uint16_t*)scales.untyped_data() + half;
  side.bits = bits, side.levels = levels.typed_data() + 16 * number;
  return side;
}

// `table` and `key_positions` are empty where the addressing has none, and `starts` and `sees` where
// a step's tokens form no tree; see slots.h.
ffi::Error Decode(ffi::ThreadPool pool, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                  ffi::AnyBuffer key_scales, ffi::AnyBuffer value_scales,
                  ffi::Buffer<ffi::S8> levels, ffi::Buffer<ffi::S32> run_widths,
                  ffi::Buffer<ffi::S8> run_levels, ffi::Buffer<ffi::F32> run_scales,
                  ffi::Buffer<ffi::S32> layer,
                  ffi::Buffer<ffi::F32> queries, ffi::Buffer<ffi::S32> positions,
                  ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::F32> sinks,
                  ffi::Buffer<ffi::F32> centre_queries, ffi::Buffer<ffi::F32> rope_tables,
                  ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> key_positions,
                  ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> sees,
                  int64_t key_bits, int64_t value_bits, int64_t extent, int64_t page_size,
                  int64_t window, int64_t kept_window, int64_t kept_sinks, float softcap,
                  ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> log_total,
                  ffi::ResultBuffer<ffi::F32> second_share) {
  const auto shape = queries.dimensions();  // batch, tokens, heads, group, head_dim
  const int64_t number = layer.typed_data()[0];

  PreferLargePages(keys.untyped_data(), keys.size_bytes());
  PreferLargePages(values.untyped_data(), values.size_bytes());
  Attention job;
  job.keys = SideOf(keys, key_scales, levels, number, 0, key_bits);
  if (job.keys.runs.of_slots) {
    job.keys.runs.count = run_widths.dimensions()[0];
    job.keys.runs.widths = run_widths.typed_data();
    job.keys.runs.levels = run_levels.typed_data();
    job.keys.runs.scales = run_scales.typed_data();
  }
  job.values = SideOf(values, value_scales, levels, number, 1, value_bits);
  job.queries = queries.typed_data();
  job.sinks = sinks.typed_data();
  job.out = out->typed_data(), job.log_total = log_total->typed_data();
  job.second_share = second_share->typed_data();
  if (centre_queries.element_count() > 0) {
    const auto tables = rope_tables.dimensions();  // digits, 2, pairs, base
    job.centre.queries = centre_queries.typed_data();
    job.centre.features = centre_queries.dimensions()[5];
    if (const int64_t centres = centre_queries.dimensions()[0]; centres > 1)
      job.centre.of_second = centre_queries.element_count() / centres;
    job.centre.tables = rope_tables.typed_data();
    job.centre.digits = tables[0], job.centre.pairs = tables[2];
  }
  job.heads = shape[2], job.group = shape[3], job.head_dim = shape[4];
  job.softcap = softcap;

  Slots& slots = job.slots;
  slots.batch = shape[0], slots.tokens = shape[1];
  slots.extent = extent, slots.num_slots = keys.dimensions()[2];
  slots.query_positions = positions.typed_data();
  slots.lengths = lengths.typed_data();
  slots.window = window, slots.kept_window = kept_window, slots.kept_sinks = kept_sinks;
  slots.table = DataOrNull(table);
  slots.pages = table.element_count() / shape[0], slots.page_size = page_size;
  slots.key_positions = DataOrNull(key_positions);
  slots.starts = DataOrNull(starts), slots.sees = DataOrNull(sees);
  if (slots.key_positions) slots.lists = key_positions.element_count() / shape[0] / extent;

  const int64_t threads = pool.num_threads();
  const auto type = keys.element_type();
  const bool codes = key_bits > 0;
  if (codes && (key_bits < 8 || value_bits < 8)) {
    Attend<Code>(job, threads);
  } else if (codes) {
    Attend<int8_t>(job, threads);
  } else if (type == ffi::F32) {
    Attend<float>(job, threads);
  } else if (type == ffi::U8) {
    Attend<Float8>(job, threads);
  } else if (type == ffi::U16) {
    Attend<BFloat16>(job, threads);
  } else if (type == ffi::F16) {
    Attend<Float16>(job, threads);
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

extern "C" void JaxkvPreferLargePages(const void* data, int64_t bytes) {
  jaxkv::PreferLargePages(data, bytes, /*is_new=*/true);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxkvDecode, jaxkv::Decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("key_bits")
                                  .Attr<int64_t>("value_bits")
                                  .Attr<int64_t>("extent")
                                  .Attr<int64_t>("page_size")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("kept_window")
                                  .Attr<int64_t>("kept_sinks")
                                  .Attr<float>("softcap")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxkvProducts, jaxkv::Products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("table")
                                  .RemainingArgs()
                                  .RemainingRets());
