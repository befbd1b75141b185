// The CPU kernels of nmjax as handlers of XLA's foreign function interface.
//
// One file, compiled once: every kernel is in it for each instruction set, and the best
// that the processor has is chosen when the library is loaded.

#include <cstdlib>
#include <string>
#include <string_view>

#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nmjax {

struct Kernels {
  const char* name;
  int lanes;
  void (*widen)(const void*, Number, float*, int64_t);
  void (*transpose)(const void*, Number, int64_t, int64_t, int64_t, int64_t, float*,
                    int64_t);
  void (*fan_in)(const FanInTask&, int64_t, int64_t);
  void (*grouped)(const GroupedTask&, int64_t, int64_t);
};

namespace portable {
#define LANES 4
#include "lanes.inc"

#include "fan_in.inc"
#include "grouped.inc"
static const Kernels kKernels = {"portable", LANES,           Widen,
                                 TransposeInputs, FanIn, Grouped};
#undef LANES
}  // namespace portable

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define LANES 8
#include "lanes.inc"

#include "fan_in.inc"
#include "grouped.inc"
static const Kernels kKernels = {"avx2", LANES,           Widen,
                                 TransposeInputs, FanIn, Grouped};
#undef LANES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl")
#endif
namespace avx512 {
#define LANES 16
#include "lanes.inc"

#include "fan_in.inc"
#include "grouped.inc"
static const Kernels kKernels = {"avx512", LANES,           Widen,
                                 TransposeInputs, FanIn, Grouped};
#undef LANES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // defined(__x86_64__)

// The kernels of a set of instructions, or null if this processor does not have it. An
// empty name asks for the best.
static const Kernels* Find(std::string_view name) {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (name.empty() || name == "avx512")) return &avx512::kKernels;
  if (has_avx2 && (name.empty() || name == "avx2")) return &avx2::kKernels;
#endif
  return name.empty() || name == "portable" ? &portable::kKernels : nullptr;
}

namespace ffi = xla::ffi;

// Scratch memory, aligned to cache lines.
struct Free {
  void operator()(float* memory) const { std::free(memory); }
};
using Scratch = std::unique_ptr<float, Free>;

static Scratch Allocate(int64_t count) {
  const size_t bytes = (std::max<int64_t>(count, 1) * 4 + 63) / 64 * 64;
  return Scratch(static_cast<float*>(std::aligned_alloc(64, bytes)));
}

static ffi::Error Unsupported(const char* what) {
  return ffi::Error::InvalidArgument(std::string("nmjax: unsupported ") + what);
}

static bool AsNumber(ffi::DataType type, Number* number) {
  switch (type) {
    case ffi::F32: *number = Number::kFloat32; return true;
    case ffi::BF16: *number = Number::kBfloat16; return true;
    case ffi::S8: *number = Number::kInt8; return true;
    case ffi::U8: *number = Number::kUint8; return true;
    case ffi::U16: *number = Number::kUint16; return true;
    case ffi::U32: *number = Number::kUint32; return true;
    default: return false;
  }
}

static int64_t Bytes(Number number) {
  switch (number) {
    case Number::kFloat32:
    case Number::kUint32: return 4;
    case Number::kBfloat16:
    case Number::kUint16: return 2;
    default: return 1;
  }
}

static const char* At(const void* start, int64_t count, Number number) {
  return static_cast<const char*>(start) + count * Bytes(number);
}

// Work in chunks of outputs: a few for each thread, but none so small that handing it
// over costs more than it does.
static int64_t ChunkOf(const ffi::ThreadPool& pool, int64_t outputs, int64_t work) {
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t by_threads = (outputs + 4 * threads - 1) / (4 * threads);
  const int64_t by_work = 20000 / std::max<int64_t>(1, work / std::max<int64_t>(1, outputs));
  const int64_t chunk = std::max(by_threads, by_work);
  return std::max<int64_t>(8, (chunk + 7) / 8 * 8);
}

