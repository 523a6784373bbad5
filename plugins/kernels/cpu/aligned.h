// Memory whose rows begin with a cache line: a vector that lies across two is read at half the
// rate. For the drivers; the kernels themselves use nothing from std::.
#ifndef VSSM_PLUGINS_KERNELS_CPU_ALIGNED_H_
#define VSSM_PLUGINS_KERNELS_CPU_ALIGNED_H_

#include <cstdint>
#include <memory>
#include <new>

namespace vssm {

constexpr std::align_val_t kCacheLine{64};

struct FreeAligned {
  void operator()(float* data) const { operator delete[](data, kCacheLine); }
};
using Floats = std::unique_ptr<float[], FreeAligned>;

/// Empty when there is no memory.
inline Floats allocate(int64_t count) {
  return Floats(static_cast<float*>(operator new[](static_cast<size_t>(count) * sizeof(float),
                                                   kCacheLine, std::nothrow)));
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CPU_ALIGNED_H_
