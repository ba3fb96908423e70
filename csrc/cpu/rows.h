// Sharing rows out among threads: whole rows where there are many, segments of rows where there are few.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "dispatch.h"

namespace eakd {
namespace {

// tau is one number or one per row; t is one number.
class RowTemperatures {
 public:
  RowTemperatures(const double* per_row, double tau, double t) : per_row_(per_row), t_(t), all_(tau, t) {}
  Temperatures<double> at(int64_t row) const {
    return per_row_ == nullptr ? all_ : Temperatures<double>(per_row_[row], t_);
  }

 private:
  const double* per_row_;
  double t_;
  Temperatures<double> all_;
};

inline bool shares_segments(const RowJob& job) { return job.segments() > 1 && job.rows < 4 * at::get_num_threads(); }

// Rows a task: enough columns to outweigh waking a thread.
inline int64_t row_grain(const RowJob& job) {
  constexpr int64_t kColumnsPerTask = 32768;
  return job.vocab_size >= kColumnsPerTask ? 1 : kColumnsPerTask / (job.vocab_size + 1) + 1;
}

// A peaked row is full of exponentials below 2^-126, and arithmetic on subnormals is a hundred times slower than on
// anything else. They are far below every tolerance.
class FlushSubnormals {
#if defined(__SSE2__)
 public:
  FlushSubnormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// work(each) on every thread; there each(visit) visits items out of [0, count), `grain` at a time, as long as there are
// any. Not equal parts: a thread that the system holds up would keep all the others waiting.
template <typename Work>
void share_out(int64_t count, int64_t grain, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto each = [&](const auto& visit) {
    for (int64_t begin; (begin = next.fetch_add(grain, std::memory_order_relaxed)) < count;)
      for (int64_t i = begin; i < std::min(begin + grain, count); ++i)
        visit(i);
  };
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (count + grain - 1) / grain);
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const FlushSubnormals flush;
    work(each);
  });
}

// n numbers from a cache line's first byte on. A thread keeps its own, a few megabytes, for the next call: fresh memory
// costs a page fault every 4 KB.
template <typename T>
T* thread_room(int64_t n) {
  constexpr size_t kCacheLine = 64;
  static thread_local std::vector<T> room;
  if (room.size() < n + kCacheLine / sizeof(T)) room.resize(n + kCacheLine / sizeof(T));
  void* p = room.data();
  size_t bytes = room.size() * sizeof(T);
  return static_cast<T*>(std::align(kCacheLine, n * sizeof(T), p, bytes));
}

// Room for the exponentials of one row.
template <typename T>
KeptExponentials<T> room_for_row(const RowJob& job) {
  constexpr int64_t kPadding = 64;  // a block is padded to whole vectors
  const int64_t columns = (job.vocab_size / kPadding + 2) * kPadding, blocks = job.vocab_size / kSmallestBlock + 1;
  T* p = thread_room<T>(2 * (columns + blocks));
  return {p, p + columns, p + 2 * columns, p + 2 * columns + blocks};
}

template <typename T>
RowState<double> row_state(const RowJob& job, const RowPair& pair, const Temperatures<double>& k,
                           const KeptExponentials<T>* kept = nullptr) {
  const RowKernels<T>& kernels = row_kernels<T>();
  RowState<double> state = kernels.segment_state(job, pair, k, 0, kept);
  for (int64_t s = 1; s < job.segments(); ++s)
    state.merge(kernels.segment_state(job, pair, k, s, kept), k);
  return state;
}

template <typename T>
void write_gradient_row(const RowJob& job, const RowPair& pair, const Temperatures<double>& k,
                        const GradientBasis<double>& basis, const KeptExponentials<T>* kept = nullptr) {
  for (int64_t s = job.segments() - 1; s >= 0; --s)
    row_kernels<T>().segment_gradient(job, pair, k, basis, s, kept);
}

