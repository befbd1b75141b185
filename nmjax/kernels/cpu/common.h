// What the CPU kernels share: number types and the tasks they are given.
#ifndef NMJAX_KERNELS_CPU_COMMON_H_
#define NMJAX_KERNELS_CPU_COMMON_H_

#include <cstdint>

namespace nmjax {

struct Bfloat16 {
  uint16_t bits;
};

// How values, indices, inputs and outputs are stored.
enum class Number { kFloat32, kBfloat16, kInt8, kUint8, kUint16, kUint32 };

// What happens to the sum of an output before it is stored.
struct Finish {
  const float* bias;  // (outputs), or null
  bool relu;
};

// y = x w for a constant fan-in: weights of one neuron after the other.
struct FanInTask {
  const void* values;      // (neurons, fan_in)
  Number value;            // kFloat32, kBfloat16, kInt8
  const void* indices;     // (neurons, fan_in), checked when the array was made
  Number index;            // kUint8, kUint16, kUint32
  const float* scales;     // (neurons), or null
  const int32_t* columns;  // column of each neuron in y, or null: in order
  int64_t fan_in;
  const float* x;  // rows == 1: (inputs); otherwise transposed, (inputs, width)
  int64_t width;
  int64_t rows;  // rows of y, at most width
  void* y;       // (rows, outputs)
  Number out;    // kFloat32, kBfloat16
  int64_t outputs;
  Finish finish;
};

// Inputs of a window. A position has a bit above it where there is no weight but a zero.
constexpr int64_t kWindow = 64;

// y = x w for a constant fan-in in windows: 16 neurons, side by side, have two weights each
// among kWindow inputs in a row.
struct WindowTask {
  const void* values;         // (windows, 2, 16)
  Number value;               // kFloat32, kBfloat16, kInt8
  const uint16_t* positions;  // (windows, 16): those of both weights, 8 bits each
  const int32_t* starts;      // (windows): first input; kWindow of them are there
  const int32_t* offsets;     // (groups + 1): first window of each 16 neurons
  const float* scales;        // (neurons), or null
  const int32_t* columns;     // as in FanInTask
  int64_t neurons, inputs;
  const float* x;  // as in FanInTask, and (rows, inputs) for few rows
  int64_t width, rows;
  void* y;     // (rows, outputs)
  Number out;  // kFloat32, kBfloat16
  int64_t outputs;
  Finish finish;
};

// y = x w for n of every m inputs: weights of one output after the other.
struct GroupedTask {
  const void* values;    // (outputs, kept)
  Number value;          // kFloat32, kBfloat16, kInt8
  const uint8_t* codes;  // (outputs, code_bytes)
  const float* scales;   // (outputs), or null
  int64_t n, m, bits;
  int64_t kept, code_bytes;
  const float* x;  // (rows, inputs)
  int64_t inputs, rows;
  void* y;     // (rows, outputs)
  Number out;  // kFloat32, kBfloat16
  int64_t outputs;
  Finish finish;
  const int32_t* columns;  // null: outputs are in order
};

// y = x w for whole blocks of weights, sorted by column, then by row.
struct BlockTask {
  const void* values;      // (blocks, block_inputs, block_outputs)
  Number value;            // kFloat32, kBfloat16, kInt8
  const float* scales;     // (blocks), or null
  const void* rows_of;     // (blocks): block along the inputs
  Number index;            // kUint8, kUint16, kUint32
  const void* columns_of;  // (blocks): block along the outputs
  Number column_index;
  int64_t blocks, block_inputs, block_outputs;
  const float* x;  // as in FanInTask
  int64_t width, rows;
  void* y;     // (rows, outputs)
  Number out;  // kFloat32, kBfloat16
  int64_t outputs;
  Finish finish;
  const int32_t* columns;  // null: outputs are in order
};

// Outputs whose dense weights are expanded at a time: a multiple of kDenseStep, of which
// what the kernels take together is a divisor.
constexpr int64_t kDenseStep = 12, kDensePanel = 4 * kDenseStep;

// y = x w for dense weights of at most kDensePanel outputs.
struct DenseTask {
  const float* weights;  // (those outputs, filled up to a multiple of kDenseStep, stride)
  int64_t stride;
  const float* x;  // transposed, (inputs, width)
  int64_t inputs, width;
  int64_t rows;  // rows of y, at most width
  void* y;       // (rows, outputs)
  Number out;    // kFloat32, kBfloat16
  int64_t outputs;
  Finish finish;
  const int32_t* columns;  // column of each output in y, or null: in order
};

// An unsigned index of any width.
static inline uint64_t Index(const void* indices, Number type, int64_t i) {
  switch (type) {
    case Number::kUint8: return static_cast<const uint8_t*>(indices)[i];
    case Number::kUint16: return static_cast<const uint16_t*>(indices)[i];
    default: return static_cast<const uint32_t*>(indices)[i];
  }
}

// Blocks are sorted by column: the first one that is not before `column`.
static inline int64_t FirstBlock(const BlockTask& task, uint64_t column) {
  int64_t from = 0, to = task.blocks;
  while (from < to) {
    const int64_t middle = (from + to) / 2;
    if (Index(task.columns_of, task.column_index, middle) < column) {
      from = middle + 1;
    } else {
      to = middle;
    }
  }
  return from;
}

}  // namespace nmjax

#endif  // NMJAX_KERNELS_CPU_COMMON_H_
