// Pieces of the CPU kernels, one at a time: libvssm_pieces.so.
#include <cstdint>

#include "plugins/kernels/cpu/dispatch.h"

#define VSSM_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

const vssm::CpuKernels* kernels_of(int isa) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
  return isa >= 0 && isa < 3 ? vssm::find_cpu_kernels(kNames[isa]) : nullptr;
}

}  // namespace

/// exp(dt A), element by element, as the scan computes it. `count` is a multiple of 16. Returns 0,
/// or -1 when the instruction set is not there.
VSSM_EXPORT int vssm_decay(int isa, const float* dt, const float* A, float* target, int64_t count) {
  const vssm::CpuKernels* kernels = kernels_of(isa);
  if (kernels == nullptr || count % vssm::kChannels != 0) return -1;
  kernels->decay(dt, A, target, count);
  return 0;
}

/// softplus(x), with the same counts and results.
VSSM_EXPORT int vssm_softplus(int isa, const float* x, float* target, int64_t count) {
  const vssm::CpuKernels* kernels = kernels_of(isa);
  if (kernels == nullptr || count % vssm::kChannels != 0) return -1;
  kernels->softplus(x, target, count);
  return 0;
}