// visit(row, state) for every row kept. The states do not depend on the number of threads: segments are merged in
// order either way.
template <typename T, typename Visit>
void visit_states(const RowJob& job, const RowTemperatures& temperatures, const Visit& visit) {
  if (!shares_segments(job)) {
    share_out(job.rows, row_grain(job), [&](const auto& each) {
      each([&](int64_t row) {
        if (job.kept(row)) visit(row, row_state<T>(job, RowPair(job, row), temperatures.at(row)));
      });
    });
    return;
  }
  const int64_t segments = job.segments();
  std::vector<RowState<double>> states(job.rows * segments);
  share_out(job.rows * segments, 1, [&](const auto& each) {
    each([&](int64_t i) {
      const int64_t row = i / segments;
      if (!job.kept(row)) return;
      states[i] = row_kernels<T>().segment_state(job, RowPair(job, row), temperatures.at(row), i % segments, nullptr);
    });
  });
  const FlushSubnormals flush;
  for (int64_t row = 0; row < job.rows; ++row) {
    if (!job.kept(row)) continue;
    RowState<double> state = states[row * segments];
    for (int64_t s = 1; s < segments; ++s)
      state.merge(states[row * segments + s], temperatures.at(row));
    visit(row, state);
  }
}

inline void zero_columns(const LogitsView& v, int64_t row, int64_t begin, int64_t end) {
  if (v.vocab_stride == 1) {
    memset(v.at(row, begin), 0, (end - begin) * v.item_bytes);
  } else {
    for (int64_t j = begin; j < end; ++j)
      memset(v.at(row, j), 0, v.item_bytes);
  }
}

// Exactly 0 in rows left out and in columns past the vocabulary.
inline void write_zeros(const RowJob& job) {
  if (job.keep == nullptr && job.gradient_columns == job.vocab_size) return;
  share_out(job.rows, row_grain(job), [&](const auto& each) {
    each([&](int64_t row) {
      zero_columns(job.gradient, row, job.kept(row) ? job.vocab_size : 0, job.gradient_columns);
    });
  });
}

// basis_of(row) for every row kept.
template <typename T, typename BasisOf>
void write_gradient(const RowJob& job, const RowTemperatures& temperatures, const BasisOf& basis_of) {
  write_zeros(job);
  const int64_t segments = shares_segments(job) ? job.segments() : 1;
  const int64_t grain = segments > 1 ? 1 : row_grain(job);
  share_out(job.rows * segments, grain, [&](const auto& each) {
    each([&](int64_t i) {
      const int64_t row = i / segments;
      if (!job.kept(row)) return;
      const RowPair pair(job, row);
      const Temperatures<double> k = temperatures.at(row);
      if (segments > 1)
        row_kernels<T>().segment_gradient(job, pair, k, basis_of(row), i % segments, nullptr);
      else
        write_gradient_row<T>(job, pair, k, basis_of(row));
    });
  });
}

// State, basis and gradient of one row after the other, while it is in the cache.
template <typename T, typename BasisOfState>
void write_gradient_in_one_pass(const RowJob& job, const RowTemperatures& temperatures, const BasisOfState& basis_of) {
  write_zeros(job);
  if (shares_segments(job)) {
    std::vector<GradientBasis<double>> bases(job.rows);
    visit_states<T>(job, temperatures, [&](int64_t row, const RowState<double>& s) { bases[row] = basis_of(row, s); });
    write_gradient<T>(job, temperatures, [&](int64_t row) { return bases[row]; });
    return;
  }
  share_out(job.rows, row_grain(job), [&](const auto& each) {
    const bool keeps = job.vocab_size <= kMaxKeptColumns;
    const KeptExponentials<T> room = keeps ? room_for_row<T>(job) : KeptExponentials<T>{};
    const KeptExponentials<T>* kept = keeps ? &room : nullptr;
    each([&](int64_t row) {
      if (!job.kept(row)) return;
      const RowPair pair(job, row);
      const Temperatures<double> k = temperatures.at(row);
      const RowState<double> state = row_state<T>(job, pair, k, kept);
      write_gradient_row<T>(job, pair, k, basis_of(row, state), kept);
    });
  });
}

}  // namespace
}  // namespace eakd
