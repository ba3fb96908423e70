#include "plan.h"

#include <algorithm>
#include <stdexcept>

#include "shapes.h"

namespace eakd {
namespace cuda {

const char* name_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::kSmall: return "small";
    case Kernel::kResident: return "resident";
    case Kernel::kRing: return "ring";
    case Kernel::kStream: return "stream";
    case Kernel::kGradient: return "gradient";
    case Kernel::kRecipe: return "recipe";
  }
  return "";
}

namespace {

constexpr int64_t kFastestStages = 3;  // of a ring, below which loads do not keep ahead
constexpr int64_t kRowsToKeepAhead = 4;
constexpr int64_t kReservedShared = 1024;  // of a block, by the system

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int whole_warps(int64_t threads) { return static_cast<int>(divide_up(threads, kWarp) * kWarp); }

bool allows_cluster(const Device& device, int cluster) {
  return cluster == 1 || (device.capability >= 90 && cluster <= device.largest_cluster);
}

// Persistent: as many clusters as run at once, or one a row.
void set_blocks(Plan& plan, const Problem& problem, const Device& device, int ctas_of_processor) {
  const int64_t at_once = std::max<int64_t>(1, int64_t(device.processors) * ctas_of_processor / plan.cluster);
  plan.blocks = std::min(problem.rows, at_once) * plan.cluster;
}

bool plan_small(Plan& plan, const Problem& problem) {
  const int columns = std::max(problem.vocab_size, 1);
  if (columns > kManyColumns * kManyLanes) return false;
  plan = Plan();
  plan.kernel = Kernel::kSmall;
  plan.width = problem.whole ? problem.vector() : 1;
  plan.lanes = columns <= kFewColumns * kFewLanes ? kFewLanes : kManyLanes;
  plan.threads = kSmallThreads;
  plan.blocks = divide_up(problem.rows, kSmallThreads / plan.lanes);
  return true;
}

bool plan_resident(Plan& plan, const Problem& problem, const Device& device, int cluster) {
  const bool possible = problem.operation == Operation::kOnePass && problem.alike && problem.gradient_alike;
  if (!possible || !allows_cluster(device, cluster)) return false;
  const int64_t vectors = problem.vocab_size / problem.vector();
  if (vectors > int64_t(cluster) * kResidentThreads * kResidentVectors) return false;
  plan = Plan();
  plan.kernel = Kernel::kResident;
  plan.width = problem.vector();
  plan.cluster = cluster;
  // Full registers where there are rows enough to fill the GPU; otherwise a row is shared by more threads.
  const int64_t least = divide_up(vectors, int64_t(cluster) * kResidentVectors);
  const int64_t idle = int64_t(device.processors) * kThreadsOfProcessor / std::max<int64_t>(problem.rows * cluster, 1);
  const int64_t useful = divide_up(vectors, cluster);
  plan.threads = std::clamp(whole_warps(std::max(least, std::min(idle, useful))), kWarp, kResidentThreads);
  set_blocks(plan, problem, device, kThreadsOfProcessor / plan.threads);
  return true;
}

bool plan_ring(Plan& plan, const Problem& problem, const Device& device, int cluster, int64_t least_stages) {
  const bool possible = problem.operation == Operation::kOnePass && problem.alike && problem.gradient_alike &&
                        problem.student_bytes == problem.teacher_bytes && device.capability >= 90;
  if (!possible || !allows_cluster(device, cluster)) return false;
  const int64_t slice = std::max<int64_t>(1, divide_up(problem.vocab_size / problem.vector(), cluster));
  const int64_t stages = std::min<int64_t>(kMostStages, (device.shared_bytes - kRingSpace) / (slice * 32));
  if (stages < least_stages) return false;
  plan = Plan();
  plan.kernel = Kernel::kRing;
  plan.width = problem.vector();
  plan.cluster = cluster;
  plan.threads = std::min(kRingThreads, whole_warps(divide_up(slice, 2)));
  plan.slice = static_cast<int>(slice), plan.stages = static_cast<int>(stages);
  plan.shared_bytes = kRingSpace + stages * slice * 32;
  set_blocks(plan, problem, device, 1);
  return true;
}

// Row pairs that are read twice should wait for their second time in the L2, of which half can be counted on; gradients
// pass through it too.
int cluster_for_cache(const Problem& problem, const Device& device) {
  const int64_t pair = int64_t(problem.vocab_size) * (problem.student_bytes + problem.teacher_bytes) * 3 / 2;
  const int64_t ctas = device.processors * (kThreadsOfProcessor / kStreamThreads);
  int cluster = 1;
  while (cluster < 8 && allows_cluster(device, 2 * cluster) && ctas / cluster * pair > device.l2_bytes / 2)
    cluster *= 2;
  return cluster;
}

bool plan_stream(Plan& plan, const Problem& problem, const Device& device, int cluster) {
  if (!allows_cluster(device, cluster)) return false;
  plan = Plan();
  plan.kernel = Kernel::kStream;
  plan.width = problem.alike ? problem.vector() : 1;
  plan.cluster = cluster;
  const int64_t vectors = problem.vocab_size / plan.width;
  plan.threads = std::clamp(whole_warps(divide_up(vectors, int64_t(cluster) * 4)), kWarp, kStreamThreads);
  set_blocks(plan, problem, device, kThreadsOfProcessor / plan.threads);
  return true;
}

bool has_other_kernels(const Problem& problem) {
  return problem.operation == Operation::kRowStatistics || problem.operation == Operation::kOnePass;
}

bool plan_gradient(Plan& plan, const Problem& problem, const Device& device) {
  if (has_other_kernels(problem)) return false;
  plan = Plan();
  plan.kernel = Kernel::kGradient;
  plan.width = problem.alike ? problem.vector() : 1;
  plan.threads = kGradientThreads;
  const int64_t warps = problem.rows * stretches(problem.gradient_columns, plan.width);
  plan.blocks = divide_up(warps, kGradientThreads / kWarp);
  constexpr int64_t kBlocksOfProcessor = 8;
  if (problem.operation == Operation::kScaleGradient)
    plan.blocks = std::min(plan.blocks, device.processors * kBlocksOfProcessor);
  return true;
}

// staged: rows are kept in shared memory.
bool plan_recipe(Plan& plan, const Problem& problem, const Device& device, int cluster, bool staged,
                 int64_t shared_bytes) {
  if (!allows_cluster(device, cluster)) return false;
  plan = Plan();
  plan.kernel = Kernel::kRecipe;
  plan.width = problem.alike ? problem.vector() : 1;
  plan.cluster = cluster;
  const int64_t vectors = problem.vocab_size / plan.width;
  plan.threads = std::clamp(whole_warps(divide_up(vectors, int64_t(cluster) * 4)), kWarp, kRecipeThreads);
  plan.shared_bytes = kRecipeSpace;
  if (staged) {
    const int64_t of_tile = plan.width > 1 ? 1 : 4;
    plan.slice = static_cast<int>(divide_up(vectors, plan.threads * cluster * of_tile) * of_tile);
    plan.shared_bytes +=
        int64_t(plan.slice) * plan.threads * plan.width * (problem.student_bytes + problem.teacher_bytes);
  }
  set_blocks(plan, problem, device, kThreadsOfProcessor / plan.threads);
  return plan.shared_bytes <= shared_bytes;
}

// Rows in shared memory, of two CTAs a processor if they can be, so that one loads while the other computes.
Plan best_recipe(const Problem& problem, const Device& device, int few_rows) {
  Plan plan;
  while (!allows_cluster(device, few_rows))
    few_rows /= 2;
  if (problem.operation != Operation::kRowGradient) {
    for (const int64_t shared_bytes : {device.shared_bytes / 2 - kReservedShared, device.shared_bytes})
      for (int cluster = few_rows; cluster <= kMaxCluster; cluster *= 2)
        if (plan_recipe(plan, problem, device, cluster, true, shared_bytes)) return plan;
  }
  const bool again = problem.operation != Operation::kRowGradient;
  const int cluster = again ? std::max(few_rows, cluster_for_cache(problem, device)) : few_rows;
  if (!plan_recipe(plan, problem, device, cluster, false, device.shared_bytes))
    plan_recipe(plan, problem, device, 1, false, device.shared_bytes);
  return plan;
}

// Clusters until every processor has something to do.
int cluster_of_few_rows(const Problem& problem, const Device& device) {
  int cluster = 1;
  while (cluster < 8 && problem.rows * cluster * 2 <= device.processors && problem.vocab_size / cluster > 8192)
    cluster *= 2;
  return cluster;
}

// docs/performance.md counts what decides here. None of it has been measured yet.
Plan best_plan(const Problem& problem, const Device& device) {
  const int few_rows = cluster_of_few_rows(problem, device);
  if (problem.recipe) return best_recipe(problem, device, few_rows);
  Plan plan;
  if (plan_gradient(plan, problem, device) || plan_small(plan, problem)) return plan;
  for (int cluster = few_rows; cluster <= kMaxCluster; cluster *= 2) {
    const int64_t clusters = std::max(1, device.processors / cluster);
    const bool ahead = problem.rows >= kRowsToKeepAhead * clusters;
    if (!plan_resident(plan, problem, device, cluster)) continue;
    // With rows enough to keep ahead, the ring hides loads behind computing; two CTAs only hide each other's.
    Plan ring;
    if (cluster > 1 && ahead && plan_ring(ring, problem, device, cluster, kFastestStages)) return ring;
    return plan;
  }
  for (int cluster = few_rows; cluster <= kMaxCluster; cluster *= 2)
    if (plan_ring(plan, problem, device, cluster, kFastestStages)) return plan;
  const bool again = problem.operation == Operation::kOnePass;
  const int cluster = again ? std::max(few_rows, cluster_for_cache(problem, device)) : few_rows;
  if (!plan_stream(plan, problem, device, cluster)) plan_stream(plan, problem, device, 1);
  return plan;
}

void check_name(const std::string& kernel) {
  for (const Kernel known : {Kernel::kSmall, Kernel::kResident, Kernel::kRing, Kernel::kStream})
    if (kernel == name_of(known)) return;
  throw std::invalid_argument("there is no kernel \"" + kernel + "\"; there are small, resident, ring and stream");
}

bool plan_wanted(Plan& plan, const Problem& problem, const Device& device, const std::string& kernel, int cluster) {
  if (kernel == "small") return cluster == 1 && plan_small(plan, problem);
  if (kernel == "resident") return plan_resident(plan, problem, device, cluster);
  if (kernel == "ring") return plan_ring(plan, problem, device, cluster, 2);
  return plan_stream(plan, problem, device, cluster);
}

}  // namespace

