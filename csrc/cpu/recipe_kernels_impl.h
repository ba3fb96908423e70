// The loops of recipes (recipe_kernels.h) for the instruction set of the including file.
#pragma once

#include "alpha_beta_columns.h"
#include "blocks.h"
#include "recipe_kernels.h"
#include "row_kernels_impl.h"

namespace eakd {
namespace {

// ---- rows ------------------------------------------------------------------------------------------------------

template <typename T>
T load_recipe_columns(const LogitsView& v, const char* row, int64_t column, int64_t n, T scale, T cap, T* to) {
  const T largest = load_block<T>(v, row, column, n, to, true).max;
  if (scale == 1 && cap == 0) return largest;
  Vec<T> m = splat(-T(INFINITY));
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec<T> x = load(to + i) * scale;
    const Vec<T> value = cap == 0 ? x : x == -T(INFINITY) ? x : cap * tanh_any<T>(x / cap);
    store(to + i, value);
    m = larger(value, m);
  }
  store(to + n, splat(-T(INFINITY)));
  return max<T>(m);
}

// About the block's own mean, so that nothing cancels in the squares.
template <typename T>
Moments<double> block_moments(const T* x, int64_t n) {
  Vec<T> count{}, total{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec<T> value = load(x + i);
    const auto counts = value != -T(INFINITY);
    count += counts ? splat(T(1)) : Vec<T>{}, total += counts ? value : Vec<T>{};
  }
  Moments<double> m;
  m.count = sum<T>(count);
  if (m.count == 0) return m;
  const T mean = T(sum<T>(total) / m.count);
  Vec<T> rest{}, squares{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec<T> value = load(x + i);
    const Vec<T> step = value != -T(INFINITY) ? value - mean : Vec<T>{};
    rest += step, squares += step * step;
  }
  const double off = sum<T>(rest) / m.count;  // `mean` was rounded
  m.mean = mean + off, m.squares = sum<T>(squares) - off * off * m.count;
  return m;
}

template <typename T>
void exponentials(const T* x, int64_t n, T centre, T k, T* out) {
  each_strip<T>(n, [&](auto width, int64_t first) {
    using Vectors = Strip<T, decltype(width)::value>;
    const Vectors e([&](int u) { return exp2_any<T>((load(x + first + u * kLanes) - centre) * k); });
    Vectors::each(first, [&](int u, int64_t i) { store(out + i, e[u]); });
  });
}

template <int P, typename T>
void raise_block(const T* u, int64_t n, const T* weights, T* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec<T> e = power<P>(load(u + i));
    store(out + i, weights == nullptr ? e : e * load(weights + i));
  }
}

// visit(Kind<P>()): the power, 1 to 6, as a constant.
template <typename Visit>
void with_power(int power, Visit&& visit) {
  switch (power) {
    case 1: return visit(Kind<1>());
    case 2: return visit(Kind<2>());
    case 3: return visit(Kind<3>());
    case 4: return visit(Kind<4>());
    case 5: return visit(Kind<5>());
    default: return visit(Kind<6>());
  }
}

template <typename T>
void raise_exponentials(const T* u, int64_t n, int power, const T* weights, T* out) {
  with_power(power, [&](auto p) { raise_block<decltype(p)::value>(u, n, weights, out); });
}

// ---- sums ------------------------------------------------------------------------------------------------------

template <typename T>
SideSums side_sums(const T* x, const T* e, int64_t n, T centre, T k, bool second) {
  Vec<T> s0{}, s1{}, s2{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec<T> power = load(e + i), at = raise_to((load(x + i) - centre) * k, T(2) * kExp2Floor<T>);
    s0 += power, s1 += power * at;
    if (second) s2 += power * at * at;
  }
  return {sum<T>(s0), sum<T>(s1), sum<T>(s2)};
}

template <typename T>
double sum_of(const T* e, int64_t n) {
  Vec<T> s{};
  for (int64_t i = 0; i < n; i += kLanes)
    s += load(e + i);
  return sum<T>(s);
}

// y/tau - z/tau in nats. The difference of logits is exact where both sides have the same temperature: exponents of 20
// would bring their own rounding, and that of log2(e)/tau, into what formulas multiply by.
// PLAIN: neither class weights nor logits that are standardised.
template <bool PLAIN, typename T>
EAKD_HD Vec<T> difference_at(const RecipeBlock<T>& block, int64_t i) {
  const Vec<T> y = load(block.y + i) - block.my, z = load(block.z + i) - block.mz;
  if constexpr (PLAIN) return (y - z) * block.nat;
  const Vec<T> step = (y - z) * block.nat + (raise_to(y, T(-1e30)) * block.gap_y - raise_to(z, T(-1e30)) * block.gap_z);
  return block.bias == nullptr ? step : step + T(kLn2) * load(block.bias + i);
}