// Rows of x that are taken at a time: those that there are, filled up to 4, 8 or one,
// two or four vectors.
static int64_t TileWidth(int64_t rows, int64_t lanes) {
  int64_t width = 4;
  while (width < rows && width < 4 * lanes) width *= 2;
  return width;
}

// Product of the leading axes that count matrices of a stack.
static int64_t Stack(ffi::AnyBuffer buffer) {
  int64_t count = 1;
  for (size_t i = 0; i + 2 < buffer.dimensions().size(); ++i) {
    count *= buffer.dimensions()[i];
  }
  return count;
}

static ffi::Error FanInCall(ffi::ThreadPool pool, ffi::AnyBuffer x,
                            ffi::AnyBuffer values, ffi::AnyBuffer scales,
                            ffi::AnyBuffer indices, ffi::AnyBuffer neurons,
                            ffi::Result<ffi::AnyBuffer> y, bool has_scales,
                            std::string_view instructions) {
  const auto shape = x.dimensions();
  const auto stored = values.dimensions();
  const int64_t rank = static_cast<int64_t>(shape.size());
  const int64_t rows = shape[rank - 2], inputs = shape[rank - 1];
  const int64_t alive = stored[rank - 2], fan_in = stored[rank - 1];
  const int64_t outputs = y->dimensions()[rank - 1];
  Number x_type, value, index, scale = Number::kFloat32;
  if (!AsNumber(x.element_type(), &x_type)) return Unsupported("inputs");
  if (!AsNumber(values.element_type(), &value)) return Unsupported("values");
  if (!AsNumber(indices.element_type(), &index)) return Unsupported("indices");
  if (has_scales && !AsNumber(scales.element_type(), &scale)) {
    return Unsupported("scales");
  }
  const Kernels* found = Find(instructions);
  if (!found) return Unsupported("set of instructions on this processor");
  const Kernels& kernels = *found;
  const bool single = rows == 1;
  const int64_t width = single ? 1 : TileWidth(rows, kernels.lanes);
  Scratch tile = Allocate(inputs * width);
  Scratch factors = Allocate(has_scales ? alive : 1);
  if (!tile || !factors) return ffi::Error::Internal("nmjax: out of memory");
  const int64_t stack = Stack(x);
  for (int64_t layer = 0; layer < stack; ++layer) {
    FanInTask task;
    task.values = At(values.untyped_data(), layer * alive * fan_in, value);
    task.value = value;
    task.indices = At(indices.untyped_data(), layer * alive * fan_in, index);
    task.index = index;
    task.scales = nullptr;
    if (has_scales) {
      kernels.widen(At(scales.untyped_data(), layer * alive, scale), scale,
                    factors.get(), alive);
      task.scales = factors.get();
    }
    task.columns = nullptr;
    if (alive < outputs) {
      task.columns =
          static_cast<const int32_t*>(neurons.untyped_data()) + layer * alive;
      std::memset(static_cast<char*>(y->untyped_data()) +
                      layer * rows * outputs * Bytes(x_type),
                  0, rows * outputs * Bytes(x_type));
    }
    task.fan_in = fan_in;
    task.width = width;
    task.out = x_type;
    task.outputs = outputs;
    for (int64_t row = 0; row < rows; row += width) {
      task.rows = std::min(width, rows - row);
      const void* from =
          At(x.untyped_data(), (layer * rows + row) * inputs, x_type);
      task.x = tile.get();
      task.y = const_cast<char*>(
          At(y->untyped_data(), (layer * rows + row) * outputs, x_type));
      if (single && x_type == Number::kFloat32) {
        task.x = static_cast<const float*>(from);
      } else if (single) {
        kernels.widen(from, x_type, tile.get(), inputs);
      } else {
        constexpr int64_t kColumns = 256;
        float* to = tile.get();
        const int64_t present = task.rows;
        ParallelFor(pool, (inputs + kColumns - 1) / kColumns, [=, &kernels](int64_t i) {
          kernels.transpose(from, x_type, present, inputs, i * kColumns,
                            std::min(inputs, (i + 1) * kColumns), to, width);
        });
      }
      const int64_t chunk =
          ChunkOf(pool, alive, alive * fan_in * std::max<int64_t>(1, width / 8));
      ParallelFor(pool, (alive + chunk - 1) / chunk, [=, &kernels](int64_t i) {
        kernels.fan_in(task, i * chunk, std::min(alive, (i + 1) * chunk));
      });
    }
  }
  return ffi::Error::Success();
}

