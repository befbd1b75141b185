// Products with weights that are expanded: for many rows and weights that are not sparse.
#ifndef NMJAX_KERNELS_CPU_EXPANDED_H_
#define NMJAX_KERNELS_CPU_EXPANDED_H_

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "buffers.h"
#include "threads.h"

namespace nmjax {

// Multiplies layers of one shape. A dense product would copy its weights, part by part, in
// the order in which it reads them; here the copy is what expands them. So they are never
// in memory as a whole, and what expanding takes is not added to what copying took.
class Expanded {
 public:
  // Nothing is allocated unless it is wanted. `count` is what the weights are stored in:
  // outputs, or neurons that are not ablated.
  Expanded(ffi::ThreadPool& pool, const Kernels& kernels, bool wanted, int64_t rows,
           int64_t inputs, int64_t count)
      : pool_(pool), kernels_(kernels), wanted_(wanted), all_(rows), inputs_(inputs),
        count_(count), wide_(2 * kernels.lanes), stride_((inputs + 15) / 16 * 16 + 16),
        threads_(std::max<int64_t>(1, pool.num_threads())) {
    if (!wanted) return;
    constexpr int64_t kLargest = 1 << 19;  // bytes, in the second cache beside a tile of x
    const int64_t fitting = kLargest / (4 * stride_), share = count / (2 * threads_);
    each_ = std::clamp<int64_t>(std::min(fitting, share) / kDenseStep * kDenseStep,
                                kDenseStep, kDensePanel);
    const int64_t most = (std::min(rows, kMostRows) + wide_ - 1) / wide_ * wide_;
    x_ = Allocate(most * inputs);
    panels_ = Allocate(threads_ * each_ * stride_);
    taken_.reset(new (std::nothrow) std::atomic<bool>[threads_]());
  }

  // Whether there is memory for it.
  explicit operator bool() const { return !wanted_ || (x_ && panels_ && taken_); }

  // Multiply x (rows, inputs) with the weights of `task` into y (rows, task.outputs).
  template <class Task>
  void Multiply(const Task& task, const void* x, void* y) {
    for (int64_t row = 0; row < all_; row += kMostRows) {
      rows_ = std::min(kMostRows, all_ - row);
      tiles_ = (rows_ + wide_ - 1) / wide_;
      MultiplyRows(task, At(x, row * inputs_, task.out),
                   const_cast<char*>(At(y, row * task.outputs, task.out)));
    }
  }

 private:
  // Rows whose transposed copy there is room for: it has to stay in the third cache, and
  // expanding the weights again for every part takes little beside multiplying it.
  static constexpr int64_t kMostRows = 512;

  template <class Task>
  void MultiplyRows(const Task& task, const void* x, void* y) {
    ParallelFor(pool_, tiles_, [&](int64_t tile) {
      const int64_t row = tile * wide_;
      kernels_.transpose(At(x, row * inputs_, task.out), task.out, RowsOf(tile), inputs_,
                         0, inputs_, x_.get() + row * inputs_, WidthOf(tile));
    });
    ParallelFor(pool_, (count_ + each_ - 1) / each_, [&](int64_t i) {
      const int64_t begin = i * each_, end = std::min(count_, begin + each_);
      const int64_t panel = Take();
      MultiplyPanel(task, begin, end, panels_.get() + panel * each_ * stride_, y);
      Give(panel);
    });
  }

  template <class Task>
  void MultiplyPanel(const Task& task, int64_t begin, int64_t end, float* panel,
                     void* y) const {
    kernels_.expand.Of(task)(task, begin, end, inputs_, stride_, panel);
    // The last outputs are taken together with some that there are not.
    const int64_t count = end - begin;
    const int64_t missing = (kDenseStep - count % kDenseStep) % kDenseStep;
    std::memset(panel + count * stride_, 0, missing * stride_ * sizeof(float));
    DenseTask dense = {};
    dense.weights = panel;
    dense.stride = stride_;
    dense.inputs = inputs_;
    dense.out = task.out;
    dense.outputs = task.outputs;
    dense.finish = task.finish;
    dense.columns = task.columns;
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const int64_t row = tile * wide_;
      dense.x = x_.get() + row * inputs_;
      dense.width = WidthOf(tile);
      dense.rows = RowsOf(tile);
      dense.y = const_cast<char*>(At(y, row * task.outputs, task.out));
      kernels_.dense(dense, begin, end);
    }
  }

  int64_t RowsOf(int64_t tile) const { return std::min(wide_, rows_ - tile * wide_); }
  int64_t WidthOf(int64_t tile) const {
    return RowsOf(tile) <= kernels_.lanes ? kernels_.lanes : wide_;
  }

  // Take a panel that no other thread has; there is one for each.
  int64_t Take() {
    int64_t panel = 0;
    while (taken_[panel].exchange(true, std::memory_order_acquire)) {
      panel = (panel + 1) % threads_;
    }
    return panel;
  }
  void Give(int64_t panel) { taken_[panel].store(false, std::memory_order_release); }

  ffi::ThreadPool& pool_;
  const Kernels& kernels_;
  const bool wanted_;
  const int64_t all_, inputs_, count_;  // rows, inputs, outputs
  const int64_t wide_;    // rows of a tile of x
  const int64_t stride_;  // from one output to the next, whose places in a cache differ
  const int64_t threads_;
  int64_t each_ = 0;   // outputs that are expanded at a time
  int64_t rows_ = 0, tiles_ = 0;  // of the part of x at hand
  Scratch x_;          // (tiles, inputs, wide)
  Scratch panels_;     // (threads, each, stride)
  std::unique_ptr<std::atomic<bool>[]> taken_;
};

}  // namespace nmjax

#endif  // NMJAX_KERNELS_CPU_EXPANDED_H_