template <bool PLAIN, typename T>
struct Exponents {
  Vec<T> b, d, unbiased;  // d unclamped: -inf under teacher mass is an infinite divergence

  EAKD_HD Exponents(const RecipeBlock<T>& block, int64_t i)
      : d((load(block.z + i) - block.mz) * block.k_z), unbiased((load(block.y + i) - block.my) * block.k_y) {
    b = PLAIN || block.bias == nullptr ? unbiased : unbiased + load(block.bias + i);
  }
};

template <typename T>
void power_sums(PowerSums& s, const RecipeBlock<T>& block, unsigned mask, int entropies) {
  Vec<T> B0[kMostPower + 1]{}, D0[kMostPower + 1]{}, difference[kMostPower + 1]{}, teacher{}, student{};
  for (int64_t i = 0; i < block.n; i += kLanes) {
    const Vec<T> uy = load(block.eb + i), uz = load(block.ed + i);
    const Vec<T> y = load(block.y + i) - block.my, z = load(block.z + i) - block.mz, step = y - z;
    Vec<T> eb = uy, ed = uz;
#pragma GCC unroll 6
    for (int P = 1; P <= kMostPower; ++P, eb *= uy, ed *= uz) {
      if (mask >> P & 1) B0[P] += eb, D0[P] += ed, difference[P] += times(eb, step);
      if (P == entropies) teacher += times(eb, y), student += times(ed, z);
    }
  }
  for (int P = 1; P <= kMostPower; ++P)
    s.B0[P] = sum<T>(B0[P]), s.D0[P] = sum<T>(D0[P]), s.difference[P] = sum<T>(difference[P]);
  s.teacher = sum<T>(teacher), s.student = sum<T>(student);
}

template <int P, bool FORWARD, bool REVERSE, typename T>
void add_kl_sums(TauSums<double>& s, RecipeBlock<T> block) {
  Vec<T> B0{}, D0{}, Bd{}, Dd{};
  for (int64_t i = 0; i < block.n; i += kLanes) {
    const Vec<T> eb = power<P>(load(block.eb + i)), ed = power<P>(load(block.ed + i));
    B0 += eb, D0 += ed;
    if constexpr (FORWARD || REVERSE) {
      const Vec<T> step = difference_at<false>(block, i);
      if constexpr (FORWARD) Bd += times(eb, step);
      if constexpr (REVERSE) Dd += times(ed, Vec<T>(-step));
    }
  }
  s.B0 += sum<T>(B0), s.D0 += sum<T>(D0);
  if constexpr (FORWARD) s.Bd += kLog2E * sum<T>(Bd);
  if constexpr (REVERSE) s.Dd += kLog2E * sum<T>(Dd);
}

template <typename T>
double reverse_sum(const T* y, const T* z, const T* ed, int64_t n, T my, T mz) {
  Vec<T> total{};
  for (int64_t i = 0; i < n; i += kLanes)
    total += times(load(ed + i), Vec<T>((load(z + i) - mz) - (load(y + i) - my)));
  return sum<T>(total);
}

template <typename T>
void kl_sums(TauSums<double>& s, const RecipeBlock<T>& block, bool forward, bool reverse) {
  with_power(block.power, [&](auto p) {
    constexpr int P = decltype(p)::value;
    const auto add = forward ? (reverse ? add_kl_sums<P, true, true, T> : add_kl_sums<P, true, false, T>)
                             : (reverse ? add_kl_sums<P, false, true, T> : add_kl_sums<P, false, false, T>);
    add(s, block);
  });
}

// ---- values and gradients ----------------------------------------------------------------------------------------

template <bool PLAIN, typename T>
EAKD_HD Column<Vec<T>> column_at(const RecipeBlock<T>& block, const Normalisers<T>& by, const Exponents<PLAIN, T>& at,
                                 int64_t i) {
  Column<Vec<T>> c;
  c.p = load(block.eb + i) * by.inverse_B0, c.q = load(block.ed + i) * by.inverse_D0;
  c.log2_p = at.b - by.log2_B0, c.log2_q = at.d - by.log2_D0;
  c.delta = difference_at<PLAIN>(block, i) + by.ln_ratio;
  return c;
}

