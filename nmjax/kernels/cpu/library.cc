// The CPU kernels of nmjax as handlers of XLA's foreign function interface.
//
// One file, compiled once: every kernel is in it for each instruction set, and the best
// that the processor has is chosen when the library is loaded.

#include <cstring>
#include <string_view>

#include "buffers.h"
#include "common.h"
#include "expanded.h"
#include "instructions.h"
#include "threads.h"

namespace nmjax {

// Products --------------------------------------------------------------------------

// A layer of x and y, and the kernel that multiplies it.
template <class Task>
struct Layer {
  const Kernels& kernels;
  void (*kernel)(const Task&, int64_t, int64_t);
  const void* x;
  void* y;
  Number type;  // of x and y
  int64_t rows, inputs;
  int64_t count, work;  // what the kernel counts its outputs in, and weights
};

// Multiply rows [begin, end) in tiles: one by one, or transposed. `each(chunks, work)`
// does `work(0)`, ..., `work(chunks - 1)`, and `chunk` of the outputs are in a chunk.
template <class Task, class Each>
static void MultiplyRows(const Layer<Task>& layer, Task task, int64_t begin,
                         int64_t end, int64_t width, float* tile, const Each& each) {
  const int64_t inputs = layer.inputs;
  for (int64_t row = begin; row < end; row += width) {
    task.rows = std::min(width, end - row);
    // Few rows that are left take a narrow tile, but none that adds in another order:
    // results shall not depend on the number of threads.
    task.width = std::max(TileWidth(task.rows, inputs, layer.kernels.lanes),
                          std::min<int64_t>(width, 2 * layer.kernels.lanes));
    const void* from = At(layer.x, row * inputs, layer.type);
    task.y = const_cast<char*>(At(layer.y, row * task.outputs, layer.type));
    task.x = tile;
    if (task.width > 1) {
      each(inputs, inputs * task.width, [=, &layer](int64_t first, int64_t last) {
        layer.kernels.transpose(from, layer.type, task.rows, inputs, first, last, tile,
                                task.width);
      });
    } else if (layer.type == Number::kFloat32) {
      task.x = static_cast<const float*>(from);
    } else {
      layer.kernels.widen(from, layer.type, tile, inputs);
    }
    const int64_t work = layer.work * std::max<int64_t>(1, task.width / 8);
    each(layer.count, work, [=, &layer](int64_t first, int64_t last) {
      layer.kernel(task, first, last);
    });
  }
}

// Multiply a layer on all threads; `tiles` has room for a tile of each share.
template <class Task>
static void Multiply(ffi::ThreadPool& pool, const Layer<Task>& layer, const Task& task,
                     const Shares& shares, float* tiles) {
  if (shares.count == 1) {
    MultiplyRows(layer, task, 0, layer.rows, shares.width, tiles,
                 [&pool](int64_t count, int64_t work, const auto& part) {
                   const int64_t chunk = ChunkOf(pool, count, work);
                   ParallelFor(pool, (count + chunk - 1) / chunk, [&](int64_t i) {
                     part(i * chunk, std::min(count, (i + 1) * chunk));
                   });
                 });
    return;
  }
  ParallelFor(pool, shares.count, [&](int64_t i) {
    MultiplyRows(layer, task, i * shares.rows,
                 std::min(layer.rows, (i + 1) * shares.rows), shares.width,
                 tiles + i * shares.width * layer.inputs,
                 [](int64_t count, int64_t, const auto& part) { part(0, count); });
  });
}

// Write what ablated neurons put out, to all outputs.
template <class Task>
static void FillRows(const Task& task, char* y, int64_t rows) {
  if (rows == 0) return;
  for (int64_t output = 0; output < task.outputs; ++output) {
    portable::Put(y, task.out, output, portable::Finished(task.finish, output, 0.0f));
  }
  const int64_t bytes = task.outputs * Bytes(task.out);
  for (int64_t row = 1; row < rows; ++row) std::memcpy(y + row * bytes, y, bytes);
}

static ffi::Error FanInCall(ffi::ThreadPool pool, ffi::AnyBuffer x,
                            ffi::AnyBuffer values, ffi::AnyBuffer scales,
                            ffi::AnyBuffer bias, ffi::AnyBuffer indices,
                            ffi::AnyBuffer neurons, ffi::Result<ffi::AnyBuffer> y,
                            bool has_scales, bool has_bias, bool relu, bool expand,
                            std::string_view instructions) {
  const Kernels* kernels = Find(instructions);
  if (!kernels) return Unsupported("set of instructions on this processor");
  FanInTask task;
  Number x_type;
  if (!Describe(values, indices, neurons, &task) ||
      !AsNumber(x.element_type(), &x_type)) {
    return Unsupported("dtype");
  }
  const int64_t rows = Length(x, 2), inputs = Length(x, 1), outputs = Length(*y, 1);
  const int64_t alive = Length(values, 2);
  const Shares shares(pool, rows, inputs, kernels->lanes);
  Scratch tiles = Allocate(expand ? 1 : shares.count * shares.width * inputs);
  Expanded expanded(pool, *kernels, expand, rows, inputs, alive);
  Floats factors(scales, has_scales, alive), offsets(bias, has_bias, outputs);
  if (!tiles || !expanded || !factors || !offsets) return OutOfMemory();
  task.outputs = outputs;
  task.out = x_type;
  task.finish.relu = relu;
  const int64_t stack = Stack(x, 2);
  for (int64_t layer = 0; layer < stack; ++layer) {
    SetLayer(values, indices, neurons, layer, outputs, &task);
    task.scales = factors.OfLayer(*kernels, layer);
    task.finish.bias = offsets.OfLayer(*kernels, layer);
    const void* from = At(x.untyped_data(), layer * rows * inputs, x_type);
    char* to = const_cast<char*>(At(y->untyped_data(), layer * rows * outputs, x_type));
    if (task.columns) FillRows(task, to, rows);
    if (expand) {
      expanded.Multiply(task, from, to);
      continue;
    }
    Multiply<FanInTask>(pool,
                        {*kernels, kernels->fan_in, from, to, x_type, rows, inputs,
                         alive, alive * task.fan_in},
                        task, shares, tiles.get());
  }
  return ffi::Error::Success();
}

// Rows of x that are taken from registers, window by window, and not from a tile.
constexpr int64_t kFewRows = 16;

static ffi::Error WindowsCall(ffi::ThreadPool pool, ffi::AnyBuffer x,
                              ffi::AnyBuffer values, ffi::AnyBuffer scales,
                              ffi::AnyBuffer bias, ffi::AnyBuffer positions,
                              ffi::AnyBuffer starts, ffi::AnyBuffer offsets,
                              ffi::AnyBuffer neurons, ffi::Result<ffi::AnyBuffer> y,
                              bool has_scales, bool has_bias, bool relu, bool expand,
                              std::string_view instructions) {
  const Kernels* kernels = Find(instructions);
  if (!kernels) return Unsupported("set of instructions on this processor");
  WindowTask task;
  Number x_type;
  if (!Describe(values, positions, starts, offsets, neurons, &task) ||
      !AsNumber(x.element_type(), &x_type)) {
    return Unsupported("dtype");
  }
  const int64_t rows = Length(x, 2), inputs = Length(x, 1), outputs = Length(*y, 1);
  const int64_t alive = task.neurons, count = rows * inputs;
  const bool few = !expand && kernels->look_up && rows <= kFewRows;
  const bool widen = x_type != Number::kFloat32;
  const Shares shares(pool, rows, inputs, kernels->lanes);
  const int64_t tile = few ? widen * count : shares.count * shares.width * inputs;
  Scratch tiles = Allocate(expand ? 1 : tile);
  Expanded expanded(pool, *kernels, expand, rows, inputs, alive);
  Floats factors(scales, has_scales, alive), biases(bias, has_bias, outputs);
  if (!tiles || !expanded || !factors || !biases) return OutOfMemory();
  task.rows = rows;
  task.inputs = inputs;
  task.outputs = outputs;
  task.out = x_type;
  task.finish.relu = relu;
  const int64_t stack = Stack(x, 2), groups = Length(offsets, 1) - 1;
  for (int64_t layer = 0; layer < stack; ++layer) {
    SetLayer(values, positions, starts, offsets, neurons, layer, &task);
    task.scales = factors.OfLayer(*kernels, layer);
    task.finish.bias = biases.OfLayer(*kernels, layer);
    const void* from = At(x.untyped_data(), layer * count, x_type);
    char* to = const_cast<char*>(At(y->untyped_data(), layer * rows * outputs, x_type));
    if (task.columns) FillRows(task, to, rows);
    const int64_t work = 32 * task.offsets[groups];
    if (expand) {
      expanded.Multiply(task, from, to);
    } else if (few) {
      if (widen) kernels->widen(from, x_type, tiles.get(), count);
      task.x = widen ? tiles.get() : static_cast<const float*>(from);
      task.y = to;
      const int64_t chunk = (ChunkOf(pool, alive, work * std::max<int64_t>(1, rows)) + 8) / 16;
      ParallelFor(pool, (groups + chunk - 1) / chunk, [=](int64_t i) {
        kernels->look_up(task, i * chunk, std::min(groups, (i + 1) * chunk));
      });
    } else {
      Multiply<WindowTask>(pool,
                           {*kernels, kernels->windows, from, to, x_type, rows, inputs,
                            alive, work},
                           task, shares, tiles.get());
    }
  }
  return ffi::Error::Success();
}

static ffi::Error BlocksCall(ffi::ThreadPool pool, ffi::AnyBuffer x,
                             ffi::AnyBuffer values, ffi::AnyBuffer scales,
                             ffi::AnyBuffer bias, ffi::AnyBuffer rows_of,
                             ffi::AnyBuffer columns_of, ffi::Result<ffi::AnyBuffer> y,
                             bool has_scales, bool has_bias, bool relu, bool expand,
                             std::string_view instructions) {
  const Kernels* kernels = Find(instructions);
  if (!kernels) return Unsupported("set of instructions on this processor");
  BlockTask task;
  Number x_type;
  if (!Describe(values, rows_of, columns_of, &task) ||
      !AsNumber(x.element_type(), &x_type)) {
    return Unsupported("dtype");
  }
  const int64_t rows = Length(x, 2), inputs = Length(x, 1), outputs = Length(*y, 1);
  const Shares shares(pool, rows, inputs, kernels->lanes);
  Scratch tiles = Allocate(expand ? 1 : shares.count * shares.width * inputs);
  Expanded expanded(pool, *kernels, expand, rows, inputs, outputs);
  Floats factors(scales, has_scales, task.blocks), offsets(bias, has_bias, outputs);
  if (!tiles || !expanded || !factors || !offsets) return OutOfMemory();
  task.outputs = outputs;
  task.out = x_type;
  task.finish.relu = relu;
  const int64_t stack = Stack(x, 2);
  const int64_t work = task.blocks * task.block_inputs * task.block_outputs;
  for (int64_t layer = 0; layer < stack; ++layer) {
    SetLayer(values, rows_of, columns_of, layer, &task);
    task.scales = factors.OfLayer(*kernels, layer);
    task.finish.bias = offsets.OfLayer(*kernels, layer);
    const void* from = At(x.untyped_data(), layer * rows * inputs, x_type);
    char* to = const_cast<char*>(At(y->untyped_data(), layer * rows * outputs, x_type));
    if (expand) {
      expanded.Multiply(task, from, to);
      continue;
    }
    Multiply<BlockTask>(pool,
                        {*kernels, kernels->blocks, from, to, x_type, rows, inputs,
                         outputs, work},
                        task, shares, tiles.get());
  }
  return ffi::Error::Success();
}

static ffi::Error GroupedCall(ffi::ThreadPool pool, ffi::AnyBuffer x,
                              ffi::AnyBuffer values, ffi::AnyBuffer scales,
                              ffi::AnyBuffer bias, ffi::AnyBuffer codes,
                              ffi::Result<ffi::AnyBuffer> y, bool has_scales,
                              bool has_bias, bool relu, bool expand, int64_t n,
                              int64_t m, int64_t bits, std::string_view instructions) {
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
  Scratch wide = Allocate(widen && !expand ? count : 1);
  Expanded expanded(pool, *kernels, expand, task.rows, task.inputs, outputs);
  Floats factors(scales, has_scales, outputs), offsets(bias, has_bias, outputs);
  if (!wide || !expanded || !factors || !offsets) return OutOfMemory();
  task.finish.relu = relu;
  const int64_t stack = Stack(x, 2);
  for (int64_t layer = 0; layer < stack; ++layer) {
    SetLayer(values, codes, layer, &task);
    task.scales = factors.OfLayer(*kernels, layer);
    task.finish.bias = offsets.OfLayer(*kernels, layer);
    const void* from = At(x.untyped_data(), layer * count, x_type);
    char* to = const_cast<char*>(
        At(y->untyped_data(), layer * task.rows * outputs, x_type));
    if (expand) {
      expanded.Multiply(task, from, to);
      continue;
    }
    if (widen) kernels->widen(from, x_type, wide.get(), count);
    task.x = widen ? wide.get() : static_cast<const float*>(from);
    task.y = to;
    const int64_t chunk = ChunkOf(pool, outputs, outputs * task.kept * task.rows / 8);
    ParallelFor(pool, (outputs + chunk - 1) / chunk, [=](int64_t i) {
      kernels->grouped(task, i * chunk, std::min(outputs, (i + 1) * chunk));
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
      .Arg<Buffer>()   // scales
      .Arg<Buffer>();  // bias
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_fan_in, nmjax::FanInCall,
                              Product()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<bool>("has_scales")
                                  .Attr<bool>("has_bias")
                                  .Attr<bool>("relu")
                                  .Attr<bool>("expand")
                                  .Attr<std::string_view>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_windows, nmjax::WindowsCall,
                              Product()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<bool>("has_scales")
                                  .Attr<bool>("has_bias")
                                  .Attr<bool>("relu")
                                  .Attr<bool>("expand")
                                  .Attr<std::string_view>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_blocks, nmjax::BlocksCall,
                              Product()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<bool>("has_scales")
                                  .Attr<bool>("has_bias")
                                  .Attr<bool>("relu")
                                  .Attr<bool>("expand")
                                  .Attr<std::string_view>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nmjax_grouped, nmjax::GroupedCall,
                              Product()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<bool>("has_scales")
                                  .Attr<bool>("has_bias")
                                  .Attr<bool>("relu")
                                  .Attr<bool>("expand")
                                  .Attr<int64_t>("n")
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("bits")
                                  .Attr<std::string_view>("instructions"));

// The best instructions of this processor: "avx512", "avx2" or "portable".
extern "C" const char* nmjax_instructions() { return nmjax::Find("")->name; }
