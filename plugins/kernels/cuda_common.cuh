// What the CUDA launchers share. CUDA's own headers only.
#ifndef VSSM_PLUGINS_KERNELS_CUDA_COMMON_CUH_
#define VSSM_PLUGINS_KERNELS_CUDA_COMMON_CUH_

#include <cuda_runtime_api.h>

#include "plugins/kernels/types.h"

namespace vssm {

inline cudaStream_t stream_of(const CudaLaunch& launch) {
  return static_cast<cudaStream_t>(launch.stream);
}

/// The error that a launch left, as one of ours.
inline Status launched(const char* name) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return Status::error(name, ": ", cudaGetErrorName(error),
                       " at launch: ", cudaGetErrorString(error));
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CUDA_COMMON_CUH_
