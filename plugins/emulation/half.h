// Storage and conversions of CUDA's half types, for device.h: round to nearest, ties to
// even, as the GPU does.
#ifndef VSSM_PLUGINS_KERNELS_CUDA_EMULATION_HALF_H_
#define VSSM_PLUGINS_KERNELS_CUDA_EMULATION_HALF_H_

#include <cmath>
#include <cstdint>
#include <cstring>

struct alignas(2) __half {
  uint16_t bits;
};
struct alignas(2) __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (std::isnan(x)) return {0x7FFF};
  bits += 0x7FFFU + ((bits >> 16) & 1U);  // carries into the exponent where it should
  return {static_cast<uint16_t>(bits >> 16)};
}

inline float __half2float(__half x) {
  const int exponent = (x.bits >> 10) & 31;
  const int mantissa = x.bits & 0x3FF;
  const float sign = (x.bits & 0x8000) != 0 ? -1.0F : 1.0F;
  if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

inline __half __float2half_rn(float x) {
  if (std::isnan(x)) return {0x7FFF};
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (size >= 65520.0F) return {static_cast<uint16_t>(sign | 0x7C00)};  // halfway past the largest
  int exponent = -13;                                 // zero and denormals share the lowest one
  if (size >= 0x1p-14F) std::frexp(size, &exponent);  // size = f 2^exponent, 0.5 <= f < 1
  // The last kept bit counts 2^(exponent - 11). nearbyint rounds ties to even.
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));
  // units is in [1024, 2048] for a normal number: its leading bit adds one to the exponent field.
  return {static_cast<uint16_t>(sign | (((exponent + 13) << 10) + units))};
}

#endif  // VSSM_PLUGINS_KERNELS_CUDA_EMULATION_HALF_H_
