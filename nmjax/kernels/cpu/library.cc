// The CPU kernels of nmjax as handlers of XLA's foreign function interface.
//
// One file, compiled once: every kernel is in it for each instruction set, and the best
// that the processor has is chosen when the library is loaded.

#include <cstdlib>
#include <string>
#include <string_view>

#include "common.h"
#include "expand.h"

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
  void (*blocks)(const BlockTask&, int64_t, int64_t);
};

namespace portable {
#define LANES 4
#include "lanes.inc"

#include "fan_in.inc"

#include "blocks.inc"
#include "grouped.inc"
static const Kernels kKernels = {"portable", LANES,           Widen,
                                 TransposeInputs, FanIn, Grouped, Blocks};
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

#include "blocks.inc"
#include "grouped.inc"
static const Kernels kKernels = {"avx2", LANES,           Widen,
                                 TransposeInputs, FanIn, Grouped, Blocks};
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

#include "blocks.inc"
#include "grouped.inc"
static const Kernels kKernels = {"avx512", LANES,           Widen,
                                 TransposeInputs, FanIn, Grouped, Blocks};
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

// Rows of x that are taken at a time: one, or those that there are filled up to 4, 8 or
// one, two or four vectors. The tile must stay in the second cache beside the weights.
static int64_t TileWidth(int64_t rows, int64_t inputs, int64_t lanes) {
  if (rows <= 1) return 1;
  constexpr int64_t kLargest = 1 << 19;  // bytes
  int64_t width = 4;
  while (width < rows && width < 4 * lanes && 8 * width * inputs <= kLargest) {
    width *= 2;
  }
  return width;
}

// Product of the leading axes that count the arrays of a stack.
static int64_t Stack(ffi::AnyBuffer buffer, size_t rank) {
  int64_t count = 1;
  for (size_t i = 0; i + rank < buffer.dimensions().size(); ++i) {
    count *= buffer.dimensions()[i];
  }
  return count;
}

// Length of an axis, counted from the end.
static int64_t Length(ffi::AnyBuffer buffer, size_t from_end) {
  return buffer.dimensions()[buffer.dimensions().size() - from_end];
}

// Scales as floats, or null where there are none.
class Scales {
 public:
  Scales(ffi::AnyBuffer buffer, bool present, int64_t count)
      : buffer_(buffer), count_(count) {
    if (present) floats_ = Allocate(count);
  }

  const float* OfLayer(const Kernels& kernels, int64_t layer) {
    if (!floats_) return nullptr;
    Number type;
    if (!AsNumber(buffer_.element_type(), &type)) return nullptr;
    kernels.widen(At(buffer_.untyped_data(), layer * count_, type), type, floats_.get(),
                  count_);
    return floats_.get();
  }

