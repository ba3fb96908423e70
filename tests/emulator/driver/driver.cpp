// The kernels of csrc/cuda without torch, for test_mutations.py: small and mean cases over heap buffers of exactly the
// size that they need, against expected.h.
//   driver GROUP SCHEDULE...     one of groups(), each case under one of these schedules
// Prints a line for each case that fails, and then exits with 1.
#include <cstdlib>
#include <functional>
#include <map>

#include "recipe_trial.h"
#include "trial.h"

namespace driver {
namespace {

// ---- the two kernels around them ---------------------------------------------------------------------------------

void total_of(int count) {
  std::vector<float> values(count);
  double expected = 0;
  for (int i = 0; i < count; ++i)
    values[i] = 1 + i % 7, expected += values[i];
  const auto total = std::make_unique<float>(), denominator = std::make_unique<float>(4);
  require_success(Kernels<float, 3>::total({values.data(), count, 3.f, denominator.get(), total.get()}, 64));
  require_close("total", *total, expected * 3 / 4, 1e-6 * expected);
}

template <typename T>
void scaled(int columns, int offset, float factor, bool in_place) {
  constexpr int kVector = 16 / sizeof(T), kRows = 3;
  Rows<T> given(kRows, columns, offset, columns), out(kRows, columns, offset, columns + kVector, kVector);
  Rows<T>& result = in_place ? given : out;
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < columns; ++i)
      given.set(r, i, static_cast<float>(i % 13 - r));
  RowJob job;
  job.student = job.teacher = given.matrix(), job.gradient = result.matrix();
  job.rows = kRows, job.vocab_size = job.gradient_columns = columns, job.gradient_vectors = true;
  Plan plan;
  plan.blocks = 1, plan.threads = 64;
  const auto by = std::make_unique<float>(factor);
  require_success(Kernels < T, sizeof(T) == 4 ? 3 : 1 > ::scale(job, plan, by.get(), in_place));
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < columns; ++i)
      require_close("row " + std::to_string(r), result.get(r, i), factor * (i % 13 - r), 0);
  given.require_foreign_untouched("given"), out.require_foreign_untouched("out");
}

// ---- groups ------------------------------------------------------------------------------------------------------

struct NamedCase {
  std::string name;
  std::function<void()> run;
};
using Group = std::vector<NamedCase>;

template <typename T, int P>
void add_trial(Group& group, const Case& c) {
  const std::string name = std::string(kNames[static_cast<int>(c.kernel)]) + (c.two_pass ? ", two passes" : "") + ", " +
                           std::to_string(sizeof(T)) + " bytes, P=" + std::to_string(P) + ", " +
                           std::to_string(c.columns) + " columns from " + std::to_string(c.offset) + ", clusters of " +
                           std::to_string(c.cluster) + " x " + std::to_string(c.threads) + ", " + c.variant.name;
  group.push_back({name, [c] { Trial<T, P>(c).run(); }});
}

struct Shape {
  int cluster, threads;
};

// Every shape of rows with every shape of clusters in every variant.
template <typename T, int P>
void add_trials(Group& group, Kernel kernel, bool two_pass, bool few) {
  constexpr int kVector = 16 / sizeof(T);
  constexpr int kRows = 9;  // so that a cluster has rows enough to fill a ring twice, and one more
  // Of the odd ones, rows follow each other in all alignments.
  std::vector<int> columns = {1, kVector - 1, 48, 131, 601};
  if (few) columns = {kVector - 1, 48, 131};
  std::vector<Shape> shapes = {{1, 32}, {1, 96}, {2, 64}, {4, 32}};
  if (few) shapes = {{1, 96}, {2, 64}};
  if (kernel == Kernel::kSmall) shapes = {{1, 64}};
  for (const int width : columns)
    for (const int offset : {0, 1})
      for (const Shape& shape : shapes)
        for (const Variant& variant : kVariants)
          if (variant.takes(kernel, two_pass) && !(few && offset != width % 2))
            add_trial<T, P>(group, {kernel, two_pass, width, offset, shape.cluster, shape.threads, kRows, variant});
}

void add_all_types(Group& group, Kernel kernel, bool two_pass, bool few) {
  add_trials<float, 3>(group, kernel, two_pass, few);
  add_trials<__nv_bfloat16, 1>(group, kernel, two_pass, few);
  if (!few) add_trials<float, 0>(group, kernel, two_pass, true);
}

