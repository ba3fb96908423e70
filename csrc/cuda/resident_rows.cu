#include "resident_rows.cuh"

#include "launch.cuh"

using namespace eakd::cuda;

extern "C" int eakd_launch_resident(const RowJob* job, const Plan* plan, Dtypes dtypes, void* stream) {
  return with_dtypes(dtypes, [&](auto pair) {
    using Types = decltype(pair);
    return with_multiple(*job, [&](auto multiple) {
      auto* kernel = resident_rows_kernel<decltype(multiple)::value, typename Types::Student, typename Types::Teacher,
                                          Types::kVector>;
      return launch(kernel, *plan, sizeof(MergeSpace), stream, *job, plan->cluster);
    });
  });
}

namespace {

// More than 8 blocks a cluster are not for every GPU.
int largest_cluster() {
  auto* kernel = resident_rows_kernel<1, float, float, 4>;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kMaxCluster, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kMaxCluster), config.blockDim = dim3(kResidentThreads);
  config.dynamicSmemBytes = sizeof(MergeSpace), config.attrs = &cluster, config.numAttrs = 1;
  int clusters = 0;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess)
    cudaGetLastError();  // it was a question, not an error
  return clusters > 0 ? kMaxCluster : 8;
}

}  // namespace

extern "C" int eakd_query_device(Device* found) {
  int device = 0, major = 0, minor = 0, shared = 0, l2 = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor), ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&found->processors, cudaDevAttrMultiProcessorCount), ask(&l2, cudaDevAttrL2CacheSize);
  ask(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error != cudaSuccess) return error;
  found->capability = 10 * major + minor, found->shared_bytes = shared, found->l2_bytes = l2;
  found->largest_cluster = found->capability >= 90 ? largest_cluster() : 1;
  return cudaSuccess;
}

extern "C" const char* eakd_error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
