// The numbers that kernels and the plans for them share.
#pragma once

#include "../row_state.h"

namespace eakd {
namespace cuda {

constexpr int kWarp = 32, kMaxWarps = 32, kMaxCluster = 16;

// Kernels of up to 128 registers a thread: so many threads fit a processor.
constexpr int kThreadsOfProcessor = 512;

constexpr int kSmallThreads = 128;
constexpr int kFewColumns = 16, kFewLanes = 8;  // a lane, lanes a row
constexpr int kManyColumns = 32, kManyLanes = 32;

constexpr int kResidentThreads = 256, kResidentVectors = 10;

constexpr int kStreamThreads = 256;

constexpr int kRingThreads = 512, kMostStages = 4;
constexpr int kRingSpace = 2176;  // bytes before the first stage

constexpr int kRecipeThreads = 256;
constexpr int kRecipeSpace = 4096;  // bytes before the row

constexpr int kGradientThreads = 256;
constexpr int kStretch = 8;  // vectors a lane of row_gradient.cuh takes

constexpr EAKD_HD int stretches(int columns, int width) {
  const int stretch = kWarp * kStretch * width;
  return columns <= stretch ? 1 : (columns + stretch - 1) / stretch;
}

}  // namespace cuda
}  // namespace eakd
