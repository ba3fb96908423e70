// How kernels read and write the columns of a row: vectors of 16 bytes in the middle, where the student's and the
// teacher's row begin alike within a vector, and the few columns before and after them one by one. W = 1: any strides.
#pragma once

#include <cstring>

#include "job.h"
#include "ptx.cuh"

namespace eakd {
namespace cuda {
namespace {

// One logit in memory, in registers, and (narrow types lie in pairs in a 32-bit register) out of a pair.
template <typename T>
struct Storage;
template <>
struct Storage<float> {
  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float round(float x) { return x; }
};
template <>
struct Storage<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static __device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 round(float x) { return __float2bfloat16_rn(x); }
  static __device__ __forceinline__ Pair round(float low, float high) { return __floats2bfloat162_rn(low, high); }
  static __device__ __forceinline__ float low(unsigned pair) { return __uint_as_float(pair << 16); }
  static __device__ __forceinline__ float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
};
template <>
struct Storage<__half> {
  using Pair = __half2;
  static __device__ __forceinline__ float widen(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half round(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ Pair round(float low, float high) { return __floats2half2_rn(low, high); }
  static __device__ __forceinline__ float low(unsigned pair) { return widen(__ushort_as_half(pair & 0xffff)); }
  static __device__ __forceinline__ float high(unsigned pair) { return widen(__ushort_as_half(pair >> 16)); }
};

// The same bits as another type.
template <typename To, typename From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "of the same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// What moves so many bytes in one instruction.
template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// W neighbouring logits as they lie in memory, in 32-bit registers.
template <typename T, int W>
struct Packed {
  using word = typename Word<sizeof(T) * W>::type;
  unsigned registers[(sizeof(T) * W + 3) / 4];

  static __device__ __forceinline__ Packed of(word w) {
    Packed p;
    p.registers[0] = 0;
    memcpy(p.registers, &w, sizeof w);
    return p;
  }

  static __device__ __forceinline__ Packed round(const float (&values)[W]) {
    Packed p;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < W; ++i)
        p.registers[i] = __float_as_uint(values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < W; i += 2)
        p.registers[i / 2] = bits_as<unsigned>(Storage<T>::round(values[i], i + 1 < W ? values[i + 1] : 0.f));
    }
    return p;
  }

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(registers[i]);
    else
      return i % 2 == 0 ? Storage<T>::low(registers[i / 2]) : Storage<T>::high(registers[i / 2]);
  }

  __device__ __forceinline__ word bits() const {
    word w;
    memcpy(&w, registers, sizeof w);
    return w;
  }
};

// The largest of many logits, narrow ones two at a time. NaN is passed over: it shows in the sums.
template <typename T>
class Largest {
 public:
  template <int W>
  __device__ __forceinline__ void add(const Packed<T, W>& values) {
    if constexpr (sizeof(T) == 4 || W == 1) {
#pragma unroll
      for (int i = 0; i < W; ++i)
        add(values[i]);
    } else {
      using Pair = typename Storage<T>::Pair;
      Pair top = bits_as<Pair>(values.registers[0]);
#pragma unroll
      for (int i = 1; i < W / 2; ++i)
        top = __hmax2(top, bits_as<Pair>(values.registers[i]));
      const unsigned pair = bits_as<unsigned>(top);
      add(fmaxf(Storage<T>::low(pair), Storage<T>::high(pair)));
    }
  }
  __device__ __forceinline__ void add(float value) { value_ = fmaxf(value_, value); }
  __device__ __forceinline__ float value() const { return value_; }

 private:
  float value_ = -INFINITY;
};

// kOnce: nobody reads this again. kAgain: this kernel does, perhaps from the L2.
enum class Reading { kOnce, kAgain };

template <Reading READING, typename T, int W>
__device__ __forceinline__ Packed<T, W> load(const T* p) {
  using word = typename Packed<T, W>::word;
  const word* source = reinterpret_cast<const word*>(p);
  // Not through the read-only path: the gradient may be written over the student.
  return Packed<T, W>::of(READING == Reading::kOnce ? __ldcs(source) : *source);
}

// Gradients stream out: nothing of this kernel reads them.
template <typename T, int W>
__device__ __forceinline__ void store(T* p, const Packed<T, W>& values) {
  __stcs(reinterpret_cast<typename Packed<T, W>::word*>(p), values.bits());
}

// The vectors that a thread takes: first, first + step, ... below end.
struct Share {
  int first, end, step;
};

// One row. It knows little by itself: the job is in constant memory, and registers are scarce.
template <typename S, typename T, int W>
struct RowColumns {
  const RowJob& job;
  int index;
  const S* student;
  const T* teacher;
  int head, vectors;  // columns before the first whole vector, and how many of these there are

