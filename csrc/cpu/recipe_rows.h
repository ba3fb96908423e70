// Rows with a recipe (../recipe.h): a thread goes over a row pair block by block, once for each sweep. The sums are
// taken as the blocks come in, about the maxima so far, unless logits are standardised.
#pragma once

#include "recipe_columns.h"

namespace eakd {
namespace {

// One thread's row.
template <typename T>
class RecipeRow {
 public:
  explicit RecipeRow(const RecipeJob& job) : job_(job), recipe_(job.recipe), row_(job), kernels_(row_.kernels) {}

  void open(int64_t row) {
    row_.open(row);
    sums_ = RecipeSums<double>();
    loaded_ = false;
  }

  RecipeNumbers<double> statistics() {
    const bool values = recipe_.wants_values(job_.pulls());
    // Pulls are moments about one centre, and standardised logits need their deviation.
    if (job_.pulls()) load();
    sum_up(values);
    if (values) add_values();
    const LabelColumn<double> label = row_.label();
    const bool has_label = job_.rows.labels != nullptr;
    if (recipe_.decoupled()) add_label_to_sides();
    RecipeNumbers<double> numbers = recipe_numbers(recipe_, row_.taus, job_.t, row_.scales[kTeacher],
                                                   row_.scales[kStudent], sums_, has_label ? &label : nullptr, values);
    numbers.common[kStudentMean] -= about(sums_.Mz);
    return numbers;
  }

  // The gradient of a row from its numbers, wherever they come from.
  void write_gradient(const double* common, const double (*tau)[kNumTauFields], const RowUpstream<double>& upstream) {
    if (!loaded_) load();
    sums_.rest_My = common[kRestTeacherMax], sums_.rest_Mz = common[kRestStudentMax];
    row_.fill_empty_centres(sums_.rest_My, sums_.rest_Mz);  // a shard of -inf, in a row that is not
    TauBasis<double> bases[kMostTemperatures];
    double at_label = 0;
    for (int k = 0; k < recipe_.count; ++k) {
      bases[k] = tau_basis(recipe_, k, row_.taus[k], tau[k], odds(k, tau[k]), upstream);
      at_label += bases[k].label;
    }
    const OwnGradient<double> own = {recipe_basis(recipe_, common, tau, row_.taus, job_.t, upstream),
                                     about(common[kRecipeStudentMax]), row_.scales[kStudent].t, recipe_.student_scale,
                                     recipe_.student_cap};
    for (int64_t begin = (row_.count - 1) / kernels_.block * kernels_.block; begin >= 0; begin -= kernels_.block)
      write_block(begin, bases, tau, own, at_label);
  }

 private:
  // Reads the whole row; the sweeps that follow know its maxima, mean and deviation.
  void load() {
    row_.each_block([&](int64_t begin, int64_t) { load_block(begin); });
    row_.each_block([&](int64_t begin, int64_t) { row_.set_centres(begin, sums_.rest_My, sums_.rest_Mz); });
    row_.set_scales(sums_.teacher.deviation(), sums_.student.deviation());
    loaded_ = true;
  }

  void load_block(int64_t begin) {
    const auto teacher = row_.load(kTeacher, begin, sums_.teacher), student = row_.load(kStudent, begin, sums_.student);
    sums_.My = std::max<double>(sums_.My, teacher.all), sums_.Mz = std::max<double>(sums_.Mz, student.all);
    sums_.recentre(std::max<double>(sums_.rest_My, teacher.rest), std::max<double>(sums_.rest_Mz, student.rest),
                   recipe_.count, row_.scales[kTeacher], row_.scales[kStudent]);
  }

  // ---- sums ------------------------------------------------------------------------------------------------------

