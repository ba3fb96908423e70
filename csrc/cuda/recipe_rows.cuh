// Rows of any recipe (../recipe.h): statistics, the gradient from them, or one pass. A CTA or a cluster takes a row,
// and keeps it in shared memory where it fits, so that only the first of up to seven sweeps reads it from memory.
//
// One kernel for all of it: which sweeps run, of which divergence and at how many temperatures, is decided while it
// runs, by branches that all threads take alike.
#pragma once

#include "recipe_result.cuh"

namespace eakd {
namespace cuda {
namespace {

// Columns that a thread adds up before a warp does.
constexpr int kSweepTerms = 4096;
// Where columns come from memory they are summed at every temperature while the L1 has them: tiles of a thread.
constexpr int kTilesInCache = 8;

// Two columns a turn: visit(y, z, column, step), the second at column + step.
template <typename S, typename T, int W, typename Visit>
__device__ __forceinline__ void each_two(const RecipeColumns<S, T, W>& columns, int number, Tile<S, T, W> tile,
                                         Visit&& visit) {
  const int step = columns.column_step();
  int column = columns.first_column(number);
#pragma unroll 1
  for (int i = 0; i < Tile<S, T, W>::kColumns; i += 2) {
    float y[2], z[2];
    take_two(tile.y, y), take_two(tile.z, z);
    visit(y, z, column, step);
    column += 2 * step;
  }
}

// Tiles begin <= number < end of this thread, and with the first of them the column outside of all vectors.
template <typename S, typename T, int W, typename Sums>
__device__ __forceinline__ void sweep(const RecipeJob& job, const RecipeColumns<S, T, W>& columns, int begin, int end,
                                      int left_out, Sums& sums) {
  const int last = min(end, columns.tiles());
#pragma unroll 1
  for (int n = begin == 0 && columns.loose >= 0 ? kLoose : begin; n < last; ++n)
    each_two(columns, n, columns.again(n), [&](const float (&y)[2], const float (&z)[2], int column, int step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool out = column + i * step == left_out;
        sums.add(out ? -INFINITY : logit(job.teacher_side, y[i]), out ? -INFINITY : logit(job.student_side, z[i]),
                 column + i * step);
      }
    });
}

// What the lanes of a warp have summed, added to what the warp has.
__device__ __forceinline__ void add_to_warp(RecipeSpace& space, int place, const float (&s)[kSweepSums], bool first) {
  const int lane = threadIdx.x % kWarp;
  const float sum = transposed_sum(s);
  if (lane % 4 != 0) return;
  float& total = space.warps[threadIdx.x / kWarp][place * kSweepSums + lane / 4];
  total = first ? sum : total + sum;
}

// Sums (or maxima) of all warps of the row into `result` of every CTA. `turn` alternates.
template <bool MAXIMA>
__device__ void merge_warps(RecipeSpace& space, float* result, int count, int cluster, int& turn) {
  const auto join = [](float a, float b) { return MAXIMA ? fmaxf(a, b) : a + b; };
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    float x = space.warps[0][i];
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp)
      x = join(x, space.warps[warp][i]);
    (cluster > 1 ? space.own[turn] : result)[i] = x;
  }
  if (cluster > 1) {
    meet_cluster();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      float x = ptx::load_remote(&space.own[turn][i], 0);
      for (int rank = 1; rank < cluster; ++rank)
        x = join(x, ptx::load_remote(&space.own[turn][i], rank));
      result[i] = x;
    }
    turn ^= 1;
  }
  __syncthreads();
}

// One row's way through the kernel.
template <typename S, typename T, int W>
struct RecipeRow {
  static constexpr int kColumns = Tile<S, T, W>::kColumns;
  const RecipeJob& job;
  RecipeSpace& space;
  const RecipeColumns<S, T, W>& columns;
  const int index, cluster;
  int& turn;
  const LabelColumn<float> label;  // read before the gradient may be written over it
  const int label_column, left_out;

  __device__ __forceinline__ RecipeRow(const RecipeJob& job, RecipeSpace& space, const RecipeColumns<S, T, W>& columns,
                                       int cluster, int& turn)
      : job(job),
        space(space),
        columns(columns),
        index(columns.row.index),
        cluster(cluster),
        turn(turn),
        label(label_of(job, columns.row)),
        label_column(columns.row.label()),
        left_out(job.recipe.decoupled() ? label_column : -1) {}