static ffi::Error GroupedCall(ffi::ThreadPool pool, ffi::AnyBuffer x,
                              ffi::AnyBuffer values, ffi::AnyBuffer scales,
                              ffi::AnyBuffer codes, ffi::Result<ffi::AnyBuffer> y,
                              bool has_scales, int64_t n, int64_t m, int64_t bits,
                              std::string_view instructions) {
  const auto shape = x.dimensions();
  const auto stored = values.dimensions();
  const int64_t rank = static_cast<int64_t>(shape.size());
  const int64_t rows = shape[rank - 2], inputs = shape[rank - 1];
  const int64_t outputs = stored[rank - 2], kept = stored[rank - 1];
  const int64_t code_bytes = codes.dimensions()[rank - 1];
  Number x_type, value, scale = Number::kFloat32;
  if (!AsNumber(x.element_type(), &x_type)) return Unsupported("inputs");
  if (!AsNumber(values.element_type(), &value)) return Unsupported("values");
  if (has_scales && !AsNumber(scales.element_type(), &scale)) {
    return Unsupported("scales");
  }
  const Kernels* found = Find(instructions);
  if (!found) return Unsupported("set of instructions on this processor");
  const Kernels& kernels = *found;
  const bool widen = x_type != Number::kFloat32;
  Scratch wide = Allocate(widen ? rows * inputs : 1);
  Scratch factors = Allocate(has_scales ? outputs : 1);
  if (!wide || !factors) return ffi::Error::Internal("nmjax: out of memory");
  const int64_t stack = Stack(x);
  for (int64_t layer = 0; layer < stack; ++layer) {
    GroupedTask task;
    task.values = At(values.untyped_data(), layer * outputs * kept, value);
    task.value = value;
    task.codes = static_cast<const uint8_t*>(codes.untyped_data()) +
                 layer * outputs * code_bytes;
    task.scales = nullptr;
    if (has_scales) {
      kernels.widen(At(scales.untyped_data(), layer * outputs, scale), scale,
                    factors.get(), outputs);
      task.scales = factors.get();
    }
    task.n = n;
    task.m = m;
    task.bits = bits;
    task.kept = kept;
    task.code_bytes = code_bytes;
    const void* from = At(x.untyped_data(), layer * rows * inputs, x_type);
    if (widen) kernels.widen(from, x_type, wide.get(), rows * inputs);
    task.x = widen ? wide.get() : static_cast<const float*>(from);
    task.inputs = inputs;
    task.rows = rows;
    task.y = const_cast<char*>(
        At(y->untyped_data(), layer * rows * outputs, x_type));
    task.out = x_type;
    task.outputs = outputs;
    const int64_t chunk = ChunkOf(pool, outputs, outputs * kept * rows / 8);
    ParallelFor(pool, (outputs + chunk - 1) / chunk, [=, &kernels](int64_t i) {
      kernels.grouped(task, i * chunk, std::min(outputs, (i + 1) * chunk));
    });
  }
  return ffi::Error::Success();
}

}  // namespace nmjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_fan_in, nmjax::FanInCall,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<bool>("has_scales")
                                  .Attr<std::string_view>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_grouped, nmjax::GroupedCall,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<bool>("has_scales")
                                  .Attr<int64_t>("n")
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("bits")
                                  .Attr<std::string_view>("instructions"));

// The best instructions of this processor: "avx512", "avx2" or "portable".
extern "C" const char* nmjax_instructions() {
  return nmjax::Find("")->name;
}