  void sum_up(bool values) {
    const bool kl = recipe_.is_kl() && !values;  // whose values are sums of this sweep
    const bool forward = kl && recipe_.first_of_columns() != 0, reverse = kl && recipe_.second_of_columns() != 0;
    const bool own_hard = job_.rows.labels != nullptr && (job_.t != 1 || recipe_.standardize == kStandardizeAll);
    row_.each_block([&](int64_t begin, int64_t n) {
      if (!loaded_) load_block(begin), row_.set_centres(begin, sums_.rest_My, sums_.rest_Mz);
      if (row_.fuses())
        add_fused_sums(begin, n, forward, reverse);
      else
        add_sums(begin, n, forward, reverse);
      if (own_hard) {
        T* hard = row_.scratch[row_.kGradient];
        kernels_.exponentials(row_.x[kStudent] + begin, n, row_.centre(kStudent, begin), T(kLog2E), hard);
        sums_.F0 += kernels_.sum(hard, n);
      }
    });
    if (job_.rows.labels != nullptr && !own_hard) sums_.F0 = sums_.E0;
    row_.fill_empty_centres(sums_.rest_My, sums_.rest_Mz);
    row_.set_filled(), loaded_ = true;
  }

  SideSums entropy_sums(Side side, int64_t begin, int64_t n, bool second) {
    return kernels_.side_sums(row_.x[side] + begin, row_.exponentials(side, recipe_.count, begin, n), n,
                              row_.centre(side, begin), T(row_.scales[side].t), second);
  }

  void add_entropy_sums(int64_t begin, int64_t n) {
    // One after the other: both sides may use the same scratch.
    const SideSums a = entropy_sums(kTeacher, begin, n, false);
    const SideSums e = entropy_sums(kStudent, begin, n, recipe_.standardize == kStandardizeAll);
    sums_.A0 += a.sum, sums_.A1 += a.first, sums_.E0 += e.sum, sums_.E1 += e.first, sums_.E2 += e.second;
  }

  void add_sums(int64_t begin, int64_t n, bool forward, bool reverse) {
    if (row_.shares_loops()) return add_power_sums(begin, n);
    add_entropy_sums(begin, n);
    for (int k = 0; k < recipe_.count; ++k)
      kernels_.kl_sums(sums_.tau[k], row_.block_at(k, begin, n, false), forward, reverse);
  }

  // The loop's cross term is S (b - d) 2^b. KL(q || p) alone has it with the sides exchanged.
  void add_fused_sums(int64_t begin, int64_t n, bool forward, bool reverse) {
    const bool exchanged = reverse && !forward;
    const Side one = exchanged ? kStudent : kTeacher, other = exchanged ? kTeacher : kStudent;
    RowState<double> s;
    s.My = row_.centre(one, begin), s.Mz = row_.centre(other, begin);
    const T *const y = row_.x[one] + begin, *const z = row_.x[other] + begin;
    T* const keep = row_.reads_again(one) ? row_.base_room(one, 0, begin) : nullptr;
    T* const e = row_.base_room(other, 0, begin);  // reverse_sum reads it at once
    const Temperatures<double> k(row_.taus[0], job_.t);
    kernels_.fused_sums(s, y, z, n, k, forward || reverse, keep, e, job_.rows, *row_.pair, begin + kernels_.block);
    TauSums<double>& sums = sums_.tau[0];
    (exchanged ? sums.Dd : sums.Bd) += s.Bd;
    if (exchanged) std::swap(s.A0, s.E0), std::swap(s.A1, s.E1), std::swap(s.B0, s.D0);
    sums.B0 += s.B0, sums.D0 += s.D0;
    sums_.A0 += s.A0, sums_.A1 += s.A1, sums_.E0 += s.E0, sums_.E1 += s.E1;
    if (forward && reverse) sums.Dd += kernels_.reverse_sum(y, z, e, n, T(s.My), T(s.Mz)) * (kLog2E / row_.taus[0]);
  }

  // visit(block, the temperatures of one base, how many, the base), for every base that has some.
  template <typename Visit>
  void each_base(int64_t begin, int64_t n, const Visit& visit) {
    for (int base = 0; base < row_.bases.count; ++base) {
      int of_base[kMostTemperatures], count = 0;
      for (int k = 0; k < recipe_.count; ++k)
        if (row_.bases.of[k] == base) of_base[count++] = k;
      if (count > 0) visit(row_.block_at(of_base[0], begin, n, false), of_base, count, base);
    }
  }

