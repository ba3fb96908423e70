// The loops of recipes (recipe_kernels.h) for the instruction set of the including file.
#pragma once

#include "blocks.h"
#include "recipe_kernels.h"

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
  for (int64_t i = 0; i < n; i += kLanes)
    store(out + i, exp2_any<T>((load(x + i) - centre) * k));
}

template <int P, typename T>
void raise_block(const T* u, int64_t n, const T* weights, T* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec<T> e = power<P>(load(u + i));
    store(out + i, weights == nullptr ? e : e * load(weights + i));
  }
}

template <typename T>
void raise_exponentials(const T* u, int64_t n, int power, const T* weights, T* out) {
  switch (power) {
    case 1: return raise_block<1>(u, n, weights, out);
    case 2: return raise_block<2>(u, n, weights, out);
    case 3: return raise_block<3>(u, n, weights, out);
    case 4: return raise_block<4>(u, n, weights, out);
    case 5: return raise_block<5>(u, n, weights, out);
    default: return raise_block<6>(u, n, weights, out);
  }
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

template <typename T>
struct Exponents {
  Vec<T> b, d, unbiased;  // d unclamped: -inf under teacher mass is an infinite divergence

  Exponents(const RecipeBlock<T>& block, int64_t i)
      : d((load(block.z + i) - block.mz) * block.k_z), unbiased((load(block.y + i) - block.my) * block.k_y) {
    b = block.bias == nullptr ? unbiased : unbiased + load(block.bias + i);
  }
};

template <typename T>
void kl_sums(TauSums<double>& s, const RecipeBlock<T>& block, bool forward, bool reverse) {
  Vec<T> B0{}, D0{}, Bd{}, Dd{};
  for (int64_t i = 0; i < block.n; i += kLanes) {
    const Vec<T> eb = load(block.eb + i), ed = load(block.ed + i);
    const Exponents<T> at(block, i);
    const Vec<T> step = at.b - at.d;
    B0 += eb, D0 += ed;
    if (forward) Bd += times(eb, step);
    if (reverse) Dd += times(ed, -step);
  }
  s.B0 += sum<T>(B0), s.D0 += sum<T>(D0), s.Bd += sum<T>(Bd), s.Dd += sum<T>(Dd);
}

// ---- values and gradients ----------------------------------------------------------------------------------------

template <typename T>
Column<Vec<T>> column_at(const RecipeBlock<T>& block, const Normalisers<T>& by, const Exponents<T>& at, int64_t i) {
  Column<Vec<T>> c;
  c.p = load(block.eb + i) * by.inverse_B0, c.q = load(block.ed + i) * by.inverse_D0;
  c.log2_p = at.b - by.log2_B0, c.log2_q = at.d - by.log2_D0;
  c.delta = T(kLn2) * ((at.b - at.d) + (by.log2_D0 - by.log2_B0));
  return c;
}

template <typename T>
auto without_mass(const RecipeBlock<T>& block, int64_t i) {
  return (load(block.y + i) == -T(INFINITY)) & (load(block.z + i) == -T(INFINITY));
}

template <int KIND, bool PULLS, typename T>
void add_values(TauSums<double>& s, const RecipeBlock<T>& block, const Normalisers<T>& by, T first, T second,
                T of_degree) {
  Vec<T> f{}, h{}, hd{}, fb{}, pb{}, qd{};
  for (int64_t i = 0; i < block.n; i += kLanes) {
    const Exponents<T> at(block, i);
    const Column<Vec<T>> c = column_at(block, by, at, i);
    Terms<Vec<T>> t = terms<KIND, VectorMath<T>>(c, first, second);
    const auto nothing = without_mass(block, i);
    t.f = nothing ? Vec<T>{} : t.f, t.h = nothing ? Vec<T>{} : t.h;
    f += t.f, h += t.h;
    if constexpr (PULLS) {
      hd += times(t.h, at.d), fb += times(Vec<T>(of_degree * t.f - t.h), at.unbiased);
      pb += times(c.p, at.unbiased), qd += times(c.q, at.d);
    }
  }
  s.f += sum<T>(f), s.h += sum<T>(h);
  if constexpr (PULLS) s.hd += sum<T>(hd), s.fb += sum<T>(fb), s.pb += sum<T>(pb), s.qd += sum<T>(qd);
}

template <typename T>
void values(TauSums<double>& s, const RecipeBlock<T>& block, const Normalisers<T>& by, const Recipe& recipe,
            bool pulls) {
  const T first = T(recipe.first_of_columns()), second = T(recipe.second_of_columns());
  const T of_degree = T(degree(recipe.divergence, recipe.first, recipe.second));
  with_kind(recipe.divergence, [&](auto kind) {
    if (pulls)
      add_values<decltype(kind)::value, true>(s, block, by, first, second, of_degree);
    else
      add_values<decltype(kind)::value, false>(s, block, by, first, second, of_degree);
  });
}

// c h + q q_j, h = -p: what KL(p || q) has, and no logarithm in it.
template <typename T>
void add_linear_gradient(T* g, const RecipeBlock<T>& block, T p, T q) {
  for (int64_t i = 0; i < block.n; i += kLanes)
    store(g + i, load(g + i) + (q * load(block.ed + i) + p * load(block.eb + i)));
}

template <int KIND, typename T>
void add_formula_gradient(T* g, const RecipeBlock<T>& block, const Normalisers<T>& by, T first, T second, T c, T q) {
  for (int64_t i = 0; i < block.n; i += kLanes) {
    const Column<Vec<T>> column = column_at(block, by, Exponents<T>(block, i), i);
    const Vec<T> h = terms<KIND, VectorMath<T>>(column, first, second).h;
    store(g + i, load(g + i) + (without_mass(block, i) ? Vec<T>{} : c * h + q * column.q));
  }
}

template <typename T>
void add_gradient(T* g, const RecipeBlock<T>& block, const Normalisers<T>& by, const Recipe& recipe, T c, T q) {
  const T first = T(recipe.first_of_columns()), second = T(recipe.second_of_columns());
  if (c == 0 || (recipe.is_kl() && second == 0))
    return add_linear_gradient(g, block, c == 0 ? T(0) : -c * first * by.inverse_B0, q * by.inverse_D0);
  with_kind(recipe.divergence, [&](auto kind) {
    add_formula_gradient<decltype(kind)::value>(g, block, by, first, second, c, q);
  });
}

template <typename T>
void finish_gradient(T* g, const T* z, int64_t n, const OwnGradient<T>& own) {
  const RecipeBasis<T>& c = own.basis;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec<T> x = load(z + i), step = x - own.mz;
    const auto masked = x == -T(INFINITY);
    Vec<T> value = load(g + i);
    if (c.inverse != 1 || c.linear != 0)
      value = masked ? Vec<T>{} : c.inverse * (value - c.constant) - c.linear * (x - c.mean);
    if (c.entropy != 0) {
      const Vec<T> e = raise_to(step * own.k_t, kExp2Floor<T>);
      value += c.entropy * exp2_from_floor(e) * (T(kLn2) * e + c.entropy_shift);
    }
    if (c.hard != 0) value += c.hard * exp2_any<T>(step * T(kLog2E));
    value *= own.scale;
    if (own.cap != 0) {
      const Vec<T> share = x / own.cap;
      value = masked ? value : value * (T(1) - share * share);
    }
    store(g + i, value);
  }
}

template <typename T>
void store_recipe_columns(const LogitsView& v, char* row, int64_t column, int64_t n, const T* from) {
  store_block(v, row, column, n, from, false);
}

template <typename T>
constexpr RecipeKernels<T> recipe_kernels = {load_recipe_columns<T>, block_moments<T>, exponentials<T>,
                                             raise_exponentials<T>,  side_sums<T>,     sum_of<T>,
                                             kl_sums<T>,             values<T>,        add_gradient<T>,
                                             finish_gradient<T>,     store_recipe_columns<T>};

}  // namespace
}  // namespace eakd
