// Which kernel runs, and in what shape. Plain C++: a plan can be asked for where there is no GPU.
#pragma once

#include <cstdint>
#include <string>

namespace eakd {
namespace cuda {

enum class Operation { kRowStatistics, kRowGradient, kOnePass, kScaleGradient };

// small      several rows a warp, in registers             small_rows.cuh
// resident   a CTA or a cluster a row, in registers        resident_rows.cuh
// ring       a CTA or a cluster a row, in shared memory    ring_rows.cuh
// stream     a CTA or a cluster a row, from memory         stream_rows.cuh
// gradient   a warp a stretch of a row                     row_gradient.cuh
// recipe     a CTA or a cluster a row                      recipe_rows.cuh
enum class Kernel { kSmall, kResident, kRing, kStream, kGradient, kRecipe };
const char* name_of(Kernel kernel);

struct Device {
  int capability = 90;  // 10 major + minor
  int processors = 132;
  int64_t shared_bytes = 232448;  // a block may have
  int64_t l2_bytes = 50 << 20;
  int largest_cluster = 8;
};

struct Problem {
  Operation operation = Operation::kOnePass;
  int student_bytes = 2, teacher_bytes = 2;  // of a logit
  int64_t rows = 0;
  int vocab_size = 0, gradient_columns = 0;
  bool alike = true;           // rows of both logits begin alike within a vector
  bool gradient_alike = true;  // and so do those of the gradient
  bool whole = true;           // all of them begin with a whole vector and end with one
  bool slopes = false;
  bool recipe = false;  // more than KL(p || q) at one temperature

  // Columns a vector of 16 bytes of the wider logits has.
  int vector() const { return 16 / (student_bytes > teacher_bytes ? student_bytes : teacher_bytes); }
};

struct Plan {
  Kernel kernel = Kernel::kStream;
  int width = 1;  // columns a load
  int cluster = 1, threads = 0;
  int lanes = 0;              // small: threads a row
  int stages = 0, slice = 0;  // ring: of so many vectors; recipe: vectors that a thread keeps
  int64_t shared_bytes = 0, blocks = 0;
};

// `wanted`: "" or a kernel's name, with ":" and a cluster's size behind it if that matters, "resident:8". Throws
// std::invalid_argument where that kernel cannot take the problem. Recipes have a kernel of their own, and go their
// usual way where it cannot keep rows as "resident" and "ring" do, or read them again as "stream" does.
Plan make_plan(const Problem& problem, const Device& device, const std::string& wanted);

}  // namespace cuda
}  // namespace eakd
