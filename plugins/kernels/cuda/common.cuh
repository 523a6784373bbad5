// What the CUDA kernels share, and the only file through which they see CUDA: NVIDIA's headers, or
// the emulation of them on the CPU where VSSM_CUDA_EMULATION is defined. One launch, one dtype
// switch, one place for instructions that have no name in C++.
#ifndef VSSM_PLUGINS_KERNELS_CUDA_COMMON_CUH_
#define VSSM_PLUGINS_KERNELS_CUDA_COMMON_CUH_

#if defined(VSSM_CUDA_EMULATION)
#include "plugins/emulation/device.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <atomic>
#include <tuple>

#include "plugins/kernels/types.h"

namespace vssm {

using float16 = __half;
using bfloat16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }

/// Rounded once, to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ float16 from_float<float16>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/// kCount values that move as one access; the address must be aligned to all of them.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T v[kCount];
};

// One instruction each, denormals to zero on both sides. The emulation rounds better than the
// GPU, whose ex2 and lg2 err by about 2^-22: tolerances are for the GPU to prove.
#if defined(VSSM_CUDA_EMULATION)
inline float flush_to_zero(float x) {
  return std::fabs(x) < 0x1p-126F ? std::copysign(0.0F, x) : x;
}
inline float exp2_approx(float x) { return flush_to_zero(std::exp2(flush_to_zero(x))); }
inline float log2_approx(float x) { return flush_to_zero(std::log2(flush_to_zero(x))); }
inline float reciprocal_approx(float x) { return flush_to_zero(1.0F / flush_to_zero(x)); }
#else
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

/// The block's one T in shared memory, uninitialised: a struct of arrays instead of __shared__
/// variables, so that the emulation can poison it. A T is one object however often it is asked for.
template <typename T>
__device__ __forceinline__ T& shared_memory() {
#if defined(VSSM_CUDA_EMULATION)
  static T memory;
  emulation::meet_shared_memory(&memory, sizeof(memory));
#else
  __shared__ T memory;
#endif
  return memory;
}

/// What a launch asked for with shared_bytes, uninitialised, aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ T* dynamic_shared_memory() {
#if defined(VSSM_CUDA_EMULATION)
  return static_cast<T*>(emulation::dynamic_shared_memory());
#else
  extern __shared__ __align__(16) unsigned char vssm_dynamic_shared_memory[];
  return reinterpret_cast<T*>(vssm_dynamic_shared_memory);
#endif
}

inline cudaStream_t stream_of(const CudaLaunch& launch) {
  return static_cast<cudaStream_t>(launch.stream);
}

#if !defined(VSSM_CUDA_EMULATION)
/// What helps against an error of the machine; nothing for any other.
inline const char* remedy_of(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return "; the kernels were not compiled for this GPU: rebuild them with "
             "VSSM_CUDA_ARCHITECTURES (of make: CUDA_ARCHITECTURES) for its compute capability";
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
      return "; the NVIDIA driver is missing, or older than the CUDA that this library was built "
             "with: update it, or rebuild with an older CUDA";
    default:
      return "";
  }
}

/// An error of CUDA's as one of ours; takes it off CUDA's list, where the host would find it.
inline Status cuda_status(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return {};
  static_cast<void>(cudaGetLastError());
  return Status::error(name, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error),
                       remedy_of(error));
}
#endif

#if !defined(VSSM_CUDA_EMULATION)
/// While it lives, this thread may call what a capture of a CUDA graph forbids: the first call into
/// the runtime loads our modules, the first launch a kernel, and loading is such a call. What is
/// captured stays the same.
class RelaxedCapture {
 public:
  RelaxedCapture() : exchanged_(cudaThreadExchangeStreamCaptureMode(&mode_) == cudaSuccess) {
    if (!exchanged_) static_cast<void>(cudaGetLastError());  // no driver: the next call says so
  }
  ~RelaxedCapture() {
    if (exchanged_) static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_));
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  bool exchanged_;
};
#endif

