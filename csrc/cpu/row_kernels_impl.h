// The two sweeps over one segment of a row pair, for the instruction set of the including file: its state, and its
// gradient. Everything runs on blocks of the arithmetic type (fp32, or fp64 where a side is fp64) in the first-level
// cache, padded with -inf to whole vectors, so storage types and tails are the business of load_block and store_block.
#pragma once

#include "blocks.h"
#include "row_kernels.h"

namespace eakd {
namespace {

// Blocks are a page or two, at whose ends the hardware's prefetching stops: arithmetic on one block asks for the next.
// Past the end of the row that is the next row, or nothing; a prefetch never faults.
struct Ahead {
  const char *teacher, *student;
  int64_t teacher_bytes, student_bytes;  // a column

  Ahead(const RowJob& job, const RowPair& row, int64_t column)
      : teacher_bytes(job.teacher.vocab_stride == 1 ? job.teacher.item_bytes : 0),
        student_bytes(job.student.vocab_stride == 1 ? job.student.item_bytes : 0) {
    teacher = row.teacher + column * teacher_bytes, student = row.student + column * student_bytes;
  }
  void fetch(int64_t i) const {
    __builtin_prefetch(teacher + i * teacher_bytes);
    __builtin_prefetch(student + i * student_bytes);
  }
};

// ---- statistics ------------------------------------------------------------------------------------------------

// The sums of one block at both temperatures. With tau = T0/P and t = T0/Q for small integers, one exponential
// u = 2^x, x = (y - My) log2(e)/T0, gives 2^b = u^P and 2^a = u^Q. P = Q = 0: no such ratio, two exponentials.
// cross: with Bd. keep_b, keep_d: [n], where 2^b and 2^d are to stay; null: nowhere. `ahead` fetches the next block
// meanwhile.
template <typename T, int P, int Q>
void add_block_sums(RowState<double>& s, const T* y, const T* z, int64_t n, const Temperatures<double>& k, bool cross,
                    T* keep_b, T* keep_d, const Ahead& ahead) {
  constexpr bool shared = P > 0;
  constexpr int kP = shared ? P : 1, kQ = shared ? Q : 1;
  const T k0 = T(shared ? k.k_tau / P : k.k_tau), kt = T(k.k_t);
  const T my = centre<T>(s.My), mz = centre<T>(s.Mz);
  Vec<T> A0{}, A1{}, E0{}, E1{}, B0{}, Bd{}, D0{};
  each_strip<T>(n, [&](auto width, int64_t first) {
    using Vectors = Strip<T, decltype(width)::value>;
    const Vectors y_step([&](int u) { return load(y + first + u * kLanes) - my; });
    const Vectors z_step([&](int u) { return load(z + first + u * kLanes) - mz; });
    const Vectors xy([&](int u) { return raise_to(y_step[u] * k0, kExp2Floor<T>); });
    const Vectors xz_raw([&](int u) { return z_step[u] * k0; });
    const Vectors xz([&](int u) { return raise_to(xz_raw[u], kExp2Floor<T>); });
    const Vectors uy([&](int u) { return exp2_from_floor(xy[u]); }), uz([&](int u) { return exp2_from_floor(xz[u]); });
    // From the logits again where nothing is shared: the floor at tau is not the floor at t.
    const Vectors ay([&](int u) { return shared ? xy[u] : raise_to(y_step[u] * kt, kExp2Floor<T>); });
    const Vectors az([&](int u) { return shared ? xz[u] : raise_to(z_step[u] * kt, kExp2Floor<T>); });
    const Vectors ea([&](int u) { return shared ? power<kQ>(uy[u]) : exp2_from_floor(ay[u]); });
    const Vectors ee([&](int u) { return shared ? power<kQ>(uz[u]) : exp2_from_floor(az[u]); });
    Vectors::each(first, [&](int u, int64_t i) {
      ahead.fetch(i);
      const Vec<T> eb = power<kP>(uy[u]), ed = power<kP>(uz[u]);
      B0 += eb, D0 += ed;
      if (keep_b != nullptr) store(keep_b + i, eb);
      if (keep_d != nullptr) store(keep_d + i, ed);
      // Unclamped student exponent: -inf under teacher mass is an infinite divergence. No mass, no term.
      if (cross) Bd += eb > T(0) ? eb * (xy[u] - xz_raw[u]) : Vec<T>{};
      A1 += ea[u] * ay[u], E1 += ee[u] * az[u];
      if constexpr (P != Q || !shared) A0 += ea[u], E0 += ee[u];
    });
  });
  // Exactly, so that first moments do not carry the rounding of k0.
  const double unit_tau = k.k_tau / k0, unit_t = k.k_t / (shared ? k0 : kt);
  s.B0 = sum<T>(B0), s.D0 = sum<T>(D0), s.Bd = sum<T>(Bd) * unit_tau;
  s.A1 = sum<T>(A1) * unit_t, s.E1 = sum<T>(E1) * unit_t;
  s.A0 = shared && P == Q ? s.B0 : sum<T>(A0), s.E0 = shared && P == Q ? s.D0 : sum<T>(E0);
}

template <typename T>
double block_hard_sum(const T* z, int64_t n, T mz) {
  Vec<T> F0{};
  for (int64_t i = 0; i < n; i += kLanes)
    F0 += exp2_any<T>((load(z + i) - mz) * T(kLog2E));
  return sum<T>(F0);
}

template <typename T>
void add_block_slopes(RowState<double>& s, const T* y, const T* z, int64_t n, const Temperatures<double>& exact) {
  const Temperatures<T> k(exact.tau, exact.t);
  const T my = centre<T>(s.My), mz = centre<T>(s.Mz);
  Vec<T> B1{}, D1{}, Bbd{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec<T> b = raise_to((load(y + i) - my) * k.k_tau, kExp2Floor<T>), d_raw = (load(z + i) - mz) * k.k_tau;
    const Vec<T> d = raise_to(d_raw, kExp2Floor<T>), eb = exp2_from_floor(b);
    B1 += eb * b, D1 += exp2_from_floor(d) * d;
    Bbd += eb > T(0) ? eb * b * (b - d_raw) : Vec<T>{};
  }
  s.B1 = sum<T>(B1), s.D1 = sum<T>(D1), s.Bbd = sum<T>(Bbd);
}

template <typename T>
using SumBlock = void (*)(RowState<double>&, const T*, const T*, int64_t, const Temperatures<double>&, bool, T*, T*,
                          const Ahead&);

// The cheapest way to both temperatures: the first pair with P tau = Q t.
template <typename T>
SumBlock<T> sum_block_for(const Temperatures<double>& k) {
  struct Ratio {
    int P, Q;
    SumBlock<T> sum;
  };
#define EAKD_RATIO(P, Q) \
  { P, Q, add_block_sums<T, P, Q> }
  static constexpr Ratio ratios[] = {EAKD_RATIO(1, 1), EAKD_RATIO(2, 1), EAKD_RATIO(3, 1), EAKD_RATIO(4, 1),
                                     EAKD_RATIO(1, 2), EAKD_RATIO(1, 3), EAKD_RATIO(1, 4), EAKD_RATIO(3, 2),
                                     EAKD_RATIO(2, 3), EAKD_RATIO(3, 4), EAKD_RATIO(4, 3)};
#undef EAKD_RATIO
  for (const Ratio& r : ratios)
    if (r.P * k.tau == r.Q * k.t) return r.sum;
  return add_block_sums<T, 0, 0>;
}

// The blocks of one segment: block b has the columns [begin(b), begin(b) + columns(b)).
struct Blocks {
  int64_t first, end, count;

