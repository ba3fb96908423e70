// Rows on the heap that notice what kernels should not touch, and how driver.cpp says what is wrong.
#pragma once

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include "cuda/columns.cuh"
#include "eakd_emulator/sanitizers.h"
#include "expected.h"

namespace driver {
namespace {

using namespace eakd::cuda;

struct Mismatch {
  std::string what;
};

void require_close(const std::string& what, double found, double expected, double tolerance) {
  if (std::fabs(found - expected) <= tolerance) return;  // NaN is not
  char numbers[80];
  std::snprintf(numbers, sizeof numbers, " is %.9g, not %.9g", found, expected);
  throw Mismatch{what + numbers};
}

void require_success(cudaError_t error) {
  if (error != cudaSuccess) throw Mismatch{std::string("not launched: ") + cudaGetErrorName(error)};
}

// Rows of `width` elements. All that is not theirs is NaN, for what is read there to show in the results, and is to
// stay as it is; ASan may not see it touched either.
template <typename T>
class Rows {
 public:
  Rows(int rows, int width, int offset, int stride, int behind = 0)
      : rows_(rows), width_(width), offset_(offset), stride_(stride), size_(at(rows - 1, width) + behind) {
    storage_ = std::make_unique<T[]>(size_);
    std::memset(static_cast<void*>(storage_.get()), kForeign, size_ * sizeof(T));
    each_gap([&](T* begin, T* end) { emulator::asan_poison(begin, (end - begin) * sizeof(T)); });
  }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;
  ~Rows() { emulator::asan_unpoison(storage_.get(), size_ * sizeof(T)); }

  Matrix matrix() {
    Matrix m;
    m.data = storage_.get() + offset_, m.outer_stride = stride_;
    return m;
  }

  double get(int row, int column) const { return Storage<T>::widen(storage_[at(row, column)]); }
  void set(int row, int column, float value) { storage_[at(row, column)] = Storage<T>::round(value); }

  Numbers row(int r, int columns) const {
    Numbers values;
    for (int i = 0; i < columns; ++i)
      values.push_back(get(r, i));
    return values;
  }

  void require_foreign_untouched(const char* name) {
    emulator::asan_unpoison(storage_.get(), size_ * sizeof(T));
    each_gap([&](T* begin, T* end) {
      const auto* bytes = reinterpret_cast<unsigned char*>(begin);
      for (; bytes < reinterpret_cast<unsigned char*>(end); ++bytes)
        if (*bytes != kForeign) throw Mismatch{std::string("memory between rows changed: ") + name};
    });
  }

 private:
  static constexpr unsigned char kForeign = 0xff;  // NaN in every format

  std::size_t at(int row, int column) const {
    return static_cast<std::size_t>(offset_) + static_cast<std::size_t>(row) * stride_ + column;
  }

  template <typename Visit>
  void each_gap(Visit&& visit) {
    T* const data = storage_.get();
    visit(data, data + offset_);
    for (int r = 0; r < rows_; ++r)
      visit(data + at(r, width_), data + (r + 1 < rows_ ? at(r + 1, 0) : size_));
  }

  int rows_, width_, offset_, stride_;
  std::size_t size_;
  std::unique_ptr<T[]> storage_;
};

}  // namespace
}  // namespace driver
