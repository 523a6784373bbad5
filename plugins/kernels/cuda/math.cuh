// Pieces of the CUDA scans: step sizes, gates, and loads of rows of states.
#ifndef VSSM_PLUGINS_KERNELS_CUDA_MATH_CUH_
#define VSSM_PLUGINS_KERNELS_CUDA_MATH_CUH_

#include <type_traits>

#include "plugins/kernels/cuda/common.cuh"
#include "plugins/kernels/cuda/scan_params.h"

namespace vssm {

constexpr float kLog2E = 1.44269504F;

/// log(1 + e) / e for e in [0, 1]: the polynomial through Chebyshev's nodes, relative error 5e-9,
/// 1e-7 as computed. On the FMA pipe: lg2 would stand in line with the decays, and loses the digits
/// of a small e.
VSSM_HOST_DEVICE float log1p_over(float e) {
  float sum = -0.003176057F;
  sum = fmaf(sum, e, 0.019542526F);
  sum = fmaf(sum, e, -0.05637361F);
  sum = fmaf(sum, e, 0.10543624F);
  sum = fmaf(sum, e, -0.15269667F);
  sum = fmaf(sum, e, 0.19663274F);
  sum = fmaf(sum, e, -0.24951616F);
  sum = fmaf(sum, e, 0.3332971F);
  sum = fmaf(sum, e, -0.49999893F);
  return fmaf(sum, e, 1.0F);
}

/// log(1 + exp(x)), relative error 2e-7 where exp counts little, 3e-6 at x = -87, where the
/// rounding of its argument shows; NaN stays NaN.
__device__ __forceinline__ float softplus(float x) {
  const float e = exp2_approx(-fabsf(x) * kLog2E);
  return fmaf(log1p_over(e), e, fmaxf(x, 0.0F));
}

/// x / (1 + exp(-x)), down to the last normal float at x = -91.9: for x < 0 the exponential carries
/// a factor of 256 until x has multiplied it. x = -inf gives -inf * 0, NaN.
__device__ __forceinline__ float silu(float x) {
  const float large = exp2_approx(fmaf(-fabsf(x), kLog2E, 8.0F));
  const float inverse = reciprocal_approx(fmaf(large, 1.0F / 256.0F, 1.0F));
  return x < 0.0F ? x * (large * inverse) * (1.0F / 256.0F) : x * inverse;
}

/// A pointer to device memory that the compiler takes as it is. Otherwise it would put the sums
/// that made it into every address of a loop.
template <typename T>
__device__ __forceinline__ T* settled(T* pointer) {
#if defined(VSSM_CUDA_EMULATION)
  return pointer;
#else
  size_t address = __cvta_generic_to_global(pointer);
  asm("" : "+l"(address));
  return static_cast<T*>(__cvta_global_to_generic(address));
#endif
}

/// Row `index` of rows `stride` bytes apart. With a settled base one instruction, since both
/// factors are seen to have 32 bits; nine, as nvdisasm showed, where the compiler moves parts of it
/// about.
template <typename T>
__device__ __forceinline__ T* row_at(T* base, int32_t index, int32_t stride) {
#if !defined(VSSM_CUDA_EMULATION)
  asm volatile("" : "+r"(stride));
#endif
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(base) + int64_t{index} * stride);
}

/// kCount states of a row from its `first`; those from `count` on are zero. `wide`: in one access,
/// which the caller has found aligned.
template <int kCount, typename T>
__device__ __forceinline__ Pack<T, kCount> load_states(const T* row, int first, int count,
                                                       bool wide) {
  Pack<T, kCount> states;
  if (wide && first + kCount <= count) {
    return *reinterpret_cast<const Pack<T, kCount>*>(row + first);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    states.v[i] = first + i < count ? row[first + i] : from_float<T>(0.0F);
  }
  return states;
}

template <int kCount, typename T>
__device__ __forceinline__ Pack<T, kCount> no_states() {
  Pack<T, kCount> states;
#pragma unroll
  for (int i = 0; i < kCount; ++i) states.v[i] = from_float<T>(0.0F);
  return states;
}

template <int kCount, typename T>
__device__ __forceinline__ Pack<float, kCount> to_floats(const Pack<T, kCount>& states) {
  Pack<float, kCount> floats;
#pragma unroll
  for (int i = 0; i < kCount; ++i) floats.v[i] = to_float(states.v[i]);
  return floats;
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CUDA_MATH_CUH_
