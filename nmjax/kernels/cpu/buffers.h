// From the buffers that XLA hands over to the tasks of the kernels.
#ifndef NMJAX_KERNELS_CPU_BUFFERS_H_
#define NMJAX_KERNELS_CPU_BUFFERS_H_

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>

#include "xla/ffi/api/ffi.h"

#include "common.h"
#include "instructions.h"

namespace nmjax {

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

static ffi::Error OutOfMemory() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "nmjax: out of memory");
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

// What a tile of x may be: how many vectors of rows, and how large. It must stay in the
// second cache beside the weights.
struct TileLimit {
  int64_t vectors = 4, bytes = 1 << 19;
};

// Rows of x that are taken at a time: one, or those that there are filled up to 4, 8 or
// one, two or four vectors.
static int64_t TileWidth(int64_t rows, int64_t inputs, int64_t lanes, TileLimit most) {
  if (rows <= 1) return 1;
  int64_t width = 4;
  while (width < rows && width < most.vectors * lanes &&
         8 * width * inputs <= most.bytes) {
    width *= 2;
  }
  return width;
}

// How the rows of x are shared out. With few, every thread has all of them and takes
// some outputs; with many, it has rows of its own, whose tile no other thread touches,
// and takes all outputs.
struct Shares {
  int64_t count, rows;  // rows of each share
  int64_t width;        // of a tile

  Shares(const ffi::ThreadPool& pool, int64_t all, int64_t inputs, int64_t lanes,
         TileLimit most = {})
      : count(1), rows(all), width(TileWidth(all, inputs, lanes, most)) {
    const int64_t threads = std::max<int64_t>(1, pool.num_threads());
    const int64_t each = ((all + threads - 1) / threads + lanes - 1) / lanes * lanes;
    const int64_t own = TileWidth(each, inputs, lanes, most);
    if (threads == 1 || own < 2 * lanes) return;
    count = (all + each - 1) / each;
    rows = each;
    width = own;
  }
};

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

// Scales or biases as floats, or null where there are none.
class Floats {
 public:
  Floats(ffi::AnyBuffer buffer, bool present, int64_t count)
      : buffer_(buffer), count_(count), present_(present) {
    if (present) floats_ = Allocate(count);
  }

  // Whether there is memory for those that are present.
  explicit operator bool() const { return !present_ || floats_ != nullptr; }

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
  bool present_;
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
                     ffi::AnyBuffer neurons, int64_t layer, FanInTask* task) {
  const int64_t alive = Length(values, 2), count = layer * alive * task->fan_in;
  task->values = At(values.untyped_data(), count, task->value);
  task->indices = At(indices.untyped_data(), count, task->index);
  task->columns =
      alive == task->outputs
          ? nullptr
          : static_cast<const int32_t*>(neurons.untyped_data()) + layer * alive;
}

static bool Describe(ffi::AnyBuffer values, ffi::AnyBuffer positions,
                     ffi::AnyBuffer starts, ffi::AnyBuffer offsets,
                     ffi::AnyBuffer neurons, WindowTask* task) {
  task->neurons = Length(neurons, 1);
  return AsNumber(values.element_type(), &task->value) &&
         positions.element_type() == ffi::U16 && starts.element_type() == ffi::S32 &&
         offsets.element_type() == ffi::S32 && neurons.element_type() == ffi::S32;
}

static void SetLayer(ffi::AnyBuffer values, ffi::AnyBuffer positions,
                     ffi::AnyBuffer starts, ffi::AnyBuffer offsets,
                     ffi::AnyBuffer neurons, int64_t layer, WindowTask* task) {
  const int64_t windows = layer * Length(starts, 1);
  task->values = At(values.untyped_data(), 32 * windows, task->value);
  task->positions = positions.typed_data<uint16_t>() + 16 * windows;
  task->starts = starts.typed_data<int32_t>() + windows;
  task->offsets = offsets.typed_data<int32_t>() + layer * Length(offsets, 1);
  task->columns = task->neurons == task->outputs
                      ? nullptr
                      : neurons.typed_data<int32_t>() + layer * task->neurons;
}

static bool Describe(ffi::AnyBuffer values, ffi::AnyBuffer codes, int64_t n, int64_t m,
                     int64_t bits, GroupedTask* task) {
  task->columns = nullptr;
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

}  // namespace nmjax

#endif  // NMJAX_KERNELS_CPU_BUFFERS_H_
