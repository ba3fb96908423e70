// How the kernel for recipes goes through a row: in tiles of a vector (or of 4 single columns), each thread its own
// ones every time, from global memory or from where the first sweep has put them, in shared memory. A thread finds
// there what it wrote itself, so that this needs no barrier.
//
// Loops over the columns of a tile are rolled, two columns a turn: there are many divergences and many kernels.
#pragma once

#include "columns.cuh"
#include "recipe_job.h"

namespace eakd {
namespace cuda {
namespace {

template <typename T, int N>
__device__ __forceinline__ void move_up(Packed<T, N>& columns) {
  constexpr int kRegisters = sizeof(columns.registers) / 4, kStep = sizeof(T) / 2;
#pragma unroll
  for (int i = 0; i + kStep < kRegisters; ++i)
    columns.registers[i] = columns.registers[i + kStep];
}

// The first two columns, which leave; an index that is not a constant would put all of them into memory.
template <typename T, int N>
__device__ __forceinline__ void take_two(Packed<T, N>& columns, float (&x)[2]) {
  x[0] = columns[0], x[1] = columns[1];
  move_up(columns);
}

// Two columns more at the end.
template <typename T, int N>
__device__ __forceinline__ void put_two(Packed<T, N>& columns, const float (&x)[2]) {
  constexpr int kRegisters = sizeof(columns.registers) / 4, kStep = sizeof(T) / 2;
  move_up(columns);
  const Packed<T, 2> two = Packed<T, 2>::round(x);
#pragma unroll
  for (int i = 0; i < kStep; ++i)
    columns.registers[kRegisters - kStep + i] = two.registers[i];
}

// Column i, for an i that is known when this is compiled.
template <typename T, int N>
__device__ __forceinline__ void put(Packed<T, N>& columns, int i, T x) {
  if constexpr (sizeof(T) == 4) {
    columns.registers[i] = bits_as<unsigned>(x);
  } else {
    const unsigned bits = bits_as<unsigned short>(x), pair = columns.registers[i / 2];
    columns.registers[i / 2] = i % 2 == 0 ? (pair & 0xffff0000u) | bits : (pair & 0xffffu) | bits << 16;
  }
}

// Where there is no column, both sides have -inf, and so no term in any sum.
template <typename T, int N>
__device__ __forceinline__ Packed<T, N> no_columns() {
  float nothing[N];
#pragma unroll
  for (int i = 0; i < N; ++i)
    nothing[i] = -INFINITY;
  return Packed<T, N>::round(nothing);
}

template <typename S, typename T, int W>
struct Tile {
  static constexpr int kColumns = W > 1 ? W : 4, kSlots = kColumns / W;  // slots: of a vector
  Packed<T, kColumns> y;
  Packed<S, kColumns> z;
};

// Tiles have numbers from 0; this one is of the column outside of all vectors that a thread may have.
constexpr int kLoose = -1;

template <typename S, typename T, int W>
class RecipeColumns {
 public:
  const RowColumns<S, T, W>& row;
  const int thread, threads;
  const int loose;  // a column, or -1

  // stage: where the CTA keeps its part of the row, `slots` vectors of each side and thread; null: it does not.
  __device__ __forceinline__ RecipeColumns(const RowColumns<S, T, W>& row, int thread, int threads,
                                           unsigned char* stage, int slots)
      : row(row), thread(thread), threads(threads), loose(row.loose_column(thread)), stage_(stage), slots_(slots) {}

  __device__ __forceinline__ bool staged() const { return stage_ != nullptr; }

  // How many tiles the first thread has, and this one.
  __device__ __forceinline__ int most_tiles() const { return tiles_of(0); }
  __device__ __forceinline__ int tiles() const { return tiles_of(thread); }

  // The vector in a slot of a tile.
  __device__ __forceinline__ int vector(int tile, int slot) const { return (tile * kSlots + slot) * threads + thread; }
  // Column i of a tile is first_column + i * column_step.
  __device__ __forceinline__ int first_column(int tile) const {
    return tile == kLoose ? loose : row.column(vector(tile, 0));
  }
  __device__ __forceinline__ int column_step() const { return W > 1 ? 1 : threads; }

  __device__ __forceinline__ Tile<S, T, W> load(int tile) const {
    Tile<S, T, W> columns;
    if (W == 1 || tile == kLoose) {
      columns.y = no_columns<T, kColumns>(), columns.z = no_columns<S, kColumns>();
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const int column = tile == kLoose ? loose : row.column(vector(tile, i));
        if (column >= row.job.vocab_size) break;
        put(columns.y, i, row.teacher[row.step(row.job.teacher) * column]);
        put(columns.z, i, row.student[row.step(row.job.student) * column]);
      }
    } else {
      const int v = vector(tile, 0);
      columns.y = whole<T>(row.template teacher_vector<Reading::kAgain>(v));
      columns.z = whole<S>(row.template student_vector<Reading::kAgain>(v));
    }
    return columns;
  }

  __device__ __forceinline__ void keep(int tile, const Tile<S, T, W>& columns) const {
    if (!staged() || tile == kLoose) return;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      *teacher_slot(tile, i) = part(columns.y, i);
      *student_slot(tile, i) = part(columns.z, i);
    }
  }

  // In a later sweep.
  __device__ __forceinline__ Tile<S, T, W> again(int tile) const {
    if (!staged() || tile == kLoose) return load(tile);
    Tile<S, T, W> columns;
    if constexpr (W > 1) {
      columns.y = Packed<T, W>::of(*teacher_slot(tile, 0)), columns.z = Packed<S, W>::of(*student_slot(tile, 0));
    } else {
      columns.y = no_columns<T, kColumns>(), columns.z = no_columns<S, kColumns>();
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        put(columns.y, i, bits_as<T>(*teacher_slot(tile, i)));
        put(columns.z, i, bits_as<S>(*student_slot(tile, i)));
      }
    }
    return columns;
  }

 private:
  static constexpr int kColumns = Tile<S, T, W>::kColumns, kSlots = Tile<S, T, W>::kSlots;
  template <typename U>
  using word = typename Packed<U, W>::word;

  __device__ __forceinline__ int tiles_of(int i) const {
    return i < row.vectors ? (row.vectors - i - 1) / (threads * kSlots) + 1 : 0;
  }

  // Neighbouring threads have neighbouring slots.
  __device__ __forceinline__ int place(int tile, int slot) const {
    return (tile * kSlots + slot) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  }
  __device__ __forceinline__ word<S>* student_slot(int tile, int slot) const {
    return reinterpret_cast<word<S>*>(stage_) + place(tile, slot);
  }
  __device__ __forceinline__ word<T>* teacher_slot(int tile, int slot) const {
    return reinterpret_cast<word<T>*>(stage_ + sizeof(word<S>) * slots_ * blockDim.x) + place(tile, slot);
  }

  // A vector is a tile where there are vectors.
  template <typename U>
  static __device__ __forceinline__ Packed<U, kColumns> whole(const Packed<U, W>& vector) {
    Packed<U, kColumns> columns;
    columns.registers[0] = 0;
    memcpy(columns.registers, vector.registers, sizeof vector.registers);
    return columns;
  }

  template <typename U>
  static __device__ __forceinline__ word<U> part(const Packed<U, kColumns>& columns, int slot) {
    if constexpr (W > 1)
      return columns.bits();
    else
      return bits_as<word<U>>(Storage<U>::round(columns[slot]));
  }

  unsigned char* const stage_;
  const int slots_;
};

}  // namespace
}  // namespace cuda
}  // namespace eakd
