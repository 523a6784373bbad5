// The floor of a scan, which `vssm bench` holds its times against.
#include <chrono>
#include <cstdint>

#include "plugins/c/vssm.h"
#include "plugins/kernels/cpu/dispatch.h"

namespace {

volatile float g_sink;  // so that the rounds are not optimised away

}  // namespace

double vssm_exp2_rate(const char* isa, double seconds) {
  const vssm::CpuKernels* kernels = isa == nullptr ? nullptr : vssm::find_cpu_kernels(isa);
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