 private:
  ffi::AnyBuffer buffer_;
  int64_t count_;
  Scratch floats_;
};

// Fill in what all tasks have of a format's arrays.
static bool Describe(ffi::AnyBuffer values, ffi::AnyBuffer indices,
                     ffi::AnyBuffer neurons, FanInTask* task) {
  task->fan_in = Length(values, 1);
  return AsNumber(values.element_type(), &task->value) &&
         AsNumber(indices.element_type(), &task->index) &&
         neurons.element_type() == ffi::S32;
}

static void SetLayer(ffi::AnyBuffer values, ffi::AnyBuffer indices,
                     ffi::AnyBuffer neurons, int64_t layer, int64_t outputs,
                     FanInTask* task) {
  const int64_t alive = Length(values, 2), count = layer * alive * task->fan_in;
  task->values = At(values.untyped_data(), count, task->value);
  task->indices = At(indices.untyped_data(), count, task->index);
  task->columns =
      alive == outputs
          ? nullptr
          : static_cast<const int32_t*>(neurons.untyped_data()) + layer * alive;
}

static bool Describe(ffi::AnyBuffer values, ffi::AnyBuffer codes, int64_t n, int64_t m,
                     int64_t bits, GroupedTask* task) {
  task->n = n;
  task->m = m;
  task->bits = bits;
  task->outputs = Length(values, 2);
  task->kept = Length(values, 1);
  task->code_bytes = Length(codes, 1);
  return AsNumber(values.element_type(), &task->value);
}

static void SetLayer(ffi::AnyBuffer values, ffi::AnyBuffer codes, int64_t layer,
                     GroupedTask* task) {
  task->values =
      At(values.untyped_data(), layer * task->outputs * task->kept, task->value);
  task->codes = static_cast<const uint8_t*>(codes.untyped_data()) +
                layer * task->outputs * task->code_bytes;
}

static bool Describe(ffi::AnyBuffer values, ffi::AnyBuffer rows, ffi::AnyBuffer columns,
                     BlockTask* task) {
  task->blocks = Length(values, 3);
  task->block_inputs = Length(values, 2);
  task->block_outputs = Length(values, 1);
  task->columns = nullptr;
  return AsNumber(values.element_type(), &task->value) &&
         AsNumber(rows.element_type(), &task->index) &&
         AsNumber(columns.element_type(), &task->column_index);
}

static void SetLayer(ffi::AnyBuffer values, ffi::AnyBuffer rows, ffi::AnyBuffer columns,
                     int64_t layer, BlockTask* task) {
  const int64_t count = layer * task->blocks;
  task->values = At(values.untyped_data(),
                    count * task->block_inputs * task->block_outputs, task->value);
  task->rows_of = At(rows.untyped_data(), count, task->index);
  task->columns_of = At(columns.untyped_data(), count, task->column_index);
}

// Products --------------------------------------------------------------------------

// Multiply the rows of a layer's x in tiles: one by one, or transposed.
template <class Task>
static void MultiplyInTiles(ffi::ThreadPool& pool, const Kernels& kernels,
                            ffi::AnyBuffer x, Number x_type, int64_t layer,
                            ffi::AnyBuffer y, float* tile, int64_t width,
                            int64_t count, int64_t work, Task task,
                            void (*kernel)(const Task&, int64_t, int64_t)) {
  const int64_t rows = Length(x, 2), inputs = Length(x, 1);
  task.width = width;
  task.out = x_type;
  task.outputs = Length(y, 1);
  for (int64_t row = 0; row < rows; row += width) {
    task.rows = std::min(width, rows - row);
    const void* from = At(x.untyped_data(), (layer * rows + row) * inputs, x_type);
    task.y = const_cast<char*>(
        At(y.untyped_data(), (layer * rows + row) * task.outputs, x_type));
    task.x = tile;
    if (width > 1) {
      constexpr int64_t kColumns = 256;
      const int64_t present = task.rows;
      ParallelFor(pool, (inputs + kColumns - 1) / kColumns, [=, &kernels](int64_t i) {
        kernels.transpose(from, x_type, present, inputs, i * kColumns,
                          std::min(inputs, (i + 1) * kColumns), tile, width);
      });
    } else if (x_type == Number::kFloat32) {
      task.x = static_cast<const float*>(from);
    } else {
      kernels.widen(from, x_type, tile, inputs);
    }
    const int64_t chunk = ChunkOf(pool, count, work * std::max<int64_t>(1, width / 8));
    ParallelFor(pool, (count + chunk - 1) / chunk, [=](int64_t i) {
      kernel(task, i * chunk, std::min(count, (i + 1) * chunk));
    });
  }
}

static ffi::Error FanInCall(ffi::ThreadPool pool, ffi::AnyBuffer x,
                            ffi::AnyBuffer values, ffi::AnyBuffer scales,
                            ffi::AnyBuffer indices, ffi::AnyBuffer neurons,
                            ffi::Result<ffi::AnyBuffer> y, bool has_scales,
                            std::string_view instructions) {
  const Kernels* kernels = Find(instructions);
  if (!kernels) return Unsupported("set of instructions on this processor");
  FanInTask task;
  Number x_type;
  if (!Describe(values, indices, neurons, &task) ||
      !AsNumber(x.element_type(), &x_type)) {
    return Unsupported("dtype");
  }
  const int64_t rows = Length(x, 2), outputs = Length(*y, 1);
  const int64_t alive = Length(values, 2);
  const int64_t width = TileWidth(rows, Length(x, 1), kernels->lanes);
  Scratch tile = Allocate(Length(x, 1) * width);
  Scales factors(scales, has_scales, alive);
  const int64_t stack = Stack(x, 2);
  for (int64_t layer = 0; layer < stack; ++layer) {
    SetLayer(values, indices, neurons, layer, outputs, &task);
    task.scales = factors.OfLayer(*kernels, layer);
    if (task.columns) {
      const int64_t count = rows * outputs;
      std::memset(const_cast<char*>(At(y->untyped_data(), layer * count, x_type)), 0,
                  count * Bytes(x_type));
    }
    MultiplyInTiles(pool, *kernels, x, x_type, layer, *y, tile.get(), width, alive,
                    alive * task.fan_in, task, kernels->fan_in);
  }
  return ffi::Error::Success();
}

static ffi::Error BlocksCall(ffi::ThreadPool pool, ffi::AnyBuffer x,
                             ffi::AnyBuffer values, ffi::AnyBuffer scales,
                             ffi::AnyBuffer rows_of, ffi::AnyBuffer columns_of,
                             ffi::Result<ffi::AnyBuffer> y, bool has_scales,
                             std::string_view instructions) {
  const Kernels* kernels = Find(instructions);
  if (!kernels) return Unsupported("set of instructions on this processor");
  BlockTask task;
  Number x_type;
  if (!Describe(values, rows_of, columns_of, &task) ||
      !AsNumber(x.element_type(), &x_type)) {
    return Unsupported("dtype");
  }
  const int64_t width = TileWidth(Length(x, 2), Length(x, 1), kernels->lanes);
  Scratch tile = Allocate(Length(x, 1) * width);
  Scales factors(scales, has_scales, task.blocks);
  const int64_t stack = Stack(x, 2);
  const int64_t work = task.blocks * task.block_inputs * task.block_outputs;
  for (int64_t layer = 0; layer < stack; ++layer) {
    SetLayer(values, rows_of, columns_of, layer, &task);
    task.scales = factors.OfLayer(*kernels, layer);
    MultiplyInTiles(pool, *kernels, x, x_type, layer, *y, tile.get(), width,
                    Length(*y, 1), work, task, kernels->blocks);
  }
  return ffi::Error::Success();
}

static ffi::Error GroupedCall(ffi::ThreadPool pool, ffi::AnyBuffer x,
                              ffi::AnyBuffer values, ffi::AnyBuffer scales,
                              ffi::AnyBuffer codes, ffi::Result<ffi::AnyBuffer> y,
                              bool has_scales, int64_t n, int64_t m, int64_t bits,
                              std::string_view instructions) {
  const Kernels* kernels = Find(instructions);
  if (!kernels) return Unsupported("set of instructions on this processor");
  GroupedTask task;
  Number x_type;
  if (!Describe(values, codes, n, m, bits, &task) ||
      !AsNumber(x.element_type(), &x_type)) {
    return Unsupported("dtype");
  }
  task.rows = Length(x, 2);
  task.inputs = Length(x, 1);
  task.out = x_type;
  const int64_t outputs = task.outputs, count = task.rows * task.inputs;
  const bool widen = x_type != Number::kFloat32;
  Scratch wide = Allocate(widen ? count : 1);
  Scales factors(scales, has_scales, outputs);
  const int64_t stack = Stack(x, 2);
  for (int64_t layer = 0; layer < stack; ++layer) {
    SetLayer(values, codes, layer, &task);
    task.scales = factors.OfLayer(*kernels, layer);
    const void* from = At(x.untyped_data(), layer * count, x_type);
    if (widen) kernels->widen(from, x_type, wide.get(), count);
    task.x = widen ? wide.get() : static_cast<const float*>(from);
    task.y = const_cast<char*>(
        At(y->untyped_data(), layer * task.rows * outputs, x_type));
    const int64_t chunk = ChunkOf(pool, outputs, outputs * task.kept * task.rows / 8);
    ParallelFor(pool, (outputs + chunk - 1) / chunk, [=](int64_t i) {
      kernels->grouped(task, i * chunk, std::min(outputs, (i + 1) * chunk));
    });
  }
  return ffi::Error::Success();
}

// Dense weights ---------------------------------------------------------------------

// Expand `count` neurons, outputs or blocks in parallel.
template <class Expand>
static void ExpandAll(ffi::ThreadPool& pool, int64_t count, int64_t work,
                      const Expand& expand) {
  const int64_t chunk = ChunkOf(pool, count, work);
  ParallelFor(pool, (count + chunk - 1) / chunk, [=](int64_t i) {
    expand(i * chunk, std::min(count, (i + 1) * chunk));
  });
}

// Bytes of one dense array of a stack, all of them zero.
static char* Zeros(ffi::Result<ffi::AnyBuffer> y, int64_t layer, Number type,
                   bool clear) {
  const int64_t count = Length(*y, 2) * Length(*y, 1);
  char* start = const_cast<char*>(At(y->untyped_data(), layer * count, type));
  if (clear) std::memset(start, 0, count * Bytes(type));
  return start;
}

static ffi::Error ExpandFanInCall(ffi::ThreadPool pool, ffi::AnyBuffer values,
                                  ffi::AnyBuffer scales, ffi::AnyBuffer indices,
                                  ffi::AnyBuffer neurons,
                                  ffi::Result<ffi::AnyBuffer> y, bool has_scales) {
  FanInTask task;
  if (!Describe(values, indices, neurons, &task) ||
      !AsNumber(y->element_type(), &task.out)) {
    return Unsupported("dtype");
  }
  const int64_t alive = Length(values, 2), inputs = Length(*y, 1);
  Scales factors(scales, has_scales, alive);
  const int64_t stack = Stack(values, 2);
  for (int64_t layer = 0; layer < stack; ++layer) {
    SetLayer(values, indices, neurons, layer, Length(*y, 2), &task);
    task.scales = factors.OfLayer(portable::kKernels, layer);
    task.y = Zeros(y, layer, task.out, task.columns != nullptr);
    ExpandAll(pool, alive, alive * inputs, [=](int64_t begin, int64_t end) {
      NMJAX_EXPAND(FanIn, task, inputs, begin, end);
    });
  }
  return ffi::Error::Success();
}

static ffi::Error ExpandGroupedCall(ffi::ThreadPool pool, ffi::AnyBuffer values,
                                    ffi::AnyBuffer scales, ffi::AnyBuffer codes,
                                    ffi::Result<ffi::AnyBuffer> y, bool has_scales,
                                    int64_t n, int64_t m, int64_t bits) {
  GroupedTask task;
  if (!Describe(values, codes, n, m, bits, &task) ||
      !AsNumber(y->element_type(), &task.out)) {
    return Unsupported("dtype");
  }
  const int64_t inputs = Length(*y, 1);
  Scales factors(scales, has_scales, task.outputs);
  const int64_t stack = Stack(values, 2);
  for (int64_t layer = 0; layer < stack; ++layer) {
    SetLayer(values, codes, layer, &task);
    task.scales = factors.OfLayer(portable::kKernels, layer);
    task.y = Zeros(y, layer, task.out, false);
    ExpandAll(pool, task.outputs, task.outputs * inputs,
              [=](int64_t begin, int64_t end) {
                NMJAX_EXPAND(Grouped, task, inputs, begin, end);
              });
  }
  return ffi::Error::Success();
}

static ffi::Error ExpandBlocksCall(ffi::ThreadPool pool, ffi::AnyBuffer values,
                                   ffi::AnyBuffer scales, ffi::AnyBuffer rows_of,
                                   ffi::AnyBuffer columns_of,
                                   ffi::Result<ffi::AnyBuffer> y, bool has_scales,
                                   bool outputs_first) {
  BlockTask task;
  if (!Describe(values, rows_of, columns_of, &task) ||
      !AsNumber(y->element_type(), &task.out)) {
    return Unsupported("dtype");
  }
  const int64_t lines = Length(*y, 2), line = Length(*y, 1) * Bytes(task.out);
  task.outputs = outputs_first ? lines : Length(*y, 1);
  const int64_t inputs = outputs_first ? Length(*y, 1) : 0;
  Scales factors(scales, has_scales, task.blocks);
  const int64_t stack = Stack(values, 3);
  for (int64_t layer = 0; layer < stack; ++layer) {
    SetLayer(values, rows_of, columns_of, layer, &task);
    task.scales = factors.OfLayer(portable::kKernels, layer);
    char* start = Zeros(y, layer, task.out, false);
    task.y = start;
    ExpandAll(pool, lines, lines * line / 4, [=](int64_t begin, int64_t end) {
      std::memset(start + begin * line, 0, (end - begin) * line);
    });
    const int64_t work = task.blocks * task.block_inputs * task.block_outputs;
    ExpandAll(pool, task.blocks, work, [=](int64_t begin, int64_t end) {
      NMJAX_EXPAND(Blocks, task, inputs, begin, end);
    });
  }
  return ffi::Error::Success();
}

}  // namespace nmjax