  __device__ __forceinline__ RowColumns(const RowJob& job, int index)
      : job(job),
        index(index),
        student(static_cast<const S*>(job.student.data) + job.student.offset(index)),
        teacher(static_cast<const T*>(job.teacher.data) + job.teacher.offset(index)) {
    const unsigned begun = static_cast<unsigned>(reinterpret_cast<uintptr_t>(student) / sizeof(S)) % W;
    head = min(static_cast<int>((W - begun) % W), job.vocab_size);
    vectors = (job.vocab_size - head) / W;
  }

  __device__ __forceinline__ int column(int vector) const { return head + vector * W; }

  template <Reading READING>
  __device__ __forceinline__ Packed<S, W> student_vector(int vector) const {
    return load<READING, S, W>(student + step(job.student) * column(vector));
  }
  template <Reading READING>
  __device__ __forceinline__ Packed<T, W> teacher_vector(int vector) const {
    return load<READING, T, W>(teacher + step(job.teacher) * column(vector));
  }
  __device__ __forceinline__ float student_at(int i) const { return Storage<S>::widen(student[step(job.student) * i]); }
  __device__ __forceinline__ float teacher_at(int i) const { return Storage<T>::widen(teacher[step(job.teacher) * i]); }

  // Neighbouring columns are neighbours in memory wherever there are vectors of them.
  static __device__ __forceinline__ int64_t step(const Matrix& m) { return W == 1 ? m.column_stride : 1; }

  // The column outside of all vectors that thread `i` takes, counted over the threads of the row; -1: none.
  __device__ __forceinline__ int loose_column(int i) const {
    if (W == 1) return -1;
    const int column = i < head ? i : i + vectors * W;
    return column < job.vocab_size && i < 2 * W ? column : -1;
  }

  // -1 for none, and for one that is no column.
  __device__ __forceinline__ int label() const {
    const int64_t given = job.labels.at(index, -1);
    return given >= 0 && given < job.vocab_size ? static_cast<int>(given) : -1;
  }

  // NaN for a label that is no column: the cross-entropy shows it.
  __device__ __forceinline__ float label_logit() const {
    const int i = label();
    return i < 0 ? NAN : student_at(i);
  }
};

// The gradient of one row. VECTORS: its rows begin as the student's do, so that vectors can be stored; where that is
// not known, job.gradient_vectors says whether.
template <bool VECTORS, typename S, typename T, int W>
struct GradientColumns {
  const RowColumns<S, T, W>& row;
  S* data;

  __device__ __forceinline__ explicit GradientColumns(const RowColumns<S, T, W>& row)
      : row(row), data(static_cast<S*>(row.job.gradient.data) + row.job.gradient.offset(row.index)) {}

  __device__ __forceinline__ void store_column(int i, float g) const {
    data[(W == 1 ? row.job.gradient.column_stride : 1) * i] = Storage<S>::round(g);
  }

  __device__ __forceinline__ void store_vector(int vector, const float (&g)[W]) const {
    if (W > 1 && (VECTORS || row.job.gradient_vectors)) {
      store<S, W>(data + row.column(vector), Packed<S, W>::round(g));
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i)
        store_column(row.column(vector) + i, g[i]);
    }
  }

  // Of the columns past the vocabulary.
  __device__ __forceinline__ void store_padding(int thread, int threads) const {
    for (int i = row.job.vocab_size + thread; i < row.job.gradient_columns; i += threads)
      store_column(i, 0.f);
  }

  // Of a row left out.
  __device__ __forceinline__ void store_nothing(int thread, int threads) const {
    const float zeros[W] = {};
#pragma unroll 1
    for (int v = thread; v < row.vectors; v += threads)
      store_vector(v, zeros);
    const int loose = row.loose_column(thread);
    if (loose >= 0) store_column(loose, 0.f);
    store_padding(thread, threads);
  }
};

}  // namespace
}  // namespace cuda
}  // namespace eakd
