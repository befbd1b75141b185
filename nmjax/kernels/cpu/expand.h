// Dense weights of what is compressed: memory is the limit, so one code for all.
#ifndef NMJAX_KERNELS_CPU_EXPAND_H_
#define NMJAX_KERNELS_CPU_EXPAND_H_

#include "common.h"

namespace nmjax {
namespace expand {

inline float AsFloat(float value) { return value; }
inline float AsFloat(int8_t value) { return value; }
inline float AsFloat(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void Assign(float* to, float value) { *to = value; }
inline void Assign(Bfloat16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool nan = value != value;
  to->bits = static_cast<uint16_t>(
      nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Value times scale in the dtype of the dense weights.
template <class Out, class Value>
inline void Set(Out* to, Value value, float scale) {
  Assign(to, AsFloat(value) * scale);
}
inline void Set(float* to, float value, float) { *to = value; }
inline void Set(Bfloat16* to, Bfloat16 value, float) { *to = value; }

// Outputs [begin, end) of (outputs, inputs); those of ablated neurons are zero already.
template <class Out, class Value>
void FanIn(const FanInTask& task, int64_t inputs, int64_t begin, int64_t end) {
  for (int64_t neuron = begin; neuron < end; ++neuron) {
    const int64_t row = task.columns ? task.columns[neuron] : neuron;
    Out* to = static_cast<Out*>(task.y) + row * inputs;
    std::memset(static_cast<void*>(to), 0, inputs * sizeof(Out));
    const float scale = task.scales ? task.scales[neuron] : 1.0f;
    const Value* values =
        static_cast<const Value*>(task.values) + neuron * task.fan_in;
    for (int64_t i = 0; i < task.fan_in; ++i) {
      Set(to + Index(task.indices, task.index, neuron * task.fan_in + i), values[i],
          scale);
    }
  }
}

// Positions of kept values [first, first + count) of an output; first is a multiple of 8.
inline void Positions(const uint8_t* codes, int64_t bits, int64_t first, int64_t count,
                      uint8_t* positions) {
  const uint8_t* from = codes + first * bits / 8;
  const int64_t per_byte = 8 / bits, mask = (1 << bits) - 1;
  for (int64_t i = 0; i < count; i += per_byte, ++from) {
    for (int64_t j = 0; j < per_byte; ++j) {
      positions[i + j] = static_cast<uint8_t>(*from >> (j * bits) & mask);
    }
  }
}

// Put kept values into groups of m; kN is n, or 0 where it is no constant.
template <int kN, class Out, class Value>
inline void Spread(const Value* values, const uint8_t* positions, int64_t groups,
                   int64_t n, int64_t m, float scale, Out* to) {
  if (kN) n = kN;
  for (int64_t group = 0; group < groups; ++group, to += m) {
    for (int64_t j = 0; j < n; ++j) Set(to + *positions++, *values++, scale);
  }
}

// Outputs [begin, end) of (outputs, inputs).
template <class Out, class Value>
void Grouped(const GroupedTask& task, int64_t inputs, int64_t begin, int64_t end) {
  uint8_t positions[8 * 64];
  const int64_t n = task.n, m = task.m;
  // As many whole groups at a time as fit, a multiple of 8 values.
  const int64_t step = n <= 64 ? 8 * n * (64 / n) : 0;
  for (int64_t output = begin; output < end; ++output) {
    Out* to = static_cast<Out*>(task.y) + output * inputs;
    std::memset(static_cast<void*>(to), 0, inputs * sizeof(Out));
    const float scale = task.scales ? task.scales[output] : 1.0f;
    const Value* values = static_cast<const Value*>(task.values) + output * task.kept;
    const uint8_t* codes = task.codes + output * task.code_bytes;
    if (step == 0) {  // groups that are longer than the buffer
      for (int64_t i = 0; i < task.kept; ++i) {
        const int64_t bit = i * task.bits;
        const int64_t at = codes[bit >> 3] >> (bit & 7) & ((1 << task.bits) - 1);
        Set(to + i / n * m + at, values[i], scale);
      }
      continue;
    }
    for (int64_t first = 0; first < task.kept; first += step) {
      const int64_t count = std::min(step, task.kept - first), groups = count / n;
      Positions(codes, task.bits, first, count, positions);
      Out* start = to + first / n * m;
      switch (n) {
        case 1: Spread<1>(values + first, positions, groups, n, m, scale, start); break;
        case 2: Spread<2>(values + first, positions, groups, n, m, scale, start); break;
        case 4: Spread<4>(values + first, positions, groups, n, m, scale, start); break;
        default: Spread<0>(values + first, positions, groups, n, m, scale, start);
      }
    }
  }
}

// Blocks [begin, end) of (inputs, outputs), or of (outputs, inputs) where `inputs` is not
// 0: then it is their number. All entries are zero already.
template <class Out, class Value>
void Blocks(const BlockTask& task, int64_t inputs, int64_t begin, int64_t end) {
  const int64_t across = inputs ? 1 : task.outputs, along = inputs ? inputs : 1;
  const int64_t size = task.block_inputs * task.block_outputs;
  for (int64_t block = begin; block < end; ++block) {
    const Value* values = static_cast<const Value*>(task.values) + block * size;
    const float scale = task.scales ? task.scales[block] : 1.0f;
    Out* to =
        static_cast<Out*>(task.y) +
        Index(task.rows_of, task.index, block) * task.block_inputs * across +
        Index(task.columns_of, task.column_index, block) * task.block_outputs * along;
    for (int64_t i = 0; i < task.block_inputs; ++i) {
      for (int64_t o = 0; o < task.block_outputs; ++o) {
        Set(to + i * across + o * along, *values++, scale);
      }
    }
  }
}

// Choose the instance of a function template by the numbers of a task.
#define NMJAX_EXPAND(Kind, task, inputs, begin, end)                                   \
  do {                                                                                 \
    if ((task).out == Number::kFloat32) {                                              \
      (task).value == Number::kFloat32                                                 \
          ? expand::Kind<float, float>(task, inputs, begin, end)                       \
      : (task).value == Number::kBfloat16                                              \
          ? expand::Kind<float, Bfloat16>(task, inputs, begin, end)                    \
          : expand::Kind<float, int8_t>(task, inputs, begin, end);                     \
    } else {                                                                           \
      (task).value == Number::kFloat32                                                 \
          ? expand::Kind<Bfloat16, float>(task, inputs, begin, end)                    \
      : (task).value == Number::kBfloat16                                              \
          ? expand::Kind<Bfloat16, Bfloat16>(task, inputs, begin, end)                 \
          : expand::Kind<Bfloat16, int8_t>(task, inputs, begin, end);                  \
    }                                                                                  \
  } while (false)

}  // namespace expand
}  // namespace nmjax

#endif  // NMJAX_KERNELS_CPU_EXPAND_H_