// Handlers --------------------------------------------------------------------------

using Buffer = xla::ffi::AnyBuffer;

static auto Product() {
  return xla::ffi::Ffi::Bind()
      .Ctx<xla::ffi::ThreadPool>()
      .Arg<Buffer>()   // x
      .Arg<Buffer>()   // values
      .Arg<Buffer>();  // scales
}

static auto Expansion() {
  return xla::ffi::Ffi::Bind()
      .Ctx<xla::ffi::ThreadPool>()
      .Arg<Buffer>()   // values
      .Arg<Buffer>();  // scales
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_fan_in, nmjax::FanInCall,
                              Product()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<bool>("has_scales")
                                  .Attr<std::string_view>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_blocks, nmjax::BlocksCall,
                              Product()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<bool>("has_scales")
                                  .Attr<std::string_view>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_grouped, nmjax::GroupedCall,
                              Product()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<bool>("has_scales")
                                  .Attr<int64_t>("n")
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("bits")
                                  .Attr<std::string_view>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_expand_fan_in, nmjax::ExpandFanInCall,
                              Expansion()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<bool>("has_scales"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_expand_blocks, nmjax::ExpandBlocksCall,
                              Expansion()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<bool>("has_scales")
                                  .Attr<bool>("outputs_first"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_expand_grouped, nmjax::ExpandGroupedCall,
                              Expansion()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<bool>("has_scales")
                                  .Attr<int64_t>("n")
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("bits"));

// The best instructions of this processor: "avx512", "avx2" or "portable".
extern "C" const char* nmjax_instructions() { return nmjax::Find("")->name; }