template <int KIND, bool PLAIN, bool PULLS, typename T>
void add_values(TauSums<double>& s, RecipeBlock<T> block, Normalisers<T> by, T first, T second, T of_degree,
                T* keep_h) {
  Vec<T> f{}, h{}, hd{}, fb{}, pb{}, qd{};
  for (int64_t i = 0; i < block.n; i += kLanes) {
    const Exponents<PLAIN, T> at(block, i);
    const Column<Vec<T>> c = column_at(block, by, at, i);
    const Terms<Vec<T>> t = terms<KIND, VectorMath<T>>(c, first, second);
    f += t.f, h += t.h;
    if (keep_h != nullptr) store(keep_h + i, t.h);
    if constexpr (PULLS) {
      // A masked logit does not move, whatever hangs on it.
      hd += at.d == -T(INFINITY) ? Vec<T>{} : t.h * at.d;
      fb += at.unbiased == -T(INFINITY) ? Vec<T>{} : (of_degree * t.f - t.h) * at.unbiased;
      pb += times(c.p, at.unbiased), qd += times(c.q, at.d);
    }
  }
  s.f += sum<T>(f), s.h += sum<T>(h);
  if constexpr (PULLS) s.hd += sum<T>(hd), s.fb += sum<T>(fb), s.pb += sum<T>(pb), s.qd += sum<T>(qd);
}

// visit(Kind<KIND>()), with the usual case of AlphaBeta apart: no loop asks for the powers in every turn.
template <typename Visit>
void with_loop_of(const Recipe& recipe, const Visit& visit) {
  const double a = recipe.first, b = recipe.second;
  if (recipe.divergence == kAlphaBeta && a > 0 && b > 0 && a + b >= 0.5 && a + b <= 2)
    visit(Kind<kUsualAlphaBeta>());
  else
    with_kind(recipe.divergence, visit);
}

template <typename T>
void values(TauSums<double>& s, const RecipeBlock<T>& block, const Normalisers<T>& by, const Recipe& recipe, bool pulls,
            T* keep_h) {
  const T first = T(recipe.first_of_columns()), second = T(recipe.second_of_columns());
  const T of_degree = T(degree(recipe.divergence, recipe.first, recipe.second));
  with_loop_of(recipe, [&](auto kind) {
    constexpr int KIND = decltype(kind)::value;
    const auto add = pulls              ? add_values<KIND, false, true, T>
                     : block.is_plain() ? add_values<KIND, true, false, T>
                                        : add_values<KIND, false, false, T>;
    add(s, block, by, first, second, of_degree, keep_h);
  });
}

// value(i): what goes into the gradient of the columns from i on.
template <typename T, typename Value>
void add_columns(T* g, int64_t n, Write write, const Value& value) {
  if (write == Write::kStream) {
    for (int64_t i = 0; i < n; i += kLanes)
      stream(g + i, value(i));
    stream_fence();
  } else if (write == Write::kSet) {
    for (int64_t i = 0; i < n; i += kLanes)
      store(g + i, value(i));
  } else {
    for (int64_t i = 0; i < n; i += kLanes)
      store(g + i, load(g + i) + value(i));
  }
}

// forward and reverse: of KL(p || q) and KL(q || p).
template <bool PLAIN, bool FORWARD, typename T>
void add_kl_gradient(T* g, const RecipeBlock<T>& block, const Normalisers<T>& by, T forward, T reverse, T q,
                     Write write) {
  add_columns(g, block.n, write, [=](int64_t i) {
    const Column<Vec<T>> column = column_at(block, by, Exponents<PLAIN, T>(block, i), i);
    // q_j's two factors together, because they nearly cancel
    const Vec<T> of_q = times(column.q, Vec<T>(reverse * (T(1) - column.delta) + q));
    return FORWARD ? of_q - forward * column.p : of_q;
  });
}

