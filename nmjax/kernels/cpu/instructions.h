// Every kernel for each set of instructions, and the best set of this processor.
#ifndef NMJAX_KERNELS_CPU_INSTRUCTIONS_H_
#define NMJAX_KERNELS_CPU_INSTRUCTIONS_H_

#include <string_view>

#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nmjax {

// Dense weights of some outputs, in lines.
template <class Task>
using ExpandKernel = void (*)(const Task&, int64_t, int64_t, int64_t, int64_t, float*);
struct Expansions {
  ExpandKernel<FanInTask> fan_in;
  ExpandKernel<WindowTask> windows;
  ExpandKernel<GroupedTask> grouped;
  ExpandKernel<BlockTask> blocks;

  ExpandKernel<FanInTask> Of(const FanInTask&) const { return fan_in; }
  ExpandKernel<WindowTask> Of(const WindowTask&) const { return windows; }
  ExpandKernel<GroupedTask> Of(const GroupedTask&) const { return grouped; }
  ExpandKernel<BlockTask> Of(const BlockTask&) const { return blocks; }
};

struct Kernels {
  const char* name;
  int lanes;
  void (*widen)(const void*, Number, float*, int64_t);
  void (*transpose)(const void*, Number, int64_t, int64_t, int64_t, int64_t, float*,
                    int64_t);
  void (*fan_in)(const FanInTask&, int64_t, int64_t);
  void (*windows)(const WindowTask&, int64_t, int64_t);
  void (*look_up)(const WindowTask&, int64_t, int64_t);  // for few rows, or null
  void (*grouped)(const GroupedTask&, int64_t, int64_t);
  void (*blocks)(const BlockTask&, int64_t, int64_t);
  void (*dense)(const DenseTask&, int64_t, int64_t);
  Expansions expand;
};

namespace portable {
#define NAME "portable"
#define LANES 4
#include "kernels.inc"
}  // namespace portable

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define NAME "avx2"
#define LANES 8
#include "kernels.inc"
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
#define NAME "avx512"
#define LANES 16
#include "kernels.inc"
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

}  // namespace nmjax

#endif  // NMJAX_KERNELS_CPU_INSTRUCTIONS_H_