/// What kernels are chosen and sized by.
struct DeviceLimits {
  int sm_count = 0;
  int shared_bytes = 0;  // that a block may ask for
};

/// The current device's; asked once, then remembered. Legal while a CUDA graph is captured.
inline Status device_limits(const char* name, DeviceLimits* limits) {
#if defined(VSSM_CUDA_EMULATION)
  static_cast<void>(name);
  const emulation::Device device = emulation::device();
  *limits = {device.sm_count, device.shared_bytes};
  return {};
#else
  constexpr int kDevices = 64;
  static std::atomic<int64_t> known[kDevices];  // both figures in one, so that no half is seen
  const RelaxedCapture relaxed;
  int device = 0;
  Status status = cuda_status(name, cudaGetDevice(&device));
  if (!status.ok()) return status;
  int64_t both = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (both == 0) {
    int sm_count = 0, shared_bytes = 0;
    status = cuda_status(name,
                         cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device));
    if (!status.ok()) return status;
    status = cuda_status(name, cudaDeviceGetAttribute(
                                   &shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (!status.ok()) return status;
    both = (int64_t{sm_count} << 32) | shared_bytes;
    if (device < kDevices) known[device].store(both, std::memory_order_relaxed);
  }
  *limits = {static_cast<int>(both >> 32), static_cast<int>(both & 0xFFFFFFFF)};
  return {};
#endif
}

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;  // dynamic
};

/// Enqueues kernel(arguments...); the only place where a kernel is launched. `name`: the
/// operator's, for messages. Legal while a CUDA graph is captured.
template <typename... Parameters, typename... Arguments>
Status launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape,
              cudaStream_t stream, const Arguments&... arguments) {
  std::tuple<Parameters...> values(arguments...);
#if defined(VSSM_CUDA_EMULATION)
  static_cast<void>(stream);
  auto thread = [&] { std::apply(kernel, values); };
  const auto call = [](void* argument) { (*static_cast<decltype(thread)*>(argument))(); };
  return emulation::run(name, {shape.grid, shape.block, shape.shared_bytes, call, &thread});
#else
  constexpr size_t kWithoutAsking = 48 << 10;  // larger blocks of shared memory must be asked for
  const void* function = reinterpret_cast<const void*>(kernel);
  const RelaxedCapture relaxed;
  if (shape.shared_bytes > kWithoutAsking) {
    // All that the GPU gives, not what this launch needs: the attribute belongs to the kernel, and
    // another thread may set it between here and the launch. Such a kernel has no static memory.
    DeviceLimits limits;
    Status status = device_limits(name, &limits);
    if (!status.ok()) return status;
    status = cuda_status(name,
                         cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              limits.shared_bytes));
    if (!status.ok()) return status;
  }
  return std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value..., nullptr};
        return cuda_status(name, cudaLaunchKernel(function, shape.grid, shape.block, pointers,
                                                  shape.shared_bytes, stream));
      },
      values);
#endif
}

/// Refuses a launch whose workspace is too small or not aligned.
inline Status check_workspace(const char* name, const CudaLaunch& launch, int64_t needed) {
  if (needed == 0) return {};
  const bool aligned = reinterpret_cast<uintptr_t>(launch.workspace) % 256 == 0;
  if (launch.workspace != nullptr && aligned && launch.workspace_bytes >= needed) return {};
  return Status::error(name, ": workspace of ", launch.workspace_bytes, " bytes, but it must be ",
                       needed, " bytes of device memory, aligned to 256; ask the workspace query");
}

template <typename T>
struct TypeTag {
  using Type = T;
};

/// The one switch from a DType to the type that kernels take: function(TypeTag<T>{}).
template <typename Function>
Status with_float_type(const char* name, DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(TypeTag<float>{});
    case DType::kFloat16:
      return function(TypeTag<float16>{});
    case DType::kBFloat16:
      return function(TypeTag<bfloat16>{});
    default:
      return Status::error(name, ": ", name_of(dtype), " is no type that kernels compute in");
  }
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CUDA_COMMON_CUH_