  Blocks(const RowJob& job, int64_t segment)
      : first(segment * kSegment),
        end(first + kSegment < job.vocab_size ? first + kSegment : job.vocab_size),
        count((end - first + kBlock - 1) / kBlock) {}

  int64_t begin(int64_t b) const { return first + b * kBlock; }
  int64_t columns(int64_t b) const { return end - begin(b) < kBlock ? end - begin(b) : kBlock; }
};

template <typename T>
RowState<double> segment_state(const RowJob& job, const RowPair& row, const Temperatures<double>& k, int64_t segment,
                               const KeptExponentials<T>* kept) {
  Block<T> teacher, student;
  const SumBlock<T> sum_block = sum_block_for<T>(k);
  const Blocks blocks(job, segment);
  RowState<double> state;
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t begin = blocks.begin(b), columns = blocks.columns(b), n = round_up_to_lanes(columns);
    const Columns<T> y = load_block<T>(job.teacher, row.teacher, begin, columns, teacher.values, false);
    const Columns<T> z = load_block<T>(job.student, row.student, begin, columns, student.values, false);
    RowState<double> block;
    block.My = y.max, block.Mz = z.max;
    T *keep_b = nullptr, *keep_d = nullptr;
    if (kept != nullptr) {
      keep_b = kept->teacher + begin, keep_d = kept->student + begin;
      kept->teacher_max[begin / kBlock] = y.max, kept->student_max[begin / kBlock] = z.max;
    }
    sum_block(block, y.values, z.values, n, k, true, keep_b, keep_d, Ahead(job, row, begin + kBlock));
    if (job.labels != nullptr)
      block.F0 = k.tau == 1 ? block.D0 : k.t == 1 ? block.E0 : block_hard_sum(z.values, n, centre<T>(block.Mz));
    if (job.temperature_slopes) add_block_slopes(block, y.values, z.values, n, k);
    if (b == 0)
      state = block;
    else
      state.merge(block, k);
  }
  return state;
}

// ---- gradient --------------------------------------------------------------------------------------------------

// g = q 2^d + p 2^b
template <typename T>
void divergence_gradient(const T* y, const T* z, int64_t n, const Temperatures<T>& k, const GradientBasis<T>& c, T* g,
                         const Ahead& ahead) {
  const T my = centre<T>(c.My), mz = centre<T>(c.Mz);
  each_strip<T>(n, [&](auto width, int64_t first) {
    using Vectors = Strip<T, decltype(width)::value>;
    const Vectors ed([&](int u) { return exp2_any<T>((load(z + first + u * kLanes) - mz) * k.k_tau); });
    const Vectors eb([&](int u) { return exp2_any<T>((load(y + first + u * kLanes) - my) * k.k_tau); });
    Vectors::each(first, [&](int u, int64_t i) {
      ahead.fetch(i);
      store(g + i, c.q * ed[u] + c.p * eb[u]);
    });
  });
}

// The same from exponentials relative to the block's maxima. The block of an empty side holds zeros.
template <typename T>
void kept_gradient(const KeptExponentials<T>& kept, int64_t begin, int64_t n, const Temperatures<T>& k,
                   const GradientBasis<T>& c, T* g) {
  const T my = kept.teacher_max[begin / kBlock], mz = kept.student_max[begin / kBlock];
  const T p = my == -T(INFINITY) ? T(0) : c.p * pow2((my - c.My) * k.k_tau);
  const T q = mz == -T(INFINITY) ? T(0) : c.q * pow2((mz - c.Mz) * k.k_tau);
  for (int64_t i = 0; i < n; i += kLanes)
    store(g + i, q * load(kept.student + begin + i) + p * load(kept.teacher + begin + i));
}

// g += hard 2^((z - Mz) log2(e)) + entropy 2^e (ln2 e + entropy_shift), where those terms are asked for.
template <typename T>
void add_other_terms(const T* z, int64_t n, const Temperatures<T>& k, const GradientBasis<T>& c, T* g) {
  const T mz = centre<T>(c.Mz);
  if (c.hard != 0)
    for (int64_t i = 0; i < n; i += kLanes)
      store(g + i, load(g + i) + c.hard * exp2_any<T>((load(z + i) - mz) * T(kLog2E)));
  if (c.entropy != 0)
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec<T> e = raise_to((load(z + i) - mz) * k.k_t, kExp2Floor<T>);
      store(g + i, load(g + i) + c.entropy * exp2_from_floor(e) * (T(kLn2) * e + c.entropy_shift));
    }
}

