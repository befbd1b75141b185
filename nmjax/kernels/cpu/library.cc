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
    task.width = width;
    while (task.width > 2 * layer.kernels.lanes && task.width >= 2 * task.rows) {
      task.width /= 2;
    }
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

// What the handlers of all formats are given and do.
struct Product {
  ffi::ThreadPool& pool;
  ffi::AnyBuffer x, scales, bias, y;
  bool has_scales, has_bias, relu, expand;
  const Kernels* kernels;  // null if this processor does not have the instructions
  const int64_t rows = Length(x, 2), inputs = Length(x, 1), outputs = Length(y, 1);
  Number type = Number::kFloat32;  // of x and y
  const bool known = AsNumber(x.element_type(), &type);

  // Multiply the layers of a stack, whose weights are stored for `count` outputs and have
  // `factors` scales. `set(layer, &task)` fills in the weights of a layer.
  // `multiply(task, from, to, scratch)` multiplies it with `memory` floats of scratch,
  // unless weights are expanded.
  template <class Task, class Set, class Direct>
  ffi::Error Run(bool described, Task task, int64_t count, int64_t factors,
                 int64_t memory, const Set& set, const Direct& multiply) const {
    if (!kernels) return Unsupported("set of instructions on this processor");
    if (!known || !described) return Unsupported("dtype");
    Scratch scratch = Allocate(expand ? 1 : memory);
    Expanded expanded(pool, *kernels, expand, rows, inputs, count);
    Floats scale(scales, has_scales, factors), offset(bias, has_bias, outputs);
    if (!scratch || !expanded || !scale || !offset) return OutOfMemory();
    task.outputs = outputs;
    task.out = type;
    task.finish.relu = relu;
    const int64_t stack = Stack(x, 2);
    for (int64_t layer = 0; layer < stack; ++layer) {
      set(layer, &task);
      task.scales = scale.OfLayer(*kernels, layer);
      task.finish.bias = offset.OfLayer(*kernels, layer);
      const void* from = At(x.untyped_data(), layer * rows * inputs, type);
      char* to = const_cast<char*>(At(y.untyped_data(), layer * rows * outputs, type));
      if (task.columns) FillRows(task, to, rows);
      if (expand) {
        expanded.Multiply(task, from, to);
      } else {
        multiply(task, from, to, scratch.get());
      }
    }
    return ffi::Error::Success();
  }

  int64_t Lanes() const { return kernels ? kernels->lanes : 1; }

  // A layer whose kernel takes tiles of rows; `count` and `work` as there.
  template <class Task>
  Layer<Task> Tiled(void (*kernel)(const Task&, int64_t, int64_t), const void* from,
                    void* to, int64_t count, int64_t work) const {
    return {*kernels, kernel, from, to, type, rows, inputs, count, work};
  }

  // The rows as floats, and how many have to be written for that.
  int64_t Widened() const { return type == Number::kFloat32 ? 0 : rows * inputs; }
  const float* Widen(const void* from, float* to) const {
    if (type == Number::kFloat32) return static_cast<const float*>(from);
    kernels->widen(from, type, to, rows * inputs);
    return to;
  }
};

static ffi::Error FanInCall(ffi::ThreadPool pool, ffi::AnyBuffer x,
                            ffi::AnyBuffer values, ffi::AnyBuffer scales,
                            ffi::AnyBuffer bias, ffi::AnyBuffer indices,
                            ffi::AnyBuffer neurons, ffi::Result<ffi::AnyBuffer> y,
                            bool has_scales, bool has_bias, bool relu, bool expand,
                            std::string_view instructions) {
  const Product product = {pool,       x,        scales, bias,   *y,
                           has_scales, has_bias, relu,   expand, Find(instructions)};
  FanInTask task;
  const bool described = Describe(values, indices, neurons, &task);
  const int64_t alive = Length(values, 2);
  const Shares shares(pool, product.rows, product.inputs, product.Lanes());
  return product.Run(
      described, task, alive, alive, shares.count * shares.width * product.inputs,
      [&](int64_t layer, FanInTask* task) {
        SetLayer(values, indices, neurons, layer, task);
      },
      [&](const FanInTask& task, const void* from, void* to, float* tiles) {
        const int64_t work = alive * task.fan_in;
        Multiply(pool, product.Tiled(product.kernels->fan_in, from, to, alive, work),
                 task, shares, tiles);
      });
}

// Rows of x that are looked up window by window; for more a tile is faster.
constexpr int64_t kFewRows = 16;

