#include "resident_rows.cuh"

#include "launch.cuh"

using namespace eakd::cuda;

extern "C" int eakd_launch_resident(const RowJob* job, const Plan* plan, Dtypes dtypes, void* stream) {
  return with_dtypes(dtypes, [&](auto pair) {
    using Types = decltype(pair);
    return with_multiple(*job, [&](auto multiple) {
      auto* kernel = resident_rows_kernel<decltype(multiple)::value, typename Types::Student, typename Types::Teacher,
                                          Types::kVector>;
      return launch_persistent(kernel, *plan, sizeof(MergeSpace), stream, *job, plan->cluster);
    });
  });
}

extern "C" int eakd_query_device(Device* found) {
  int device = 0, major = 0, minor = 0, shared = 0, l2 = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor), ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&found->processors, cudaDevAttrMultiProcessorCount), ask(&l2, cudaDevAttrL2CacheSize);
  ask(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  // Code for an older device, compiled anew for this one, has nothing of clusters.
  cudaFuncAttributes compiled = {};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&compiled, resident_rows_kernel<1, float, float, 4>);
  if (error != cudaSuccess) return forgotten(error);
  found->capability = std::min(10 * major + minor, compiled.ptxVersion);
  found->shared_bytes = shared, found->l2_bytes = l2;
  found->largest_cluster = found->capability >= 90 ? kMaxCluster : 1;
  return cudaSuccess;
}

extern "C" const char* eakd_error_name(int error) {
  return error == kNothingFits ? "no cluster of this shape fits the device"
                               : cudaGetErrorName(static_cast<cudaError_t>(error));
}
