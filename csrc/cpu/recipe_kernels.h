// What recipe_rows.h asks of the kernels of one instruction set (recipe_kernels_impl.h): loops over a block of columns
// that lie as the arithmetic type T in the first-level cache, padded with -inf to whole vectors.
#pragma once

#include "../recipe_result.h"
#include "row_kernels.h"

namespace eakd {
namespace {

// S 2^e, S e 2^e, S e^2 2^e of one side.
struct SideSums {
  double sum = 0, first = 0, second = 0;
};

// A block of both sides at one temperature.
template <typename T>
struct RecipeBlock {
  const T *y, *z;    // logits
  const T *eb, *ed;  // 2^b, 2^d, or what they are the `power`-th powers of; null: not asked for
  const T* bias;     // log2 of the class weights; null: none
  int64_t n;         // whole vectors
  T my, mz;          // centres
  T k_y, k_z;        // log2(e)/tau of the sides
  T nat;             // the smaller 1/tau of the sides', and
  T gap_y, gap_z;    // what the other's has more: 0, or logits are standardised
  int power;         // 1 for all but kl_sums and a gradient without formula

  bool is_plain() const { return bias == nullptr && gap_y == 0 && gap_z == 0; }
};

// The normalisers of a row at one temperature.
template <typename T>
struct Normalisers {
  T inverse_B0, inverse_D0;      // 0 where there is no mass
  T log2_B0, log2_D0, ln_ratio;  // ln(D0/B0)
};

// Temperatures that are powers 1 to 6 of one base, in one loop: what is summed, and the gradient's factors.
constexpr int kMostPower = 6;
struct PowerSums {
  double B0[kMostPower + 1], D0[kMostPower + 1], difference[kMostPower + 1];  // S 2^b, S 2^d, S 2^b (y - z)
  double teacher, student;  // S 2^b y, S 2^d z at the entropies' power
};
template <typename T>
struct PowerFactors {
  T p[kMostPower + 1], q[kMostPower + 1];
};

// What finish_gradient makes of the gradient in u; recipe_result.h, RecipeBasis.
template <typename T>
struct OwnGradient {
  RecipeBasis<T> basis;
  T mz, k_t;     // of the entropy's exponents and of the hard ones
  T scale, cap;  // of the student's logits; cap 0: none

  // Whether that is the gradient in u itself, but for the label's column.
  bool keeps() const {
    return basis.inverse == 1 && basis.linear == 0 && basis.entropy == 0 && basis.hard == 0 && scale == 1 && cap == 0;
  }
};

// How the gradient's columns are written: added to what is there, over it, or past the caches.
enum class Write { kAdd, kSet, kStream };

template <typename T>
struct RecipeKernels {
  int64_t block;  // columns that a lane may add up in T
  // Scaled and capped columns of a row from `column` on, padded to the instruction set's vectors; returns their
  // maximum.
  T (*load)(const LogitsView&, const char* row, int64_t column, int64_t n, T scale, T cap, T* to);
  Moments<double> (*moments)(const T* x, int64_t n);
  T (*largest)(const T* x, int64_t n);
  // 2^((x - centre) k)
  void (*exponentials)(const T* x, int64_t n, T centre, T k, T* out);
  // u^power, times the class weights if there are any
  void (*raise)(const T* u, int64_t n, int power, const T* weights, T* out);
  // e: 2^((x - centre) k)
  SideSums (*side_sums)(const T* x, const T* e, int64_t n, T centre, T k, bool second);
  double (*sum)(const T* e, int64_t n);
  // Sums of one temperature and t in one loop, about the state's maxima, Bd if `cross`; 2^b and 2^d into eb and ed,
  // or, null, nowhere. Columns from `next` on come into the cache meanwhile.
  void (*fused_sums)(RowState<double>&, const T* y, const T* z, int64_t n, const Temperatures<double>&, bool cross,
                     T* eb, T* ed, const RowJob&, const RowPair&, int64_t next);
  // Of the powers in `mask` of the block's eb and ed. entropies: one of them, or 0.
  void (*power_sums)(PowerSums&, const RecipeBlock<T>&, unsigned mask, int entropies);
  void (*kl_sums)(TauSums<double>&, const RecipeBlock<T>&, bool forward, bool reverse);
  // keep_h: [n], where h is to stay; null: nowhere
  void (*values)(TauSums<double>&, const RecipeBlock<T>&, const Normalisers<T>&, const Recipe&, bool pulls, T* keep_h);
  // As `values`, of logits alone; keeps h up to the terms' factor.
  void (*alpha_beta_values)(TauSums<double>&, RecipeBlock<T>, AlphaBetaTerms<T>, T* keep);
  // S 2^d (z - y), both about their centres
  double (*reverse_sum)(const T* y, const T* z, const T* ed, int64_t n, T my, T mz);
  // g += c h_j + q q_j; kept_h: where `values` left h, or null
  void (*add_gradient)(T* g, const RecipeBlock<T>&, const Normalisers<T>&, const Recipe&, T c, T q, const T* kept_h,
                       Write write);
  // g += c pull_j + q ed_j
  void (*add_alpha_beta_gradient)(T* g, const RecipeBlock<T>&, const AlphaBetaTerms<T>&, T c, T q, Write write);
  // g += S over powers of p eb^P + q ed^P
  void (*add_power_gradient)(T* g, const RecipeBlock<T>&, const PowerFactors<T>&, Write write);
  void (*finish_gradient)(T* g, const T* z, int64_t n, const OwnGradient<T>&);
  void (*store)(const LogitsView&, char* row, int64_t column, int64_t n, const T* from, bool past_caches);
};

}  // namespace
}  // namespace eakd