static ffi::Error WindowsCall(ffi::ThreadPool pool, ffi::AnyBuffer x,
                              ffi::AnyBuffer values, ffi::AnyBuffer scales,
                              ffi::AnyBuffer bias, ffi::AnyBuffer positions,
                              ffi::AnyBuffer starts, ffi::AnyBuffer offsets,
                              ffi::AnyBuffer neurons, ffi::Result<ffi::AnyBuffer> y,
                              bool has_scales, bool has_bias, bool relu, bool expand,
                              std::string_view instructions) {
  const Product product = {pool,       x,        scales, bias,   *y,
                           has_scales, has_bias, relu,   expand, Find(instructions)};
  WindowTask task;
  const bool described = Describe(values, positions, starts, offsets, neurons, &task);
  task.rows = product.rows;
  task.inputs = product.inputs;
  const int64_t alive = task.neurons, groups = Length(offsets, 1) - 1;
  const bool look_up =
      product.kernels && product.kernels->look_up && task.rows <= kFewRows;
  const Shares shares(pool, task.rows, task.inputs, product.Lanes());
  const int64_t tiles = shares.count * shares.width * task.inputs;
  return product.Run(
      described, task, alive, alive, look_up ? product.Widened() : tiles,
      [&](int64_t layer, WindowTask* task) {
        SetLayer(values, positions, starts, offsets, neurons, layer, task);
      },
      [&](WindowTask task, const void* from, void* to, float* scratch) {
        const int64_t work = 32 * task.offsets[groups];
        if (!look_up) {
          Multiply(pool, product.Tiled(product.kernels->windows, from, to, alive, work),
                   task, shares, scratch);
          return;
        }
        task.x = product.Widen(from, scratch);
        task.y = to;
        const int64_t chunk = (ChunkOf(pool, alive, work * task.rows) + 8) / 16;
        ParallelFor(pool, (groups + chunk - 1) / chunk, [&](int64_t i) {
          product.kernels->look_up(task, i * chunk, std::min(groups, (i + 1) * chunk));
        });
      });
}

static ffi::Error BlocksCall(ffi::ThreadPool pool, ffi::AnyBuffer x,
                             ffi::AnyBuffer values, ffi::AnyBuffer scales,
                             ffi::AnyBuffer bias, ffi::AnyBuffer rows_of,
                             ffi::AnyBuffer columns_of, ffi::Result<ffi::AnyBuffer> y,
                             bool has_scales, bool has_bias, bool relu, bool expand,
                             std::string_view instructions) {
  const Product product = {pool,       x,        scales, bias,   *y,
                           has_scales, has_bias, relu,   expand, Find(instructions)};
  BlockTask task;
  const bool described = Describe(values, rows_of, columns_of, &task);
  const int64_t work = task.blocks * task.block_inputs * task.block_outputs;
  // Two vectors of rows leave registers for the sums of 8 outputs. Where a block has fewer,
  // reading the weights again for other rows takes longer than reading more of x.
  const TileLimit most = task.block_outputs >= 8 ? TileLimit{2} : TileLimit{4, 1 << 20};
  const Shares shares(pool, product.rows, product.inputs, product.Lanes(), most);
  return product.Run(
      described, task, product.outputs, task.blocks,
      shares.count * shares.width * product.inputs,
      [&](int64_t layer, BlockTask* task) {
        SetLayer(values, rows_of, columns_of, layer, task);
      },
      [&](const BlockTask& task, const void* from, void* to, float* tiles) {
        const int64_t outputs = task.outputs;
        Multiply(pool, product.Tiled(product.kernels->blocks, from, to, outputs, work),
                 task, shares, tiles);
      });
}

static ffi::Error GroupedCall(ffi::ThreadPool pool, ffi::AnyBuffer x,
                              ffi::AnyBuffer values, ffi::AnyBuffer scales,
                              ffi::AnyBuffer bias, ffi::AnyBuffer codes,
                              ffi::Result<ffi::AnyBuffer> y, bool has_scales,
                              bool has_bias, bool relu, bool expand, int64_t n,
                              int64_t m, int64_t bits, std::string_view instructions) {
  const Product product = {pool,       x,        scales, bias,   *y,
                           has_scales, has_bias, relu,   expand, Find(instructions)};
  GroupedTask task;
  const bool described = Describe(values, codes, n, m, bits, &task);
  task.rows = product.rows;
  task.inputs = product.inputs;
  const int64_t outputs = product.outputs;
  return product.Run(
      described, task, outputs, outputs, product.Widened(),
      [&](int64_t layer, GroupedTask* task) { SetLayer(values, codes, layer, task); },
      [&](GroupedTask task, const void* from, void* to, float* wide) {
        task.x = product.Widen(from, wide);
        task.y = to;
        const int64_t work = outputs * task.kept * task.rows / 8;
        const int64_t chunk = ChunkOf(pool, outputs, work);
        ParallelFor(pool, (outputs + chunk - 1) / chunk, [&](int64_t i) {
          product.kernels->grouped(task, i * chunk, std::min(outputs, (i + 1) * chunk));
        });
      });
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