template <typename T>
void segment_gradient(const RowJob& job, const RowPair& row, const Temperatures<double>& temperatures,
                      const GradientBasis<double>& exact_basis, int64_t segment, const KeptExponentials<T>* kept) {
  Block<T> teacher, student, gradient;
  const Temperatures<T> k(temperatures.tau, temperatures.t);
  GradientBasis<T> basis = exact_basis.as<T>();
  if (k.tau == T(1)) basis.q = exact_basis.q + exact_basis.hard, basis.hard = 0;  // the same exponentials
  const bool reads_logits = kept == nullptr || basis.hard != 0 || basis.entropy != 0;
  const Blocks blocks(job, segment);
  // Backwards: the end of the row is what the statistics sweep left in the cache.
  for (int64_t b = blocks.count - 1; b >= 0; --b) {
    const int64_t begin = blocks.begin(b), columns = blocks.columns(b), n = round_up_to_lanes(columns);
    const bool direct = !job.gradient_past_caches && job.gradient.storage == native<T> &&
                        job.gradient.vocab_stride == 1 && n == columns;
    T* g = direct ? reinterpret_cast<T*>(row.gradient) + begin : gradient.values;
    const T* z = nullptr;
    // A gradient that overwrites the student must not overwrite what its own later terms read.
    if (reads_logits)
      z = load_block<T>(job.student, row.student, begin, columns, student.values, job.gradient_over_student).values;
    if (kept != nullptr) {
      kept_gradient(*kept, begin, n, k, basis, g);
    } else {
      const T* y = load_block<T>(job.teacher, row.teacher, begin, columns, teacher.values, false).values;
      divergence_gradient(y, z, n, k, basis, g, Ahead(job, row, begin - kBlock));
    }
    if (reads_logits) add_other_terms(z, n, k, basis, g);
    if (row.label >= begin && row.label < begin + columns) g[row.label - begin] += basis.label;
    if (!direct) store_block(job.gradient, row.gradient, begin, columns, g, job.gradient_past_caches);
  }
  if (job.gradient_past_caches) stream_fence();
}

}  // namespace
}  // namespace eakd