Plan make_plan(const Problem& problem, const Device& device, const std::string& wanted) {
  if (wanted.empty() || !has_other_kernels(problem)) return best_plan(problem, device);
  const size_t colon = wanted.find(':');
  const std::string kernel = wanted.substr(0, colon);
  const int cluster = colon == std::string::npos ? 1 : std::atoi(wanted.c_str() + colon + 1);
  const bool exact = colon == std::string::npos || wanted == kernel + ":" + std::to_string(cluster);
  if (!exact || (cluster != 1 && cluster != 2 && cluster != 4 && cluster != 8 && cluster != 16))
    throw std::invalid_argument("a cluster has 1, 2, 4, 8 or 16 blocks, got \"" + wanted + "\"");
  check_name(kernel);
  Plan plan;
  const bool keeps_rows = kernel == "resident" || kernel == "ring";
  if (problem.recipe) {  // one kernel that can keep rows or not; what it cannot follow is for others
    const bool follows =
        kernel != "small" && plan_recipe(plan, problem, device, cluster, keeps_rows, device.shared_bytes);
    return follows ? plan : best_plan(problem, device);
  }
  // These keep a row for its gradient, and are for nothing else; statistics go their usual way.
  if (problem.operation == Operation::kRowStatistics && keeps_rows) return best_plan(problem, device);
  if (!plan_wanted(plan, problem, device, kernel, cluster)) {
    const Plan best = best_plan(problem, device);
    throw std::invalid_argument("EAKD_CUDA_PLAN=\"" + wanted + "\" cannot take rows of " +
                                std::to_string(problem.vocab_size) +
                                " columns as they lie here: too long for it, of dtypes or alignments that differ, or a "
                                "device without such clusters; without it " +
                                name_of(best.kernel) + ":" + std::to_string(best.cluster) + " would run");
  }
  return plan;
}

}  // namespace cuda
}  // namespace eakd