  // The entropies' sums come along where a temperature has their base.
  void add_power_sums(int64_t begin, int64_t n) {
    const double k_t = row_.scales[kTeacher].t;
    bool entropies = false;
    each_base(begin, n, [&](const RecipeBlock<T>& block, const int* of_base, int count, int base) {
      const int Q = row_.bases.of[recipe_.count] == base ? row_.bases.power[recipe_.count] : 0;
      unsigned mask = Q == 0 ? 0 : 1u << Q;
      for (int i = 0; i < count; ++i)
        mask |= 1u << row_.bases.power[of_base[i]];
      PowerSums s;
      kernels_.power_sums(s, block, mask, Q);
      for (int i = 0; i < count; ++i) {
        TauSums<double>& sums = sums_.tau[of_base[i]];
        const int P = row_.bases.power[of_base[i]];
        sums.B0 += s.B0[P], sums.D0 += s.D0[P];
        sums.Bd += s.difference[P] * (kLog2E / row_.taus[of_base[i]]);
      }
      if (Q == 0) return;
      entropies = true;
      sums_.A0 += s.B0[Q], sums_.A1 += s.teacher * k_t, sums_.E0 += s.D0[Q], sums_.E1 += s.student * k_t;
    });
    if (!entropies) add_entropy_sums(begin, n);
  }

  const Normalisers<T>& normalisers(int k, int64_t begin, double B0, double D0) {
    return row_.normalisers(k, begin, B0, D0, sums_.rest_My, sums_.rest_Mz);
  }

  void add_values() {
    for (int k = 0; k < recipe_.count; ++k) {
      TauSums<double>& s = sums_.tau[k];
      // As the statistics tensor has them: S h and the gradient's h_j, made from those, have to cancel. S h of KL(p ||
      // q) is -1 by itself, so its value may have all digits.
      const bool exact = recipe_.is_linear();
      const double B0 = exact ? s.B0 : T(s.B0), D0 = exact ? s.D0 : T(s.D0);
      if (row_.takes_terms())
        add_alpha_beta_values(k, row_.alpha_beta_terms(k, B0, D0));
      else
        row_.each_block([&](int64_t begin, int64_t n) {
          kernels_.values(s, row_.block_at(k, begin, n, true), normalisers(k, begin, B0, D0), recipe_, job_.pulls(),
                          row_.room_for_h(k, begin));
        });
    }
    row_.set_kept_h();
  }

  void add_alpha_beta_values(int k, const AlphaBetaTerms<T>& terms) {
    row_.each_block([&](int64_t begin, int64_t n) {
      kernels_.alpha_beta_values(sums_.tau[k], block_about_maxima(k, begin, n), terms, row_.room_for_h(k, begin));
    });
  }

  RecipeBlock<T> block_about_maxima(int k, int64_t begin, int64_t n) const {
    return row_.block_about(sums_.rest_My, sums_.rest_Mz, k, begin, n);
  }

  void add_label_to_sides() {
    const LabelColumn<double> c = row_.label();
    add_column(sums_.rest_My, c.teacher, row_.scales[kTeacher].t, &sums_.A0, &sums_.A1);
    add_column(sums_.rest_Mz, c.student, row_.scales[kStudent].t, &sums_.E0, &sums_.E1, &sums_.E2, &sums_.F0);
  }

  // ---- gradient --------------------------------------------------------------------------------------------------

  LabelOdds<double> odds(int k, const double* numbers) const {
    if (!recipe_.decoupled()) return {};
    const LabelColumn<double> c = row_.label();
    const double b = (c.teacher - about(sums_.rest_My)) * row_.scales[kTeacher].tau[k] + c.bias * kLog2E;
    const double d = (c.student - about(sums_.rest_Mz)) * row_.scales[kStudent].tau[k];
    return label_odds(b, d, numbers[kRestTeacherSum], numbers[kRestStudentSum]);
  }

