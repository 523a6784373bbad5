// The floors of a scan, which `vssm bench` holds its times against.
#include <chrono>
#include <cstdint>

#include "plugins/c/vssm.h"
#include "plugins/kernels/cpu/dispatch.h"

namespace {

volatile float g_sink;  // so that the rounds are not optimised away

/// Values a second of `rounds`, a function of CpuKernels that makes 16 kChannels of them a round.
double rate(const char* isa, double seconds, float (*vssm::CpuKernels::*rounds)(int64_t)) {
  const vssm::CpuKernels* kernels = isa == nullptr ? nullptr : vssm::find_cpu_kernels(isa);
  if (kernels == nullptr) return -1.0;
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 4096;  // a fraction of a millisecond: one sample
  constexpr double kPerSample = kRounds * 16.0 * static_cast<double>(vssm::kChannels);
  const auto start = Clock::now();
  double best = 0.0;
  auto before = start;
  do {
    g_sink = (kernels->*rounds)(kRounds);
    const auto after = Clock::now();
    const double rate = kPerSample / std::chrono::duration<double>(after - before).count();
    best = rate > best ? rate : best;
    before = after;
  } while (std::chrono::duration<double>(before - start).count() < seconds);
  return best;
}

}  // namespace

double vssm_exp2_rate(const char* isa, double seconds) {
  return rate(isa, seconds, &vssm::CpuKernels::decay_rounds);
}

double vssm_product_rate(const char* isa, double seconds) {
  return rate(isa, seconds, &vssm::CpuKernels::product_rounds);
}

double vssm_softplus_rate(const char* isa, double seconds) {
  return rate(isa, seconds, &vssm::CpuKernels::softplus_rounds);
}