  // Brings the row in.
  __device__ __forceinline__ void find_maxima() const {
    constexpr int kBatch = W > 1 ? 4 : 1;
    float my = -INFINITY, mz = -INFINITY;
    const auto add = [&](int n, const Tile<S, T, W>& tile) {
      each_two(columns, n, tile, [&](const float (&y)[2], const float (&z)[2], int column, int step) {
        if (column != left_out) my = fmaxf(my, y[0]), mz = fmaxf(mz, z[0]);
        if (column + step != left_out) my = fmaxf(my, y[1]), mz = fmaxf(mz, z[1]);
      });
    };
    if (columns.loose >= 0) add(kLoose, columns.load(kLoose));
    const int tiles = columns.tiles();
#pragma unroll 1
    for (int first = 0; first < tiles; first += kBatch) {
      Tile<S, T, W> batch[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (first + i < tiles) batch[i] = columns.load(first + i);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i >= tiles) break;
        columns.keep(first + i, batch[i]);
        add(first + i, batch[i]);
      }
    }
    my = largest_of<kWarp>(logit(job.teacher_side, my)), mz = largest_of<kWarp>(logit(job.student_side, mz));
    if (threadIdx.x % kWarp == 0) space.warps[threadIdx.x / kWarp][0] = my, space.warps[threadIdx.x / kWarp][1] = mz;
    merge_warps<true>(space, space.maxima, 2, cluster, turn);
  }

  // About some centres, into space.moments.
  __device__ __forceinline__ void sum_moments(float y, float z) const {
    const int most = columns.most_tiles();
    for (int begin = 0; begin == 0 || begin < most; begin += kSweepTerms / kColumns) {
      MomentSums sums(y, z);
      sweep(job, columns, begin, begin + kSweepTerms / kColumns, -1, sums);
      add_to_warp(space, 0, sums.s, begin == 0);
    }
    merge_warps<false>(space, space.moments, kSweepSums, cluster, turn);
  }

  // Means first about the maxima, then about themselves: what the first sums have lost, the second find.
  __device__ __forceinline__ void find_moments(float My, float Mz) const {
    const float* s = space.moments;
    float mean_y = My, mean_z = Mz;
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      if (turn == 1) mean_y += s[1] / fmaxf(s[0], 1), mean_z += s[4] / fmaxf(s[3], 1);
      sum_moments(mean_y, mean_z);
    }
    const float count_y = fmaxf(s[0], 1), count_z = fmaxf(s[3], 1);
    if (threadIdx.x != 0) return;
    space.teacher.count = s[0], space.teacher.mean = (mean_y - My) + s[1] / count_y;
    space.teacher.squares = s[2] - s[1] * (s[1] / count_y);
    space.student.count = s[3], space.student.mean = (mean_z - Mz) + s[4] / count_z;
    space.student.squares = s[5] - s[4] * (s[4] / count_z);
  }

  __device__ __forceinline__ void store_scales(float teacher_deviation, float student_deviation) const {
    if (static_cast<int>(threadIdx.x) >= job.recipe.count) return;
    // Rounded once: all exponents of a row are off by this.
    const double k = kLog2E / temperature_of(job, index, threadIdx.x);
    TauNumbers& tau = space.tau[threadIdx.x];
    const bool plain = job.recipe.standardize == kNoStandardize;
    tau.k_b = static_cast<float>(plain ? k : k / (teacher_deviation + kStandardizeEpsilon));
    tau.k_d = static_cast<float>(plain ? k : k / (student_deviation + kStandardizeEpsilon));
  }

  // Of x - maximum, at the entropy temperature.
  __device__ __forceinline__ float entropy_factor(float deviation) const {
    return job.recipe.standardize == kStandardizeAll ? job.k_t * inverse_deviation(job.recipe, deviation) : job.k_t;
  }

  __device__ __forceinline__ int tiles_at_once() const {
    return columns.staged() || job.recipe.count == 1 ? kSweepTerms / kColumns : kTilesInCache;
  }

  __device__ __forceinline__ void sum(float My, float Mz) const {
    const float k_a = entropy_factor(space.teacher.deviation()), k_e = entropy_factor(space.student.deviation());
    const float rest_My = about(space.maxima[0]), rest_Mz = about(space.maxima[1]);
    const int most = columns.most_tiles(), step = tiles_at_once();
#pragma unroll 1
    for (int begin = 0; begin == 0 || begin < most; begin += step) {
      EntropySums entropies(My, Mz, k_a, k_e, job.labels.data != nullptr);
      sweep(job, columns, begin, begin + step, -1, entropies);
      add_to_warp(space, 0, entropies.s, begin == 0);
#pragma unroll 1
      for (int k = 0; k < job.recipe.count; ++k) {
        TauSweep sums(Exponents(job, space.tau[k], rest_My, rest_Mz));
        sweep(job, columns, begin, begin + step, left_out, sums);
        add_to_warp(space, 1 + k, sums.s, begin == 0);
      }
    }
    merge_warps<false>(space, space.sums, kSweepSums * (1 + job.recipe.count), cluster, turn);
  }

  __device__ __forceinline__ void sum_values(bool pulls) const {
    if (static_cast<int>(threadIdx.x) < job.recipe.count) {
      const float* sums = space.sums + kSweepSums * (1 + threadIdx.x);
      TauSums<float> of_tau;
      of_tau.B0 = sums[0], of_tau.D0 = sums[1], of_tau.Bd = sums[2], of_tau.Dd = sums[3];
      space.tau[threadIdx.x].normalise(sums[0], sums[1]);
      space.tau[threadIdx.x].pull = finish_columns(job.recipe, of_tau, false).pull;
    }
    __syncthreads();
    const float rest_My = about(space.maxima[0]), rest_Mz = about(space.maxima[1]);
    const int most = columns.most_tiles(), step = tiles_at_once();
#pragma unroll 1
    for (int begin = 0; begin == 0 || begin < most; begin += step)
#pragma unroll 1
      for (int k = 0; k < job.recipe.count; ++k) {
        ValueSweep sums(job, Exponents(job, space.tau[k], rest_My, rest_Mz), space.tau[k], pulls);
        sweep(job, columns, begin, begin + step, left_out, sums);
        add_to_warp(space, k, sums.s, begin == 0);
      }
    merge_warps<false>(space, space.values, kSweepSums * job.recipe.count, cluster, turn);
  }

  // Statistics or one pass: all sums, and what comes of them.
  __device__ __forceinline__ void finish() const {
    find_maxima();
    const bool apart = job.recipe.decoupled(), standardized = job.recipe.standardize != kNoStandardize;
    const float My = about(apart ? fmaxf(space.maxima[0], label.teacher) : space.maxima[0]);
    const float Mz = about(apart ? fmaxf(space.maxima[1], label.student) : space.maxima[1]);
    if (standardized)
      find_moments(My, Mz);
    else if (threadIdx.x == 0)
      space.teacher = space.student = Moments<float>();
    __syncthreads();
    store_scales(space.teacher.deviation(), space.student.deviation());
    __syncthreads();
    sum(My, Mz);
    const bool pulls = standardized || job.slopes, values = job.recipe.wants_values(pulls);
    if (values) sum_values(pulls);
    if (threadIdx.x >= kWarp) return;
    const bool storing = columns.thread < kWarp;  // of the first CTA
    if (storing && job.operation == Operation::kRowStatistics) store_for_merging(job, space, index, values);
    const Lane lane(job, index);
    const RecipeNumbers<float> numbers = finish_lane(job, space, lane, label, values);
    if (job.operation == Operation::kRowStatistics) {
      if (storing) store_statistics(job, index, lane, numbers);
    } else {
      store_basis(job, space, lane, numbers, label, finish_loss(job, index, lane, numbers, storing));
    }
  }

  // The gradient's basis from statistics that were stored.
  __device__ __forceinline__ void restore() const {
    if (threadIdx.x < kWarp) {
      const Lane lane(job, index);
      const RecipeNumbers<float> numbers = saved_numbers(job, index, lane);
      store_scales(numbers.common[kTeacherDeviation], numbers.common[kStudentDeviation]);
      __syncwarp();
      store_basis(job, space, lane, numbers, label, given_upstream(job, index));
    }
    if (cluster > 1) meet_cluster();  // all CTAs have read the label's logit
  }

  // In the exponents of all temperatures, of two columns.
  __device__ __forceinline__ void tau_gradients(const float (&y)[2], const float (&z)[2], int column, int step,
                                                float (&g)[2]) const {
    const float My = about(space.maxima[0]), Mz = about(space.maxima[1]);
    with_kind(job.recipe.divergence, [&](auto kind) {
#pragma unroll 1
      for (int k = 0; k < job.recipe.count; ++k) {
        const TauNumbers tau = space.tau[k];
        const Exponents exponents(job, tau, My, Mz);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float bias = exponents.bias(column + i * step), difference = exponents.difference(y[i], z[i]);
          const Column<float> c = tau.column(exponents.b(y[i]) + bias, exponents.d(z[i]), difference + bias);
          const float h = terms<decltype(kind)::value, DeviceMath>(c, job.first, job.second).h;
          // No fused multiply-add, whose product is exact: where both sides agree, so must the products.
          g[i] += __fadd_rn(tau.c == 0 ? 0.f : __fmul_rn(tau.c, h), __fmul_rn(tau.q, c.q));
        }
      }
    });
  }

  // Of a logit, from `g` in u.
  __device__ __forceinline__ float of_logit(float g, float z, bool is_label, float k_e) const {
    const RecipeBasis<float>& basis = space.basis;
    const Side& side = job.student_side;
    const float step = z - about(space.student_max);
    // Masked columns neither count in a deviation nor move with it.
    if (job.recipe.standardize != kNoStandardize)
      g = z == -INFINITY ? 0.f : basis.inverse * (g - basis.constant) - basis.linear * (step - basis.mean);
    if (basis.entropy != 0) {
      const float e = step * k_e, ee = ptx::ex2(e);
      if (ee > 0) g = fmaf(basis.entropy * ee, fmaf(static_cast<float>(kLn2), e, basis.entropy_shift), g);
    }
    if (basis.hard != 0) g = fmaf(basis.hard, ptx::ex2(step * kLog2Ef), g);
    if (is_label) g += basis.label;
    g *= side.scale;
    if (side.cap == 0) return g;
    const float share = z / side.cap;
    return z == -INFINITY ? 0.f : g * (1 - share * share);
  }

  // Backwards: rows that are not kept begin with what the caches still hold.
  __device__ __forceinline__ void write_gradient() const {
    const GradientColumns<false, S, T, W> out(columns.row);
    const float k_e = job.recipe.standardize == kStandardizeAll ? job.k_t * space.basis.inverse : job.k_t;
    const int first = columns.loose >= 0 ? kLoose : 0;
#pragma unroll 1
    for (int n = columns.tiles() - 1; n >= first; --n) {
      Packed<S, kColumns> gradient = {};
      each_two(columns, n, columns.again(n), [&](float (&y)[2], float (&z)[2], int column, int step) {
        float g[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 2; ++i)
          y[i] = logit(job.teacher_side, y[i]), z[i] = logit(job.student_side, z[i]);
        tau_gradients(y, z, column, step, g);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = column + i * step;
          if (y[i] == -INFINITY && z[i] == -INFINITY) g[i] = 0;
          if (at == left_out) g[i] = space.label_gradient;
          g[i] = of_logit(g[i], z[i], at == label_column, k_e);
        }
        put_two(gradient, g);
      });
      store(out, n, gradient);
    }
    out.store_padding(columns.thread, columns.threads);
  }

  __device__ __forceinline__ void store(const GradientColumns<false, S, T, W>& out, int number,
                                        const Packed<S, kColumns>& gradient) const {
    if (number == kLoose) {
      out.store_column(columns.loose, gradient[0]);
    } else if constexpr (W > 1) {
      float g[W];
#pragma unroll
      for (int i = 0; i < W; ++i)
        g[i] = gradient[i];
      out.store_vector(columns.vector(number, 0), g);
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        if (columns.vector(number, i) < columns.row.vectors) out.store_column(columns.vector(number, i), gradient[i]);
    }
  }
};

