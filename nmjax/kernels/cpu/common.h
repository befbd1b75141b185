// What the CPU kernels share: number types, the tasks they are given, and threads.
#ifndef NMJAX_KERNELS_CPU_COMMON_H_
#define NMJAX_KERNELS_CPU_COMMON_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace nmjax {

struct Bfloat16 {
  uint16_t bits;
};

// How values, indices, inputs and outputs are stored.
enum class Number { kFloat32, kBfloat16, kInt8, kUint8, kUint16, kUint32 };

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
  const int32_t* columns;  // null: outputs are in order
};

// An unsigned index of any width.
static inline uint64_t Index(const void* indices, Number type, int64_t i) {
  switch (type) {
    case Number::kUint8: return static_cast<const uint8_t*>(indices)[i];
    case Number::kUint16: return static_cast<const uint16_t*>(indices)[i];
    default: return static_cast<const uint32_t*>(indices)[i];
  }
}

// Do `work(0)`, ..., `work(chunks - 1)` on the threads of a pool and on this one.
//
// Whoever is free takes the next chunk, and this thread takes those that nobody else
// does. It waits only for chunks that are being worked on: it cannot wait for ever, even
// if every thread of the pool is here. `work` is copied; a helper that starts late finds
// no chunk left and does not touch what `work` points to.
template <class Work>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t chunks, const Work& work) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), chunks) - 1;
  if (helpers <= 0) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) work(chunk);
    return;
  }
  struct Shared {
    explicit Shared(const Work& work) : work(work) {}
    Work work;
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>(work);
  auto drain = [shared, chunks] {
    for (int64_t chunk; (chunk = shared->next.fetch_add(1)) < chunks;) {
      shared->work(chunk);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([drain] { drain(); });
  drain();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < chunks; ++spins) {
    if (spins > 10000) std::this_thread::yield();
  }
}

}  // namespace nmjax

#endif  // NMJAX_KERNELS_CPU_COMMON_H_
