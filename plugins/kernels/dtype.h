// Element types of the operators. Plain data only: this header is also included by the translation
// units that are compiled for AVX, where an inline function could leak into portable code.
#ifndef VSSM_PLUGINS_KERNELS_DTYPE_H_
#define VSSM_PLUGINS_KERNELS_DTYPE_H_

#include <cstdint>

namespace vssm {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kInt32, kOther };

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_DTYPE_H_
