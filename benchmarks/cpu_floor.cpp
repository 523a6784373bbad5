// The floor that `vssm bench` prints, and pieces of the kernels for tests: libvssm_bench.so.
#include <chrono>
#include <cstdint>

#include "plugins/kernels/cpu/dispatch.h"

#define VSSM_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

const vssm::CpuKernels* kernels_of(int isa) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
  return isa >= 0 && isa < 3 ? vssm::find_cpu_kernels(kNames[isa]) : nullptr;
}

volatile float g_sink;

}  // namespace

/// exp2 evaluations per second of one thread, with the kernel's own vector exp2 on dt * A, summed;
/// the best of the samples that fit into `seconds`. isa: 0 baseline, 1 AVX2, 2 AVX-512; negative
/// result: this processor or this build lacks it.
VSSM_EXPORT double vssm_exp2_rate(int isa, double seconds) {
  const vssm::CpuKernels* kernels = kernels_of(isa);
  if (kernels == nullptr) return -1.0;
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 4096;  // a fraction of a millisecond: one sample
  constexpr double kPerSample = kRounds * 16.0 * static_cast<double>(vssm::kChannels);
  const auto start = Clock::now();
  double best = 0.0;
  auto before = start;
  do {
    g_sink = kernels->decay_rounds(kRounds);
    const auto after = Clock::now();
    const double rate = kPerSample / std::chrono::duration<double>(after - before).count();
    best = rate > best ? rate : best;
    before = after;
  } while (std::chrono::duration<double>(before - start).count() < seconds);
  return best;
}

/// exp(dt A), element by element, as the scan computes it. `count` is a multiple of 16. Returns 0,
/// or -1 when the instruction set is not there.
VSSM_EXPORT int vssm_decay(int isa, const float* dt, const float* A, float* target, int64_t count) {
  const vssm::CpuKernels* kernels = kernels_of(isa);
  if (kernels == nullptr || count % vssm::kChannels != 0) return -1;
  kernels->decay(dt, A, target, count);
  return 0;
}

/// softplus(x), likewise.
VSSM_EXPORT int vssm_softplus(int isa, const float* x, float* target, int64_t count) {
  const vssm::CpuKernels* kernels = kernels_of(isa);
  if (kernels == nullptr || count % vssm::kChannels != 0) return -1;
  kernels->softplus(x, target, count);
  return 0;
}