  void add_power_gradients(int64_t begin, int64_t n, const TauBasis<double>* bases, const double (*tau)[kNumTauFields],
                           T* g, Write* write) {
    each_base(begin, n, [&](const RecipeBlock<T>& block, const int* of_base, int count, int) {
      PowerFactors<T> by{};
      for (int i = 0; i < count; ++i) {
        const int k = of_base[i], P = row_.bases.power[k];  // the same temperature may be there twice
        const Normalisers<T>& over = normalisers(k, begin, tau[k][kRestTeacherSum], tau[k][kRestStudentSum]);
        by.p[P] -= T(bases[k].c * recipe_.first_of_columns()) * over.inverse_B0;
        by.q[P] += T(bases[k].q) * over.inverse_D0;
      }
      kernels_.add_power_gradient(g, block, by, *write);
      *write = Write::kAdd;
    });
  }

  void add_gradient(int k, int64_t begin, int64_t n, const TauBasis<double>& basis, const double* numbers, T* g,
                    Write write) {
    const double B0 = numbers[kRestTeacherSum], D0 = numbers[kRestStudentSum];
    const Normalisers<T>& by = normalisers(k, begin, B0, D0);
    const T *kept_h = row_.kept_h(k, begin), c = T(basis.c), q = T(basis.q);
    if (!row_.takes_terms())
      return kernels_.add_gradient(g, row_.block_at(k, begin, n, !recipe_.is_linear()), by, recipe_, c, q, kept_h,
                                   write);
    RecipeBlock<T> block = block_about_maxima(k, begin, n);
    block.ed = row_.exponentials(kStudent, k, begin, n);
    const AlphaBetaTerms<T> terms = row_.alpha_beta_terms(k, B0, D0);
    const T of_pull = T(basis.c * terms.h);
    if (kept_h != nullptr && c != 0) return kernels_.add_gradient(g, block, by, recipe_, of_pull, q, kept_h, write);
    kernels_.add_alpha_beta_gradient(g, block, terms, of_pull, q * by.inverse_D0, write);
  }

  void write_block(int64_t begin, const TauBasis<double>* bases, const double (*tau)[kNumTauFields],
                   const OwnGradient<double>& own, double at_label) {
    const int64_t columns = row_.block_columns(begin), n = row_.whole_vectors(columns),
                  label = row_.pair->label - begin;
    const RecipeBasis<double>& c = own.basis;
    const OwnGradient<T> rounded = {
        {T(c.inverse), T(c.constant), T(c.linear), T(c.mean), T(c.entropy), T(c.entropy_shift), T(c.hard), T(c.label)},
        T(own.mz),
        T(own.k_t),
        T(own.scale),
        T(own.cap)};
    const bool here = row_.labelled && label >= 0 && label < columns;
    const bool whole = rounded.keeps() && !(here && (recipe_.decoupled() || c.label != 0));
    T *const place = whole ? row_.place_of_gradient(begin) : nullptr, *const z = row_.x[kStudent] + begin;
    T* const g = place == nullptr ? row_.scratch[row_.kGradient] : place;
    Write write = place != nullptr && job_.rows.gradient_past_caches ? Write::kStream : Write::kSet;
    if (row_.shares_loops()) add_power_gradients(begin, n, bases, tau, g, &write);
    for (int k = 0; k < recipe_.count && !row_.shares_loops(); ++k) {
      if (bases[k].c == 0 && bases[k].q == 0) continue;
      add_gradient(k, begin, n, bases[k], tau[k], g, write);
      write = Write::kAdd;
    }
    if (write != Write::kAdd) std::fill(g, g + n, T(0));
    if (place != nullptr) return;
    const double student = row_.label().student;
    if (here && recipe_.decoupled()) g[label] = T(at_label), z[label] = T(student);
    kernels_.finish_gradient(g, z, n, rounded);
    const bool moves = own.cap == 0 || student != -INFINITY;  // a cap's slope out there is 0
    if (here && own.basis.label != 0 && moves) {
      const double share = own.cap == 0 ? 0 : student / own.cap;
      g[label] += T(own.basis.label * own.scale * (1 - share * share));
    }
    kernels_.store(job_.rows.gradient, row_.pair->gradient, begin, columns, g, job_.rows.gradient_past_caches);
  }

  const RecipeJob& job_;
  const Recipe& recipe_;
  RecipeColumns<T> row_;
  const RecipeKernels<T>& kernels_;
  RecipeSums<double> sums_;
  bool loaded_ = false;  // the row is where the sweeps read it, with its maxima and scales
};

}  // namespace
}  // namespace eakd