void add_long_rows(Group& group) {
  // More than a thread sums up before it merges, and more than one warp takes of a row's gradient.
  for (const bool two_pass : {false, true})
    add_trial<float, 3>(group, {Kernel::kStream, two_pass, 140001, 1, 1, 32, 1, kVariants[1]});
}

void add_around(Group& total, Group& scale) {
  for (const int count : {0, 1, 63, 1000})
    total.push_back({"total of " + std::to_string(count), [=] { total_of(count); }});
  for (const int columns : {1, 37, 2500})
    for (const int offset : {0, 1, 3})
      for (const float factor : {1.f, 2.f})
        for (const bool in_place : {false, true})
          scale.push_back({"scale " + std::to_string(columns) + " from " + std::to_string(offset), [=] {
                             scaled<float>(columns, offset, factor, in_place);
                             scaled<__nv_bfloat16>(columns, offset, factor, in_place);
                           }});
}

template <typename T>
void add_recipe(Group& group, const RecipeCase& c) {
  const std::string name = std::string(c.recipe->name) + (c.two_pass ? ", two passes" : "") +
                           (c.staged ? ", kept, " : ", read again, ") + std::to_string(sizeof(T)) + " bytes, " +
                           std::to_string(c.columns) + " columns from " + std::to_string(c.offset) + ", clusters of " +
                           std::to_string(c.cluster) + " x " + std::to_string(c.threads);
  group.push_back({name, [c] { RecipeTrial<T>(c).run(); }});
}

void add_recipes(Group& group, bool few) {
  std::vector<int> columns = {9, 48, 131, 1100};  // the last: more than a warp sums up in one go
  if (few) columns = {9, 131};
  std::vector<Shape> shapes = {{1, 32}, {1, 96}, {2, 64}, {4, 32}};
  if (few) shapes = {{1, 64}, {2, 32}};
  int turn = 0;
  for (const int width : columns)
    for (const Shape& shape : shapes)
      for (const NamedRecipe& recipe : kRecipes)
        for (const bool two_pass : {false, true})
          for (const bool staged : {false, true}) {
            // In vectors or column by column; in place, with rows left out, or neither.
            ++turn;
            const RecipeCase c = {&recipe,      two_pass,      staged,        turn % 3 != 0, width,
                                  turn % 7 % 3, shape.cluster, shape.threads, turn % 5 == 1, turn % 5 == 3};
            add_recipe<float>(group, c);
            if (!few) add_recipe<__nv_bfloat16>(group, c);
          }
}

// By the name of the kernel, and with ":few" behind it those that sanitizers have the time for.
std::map<std::string, Group> groups() {
  std::map<std::string, Group> result;
  for (const char* suffix : {"", ":few"}) {
    const bool few = *suffix;
    const auto named = [&](const std::string& name) -> Group& { return result[name + suffix]; };
    for (const Kernel kernel : {Kernel::kSmall, Kernel::kResident, Kernel::kRing, Kernel::kStream})
      add_all_types(named(kNames[static_cast<int>(kernel)]), kernel, false, few);
    for (const Kernel kernel : {Kernel::kSmall, Kernel::kStream})
      add_all_types(named("two_pass"), kernel, true, few);
    add_around(named("total"), named("scale"));
    add_recipes(named("recipe"), few);
  }
  add_long_rows(result["long"]);
  return result;
}

bool passes(const NamedCase& c, std::uint64_t schedule) {
  emulator::set_schedule(schedule);
  const auto complain = [&](const std::string& what) {
    std::printf("FAILED %s, schedule %llu: %s\n", c.name.c_str(), static_cast<unsigned long long>(schedule),
                what.c_str());
    return false;
  };
  try {
    c.run();
  } catch (const emulator::Error& error) { return complain(error.what()); } catch (const Mismatch& mismatch) {
    return complain(mismatch.what);
  }
  return true;
}

}  // namespace
}  // namespace driver

int main(int argc, char** argv) {
  using namespace driver;
  const auto known = groups();
  const std::string group = argc > 1 ? argv[1] : "";
  if (!known.count(group)) {
    for (const auto& [name, cases] : known)
      std::printf("%s: %zu cases\n", name.c_str(), cases.size());
    return 2;
  }
  constexpr int kEnough = 20;
  int failures = 0;
  std::mt19937 random(0);
  for (const NamedCase& c : known.at(group)) {
    if (failures == kEnough) break;
    const char* schedule = argc > 2 ? argv[2 + random() % (argc - 2)] : "0";
    failures += !passes(c, std::strtoull(schedule, nullptr, 0));
  }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
