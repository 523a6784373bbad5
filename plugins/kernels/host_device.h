// Plain arithmetic that kernels share with host code is marked with this.
#ifndef VSSM_PLUGINS_KERNELS_HOST_DEVICE_H_
#define VSSM_PLUGINS_KERNELS_HOST_DEVICE_H_

#if defined(__CUDACC__)
#define VSSM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VSSM_HOST_DEVICE inline
#endif

#endif  // VSSM_PLUGINS_KERNELS_HOST_DEVICE_H_