template <typename T>
void add_gradient(T* g, const RecipeBlock<T>& block, const Normalisers<T>& by, const Recipe& recipe, T c, T q,
                  const T* kept_h, Write write) {
  const T a = T(recipe.first_of_columns()), b = T(recipe.second_of_columns()), by_D0 = q * by.inverse_D0;
  if (c == 0 || (recipe.is_kl() && b == 0)) {  // h = -p, that of KL(p || q)
    const T p = c == 0 ? T(0) : -c * a * by.inverse_B0;
    return with_power(block.power, [&](auto power_of) {
      constexpr int P = decltype(power_of)::value;
      add_columns(g, block.n, write,
                  [=](int64_t i) { return by_D0 * power<P>(load(block.ed + i)) + p * power<P>(load(block.eb + i)); });
    });
  }
  if (kept_h != nullptr)
    return add_columns(g, block.n, write, [=](int64_t i) { return c * load(kept_h + i) + by_D0 * load(block.ed + i); });
  if (recipe.is_kl()) {
    const auto add = block.is_plain() ? (a == 0 ? add_kl_gradient<true, false, T> : add_kl_gradient<true, true, T>)
                                      : add_kl_gradient<false, true, T>;
    return add(g, block, by, c * a, c * b, q, write);
  }
  with_loop_of(recipe, [&](auto kind) {
    add_columns(g, block.n, write, [=](int64_t i) {
      const Column<Vec<T>> column = column_at(block, by, Exponents<false, T>(block, i), i);
      const Vec<T> h = terms<decltype(kind)::value, VectorMath<T>>(column, a, b).h;
      return c * h + q * column.q;
    });
  });
}

template <typename T>
void add_alpha_beta_gradient(T* g, const RecipeBlock<T>& block, const AlphaBetaTerms<T>& by, T c, T q, Write write) {
  add_columns(g, block.n, write,
              [=](int64_t i) { return c * AlphaBetaColumns<T, 1>(block, by, i).pull[0] + q * load(block.ed + i); });
}

template <typename T>
void add_power_gradient(T* g, const RecipeBlock<T>& block, const PowerFactors<T>& by, Write write) {
  add_columns(g, block.n, write, [=](int64_t i) {
    const Vec<T> uy = load(block.eb + i), uz = load(block.ed + i);
    Vec<T> p = splat(by.p[kMostPower]), q = splat(by.q[kMostPower]);
#pragma GCC unroll 6
    for (int P = kMostPower - 1; P >= 1; --P)
      p = p * uy + by.p[P], q = q * uz + by.q[P];
    return q * uz + p * uy;
  });
}

template <typename T>
void finish_gradient(T* g, const T* z, int64_t n, const OwnGradient<T>& own) {
  const RecipeBasis<T>& c = own.basis;
  if (own.keeps()) return;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec<T> x = load(z + i), step = x - own.mz;
    const auto masked = x == -T(INFINITY);
    Vec<T> value = load(g + i);
    if (c.inverse != 1 || c.linear != 0)
      value = masked ? Vec<T>{} : c.inverse * (value - c.constant) - c.linear * (step - c.mean);
    if (c.entropy != 0) {
      const Vec<T> e = raise_to(step * own.k_t, kExp2Floor<T>);
      value += c.entropy * exp2_from_floor(e) * (T(kLn2) * e + c.entropy_shift);
    }
    if (c.hard != 0) value += c.hard * exp2_any<T>(step * T(kLog2E));
    value *= own.scale;
    if (own.cap != 0) {
      const Vec<T> share = x / own.cap;
      value = masked ? Vec<T>{} : value * (T(1) - share * share);
    }
    store(g + i, value);
  }
}

template <typename T>
void fused_sums(RowState<double>& s, const T* y, const T* z, int64_t n, const Temperatures<double>& k, bool cross,
                T* eb, T* ed, const RowJob& job, const RowPair& row, int64_t next) {
  sum_block_for<T>(k)(s, y, z, n, k, cross, eb, ed, Ahead(job, row, next));
}

template <typename T>
void store_recipe_columns(const LogitsView& v, char* row, int64_t column, int64_t n, const T* from, bool past_caches) {
  store_block(v, row, column, n, from, past_caches);
  if (past_caches) stream_fence();
}

template <typename T>
constexpr RecipeKernels<T> recipe_kernels = {kBlock,
                                             load_recipe_columns<T>,
                                             block_moments<T>,
                                             largest<T>,
                                             exponentials<T>,
                                             raise_exponentials<T>,
                                             side_sums<T>,
                                             sum_of<T>,
                                             fused_sums<T>,
                                             power_sums<T>,
                                             kl_sums<T>,
                                             values<T>,
                                             alpha_beta_values<T>,
                                             reverse_sum<T>,
                                             add_gradient<T>,
                                             add_alpha_beta_gradient<T>,
                                             add_power_gradient<T>,
                                             finish_gradient<T>,
                                             store_recipe_columns<T>};

}  // namespace
}  // namespace eakd