// slots: of a thread, for its part of a row in shared memory; 0: rows are read again.
template <typename S, typename T, int W>
__global__ void __launch_bounds__(kRecipeThreads, 2)
    recipe_rows_kernel(const __grid_constant__ RecipeJob job, int cluster, int slots) {
  RecipeSpace& space = *reinterpret_cast<RecipeSpace*>(ptx::dynamic_shared());
  unsigned char* const stage = slots == 0 ? nullptr : ptx::dynamic_shared() + kRecipeSpace;
  const int thread = thread_of_row(cluster), threads = cluster * blockDim.x;
  const bool statistics = job.operation == Operation::kRowStatistics;
  int turn = 0;
  for (int r = blockIdx.x / cluster; r < job.rows; r += gridDim.x / cluster) {
    const RowColumns<S, T, W> row(job, r);
    if (!job.keep.at(r, true)) {
      if (!statistics) GradientColumns<false, S, T, W>(row).store_nothing(thread, threads);
      if (thread == 0 && job.operation != Operation::kRowGradient)
        store_no_fields(job, r, statistics ? job.recipe.fields(job.slopes) : int(kNumLossStatistics));
      continue;
    }
    const RecipeColumns<S, T, W> columns(row, thread, threads, stage, slots);
    const RecipeRow<S, T, W> way(job, space, columns, cluster, turn);
    if (job.operation == Operation::kRowGradient)
      way.restore();
    else
      way.finish();
    __syncthreads();
    if (!statistics) way.write_gradient();
    __syncthreads();  // what it needed, the next row may overwrite
  }
  leave_cluster(cluster);
}

}  // namespace
}  // namespace cuda
}  // namespace eakd
