// Parts of the kernels by themselves, for tests and for the floor of a benchmark; a template over
// an instruction set, as lanes.h explains.
#ifndef VSSM_PLUGINS_KERNELS_CPU_PIECES_H_
#define VSSM_PLUGINS_KERNELS_CPU_PIECES_H_

#include "plugins/kernels/cpu/lanes.h"

namespace vssm {

template <class Isa>
void decay_values(const float* dt, const float* A, float* target, int64_t count) {
  const typename Isa::FlushDenormals flush;
  const typename Isa::Decay decay;
  for (int64_t i = 0; i < count; i += Isa::kLanes) {
    const auto span = Isa::load(dt + i);
    const auto a = Isa::load(A + i) * Isa::set1(1.44269504F * Isa::kCells);
    const bool fast = Isa::fits_decay(span * a);
    Isa::store(target + i,
               fast ? decay.fast(span, a) : Isa::Decay::any(span, a, 1.0F / Isa::kCells));
  }
}

template <class Isa>
void softplus_values(const float* x, float* target, int64_t count) {
  const typename Isa::FlushDenormals flush;
  const typename FunctionsOf<Isa>::Type functions;
  for (int64_t i = 0; i < count; i += Isa::kLanes) {
    Isa::store(target + i, functions.softplus(Isa::load(x + i)));
  }
}

template <class Isa>
VSSM_INLINE float sum_of_lanes(typename Isa::Vec x) {
  alignas(64) float lanes[Isa::kLanes];
  Isa::store(lanes, x);
  float total = 0.0F;
  for (const float lane : lanes) total += lane;
  return total;
}

/// The floor: nothing but the decays of 16 states a round, from operands in the first-level cache.
template <class Isa>
float decay_rounds(int64_t rounds) {
  constexpr int kVectors = Lanes<Isa>::kVectors;
  constexpr int kVectorsOfA = 16 * kVectors;
  alignas(64) float A[kVectorsOfA * Isa::kLanes];
  for (int i = 0; i < kVectorsOfA * Isa::kLanes; ++i) {
    A[i] = -1.44269504F * Isa::kCells * static_cast<float>(1 + i / static_cast<int>(kChannels));
  }
  const float* opaque = A;
  const typename Isa::Decay decay;
  typename Isa::Vec sum[4];
  for (auto& part : sum) part = Isa::set1(0.0F);
  for (int64_t i = 0; i < rounds; ++i) {
    const auto dt = Isa::set1(0.01F + 1e-6F * static_cast<float>(i & 1023));
    __asm__ volatile("" : "+r"(opaque) : : "memory");  // A is read anew, as the scan must
#pragma GCC unroll 16
    for (int n = 0; n < kVectorsOfA; ++n) {
      sum[n % 4] = sum[n % 4] + decay.fast(dt, Isa::load(opaque + n * Isa::kLanes));
    }
  }
  return sum_of_lanes<Isa>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/// The floor of a scan with one decay for all states, whose time goes into products: 16 states'
/// worth a round, from registers. Eight chains, as two units of a latency of four need.
template <class Isa>
float product_rounds(int64_t rounds) {
  constexpr int kChains = 8;
  volatile float half = 0.5F;  // a known value would be multiplied out
  typename Isa::Vec sum[kChains];
  for (auto& part : sum) part = Isa::set1(half);
  const auto factor = Isa::set1(half), term = Isa::set1(half);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 64
    for (int n = 0; n < 16 * Lanes<Isa>::kVectors; ++n) {
      sum[n % kChains] = Isa::fma(sum[n % kChains], factor, term);
    }
  }
  for (int i = 1; i < kChains; ++i) sum[0] = sum[0] + sum[i];
  return sum_of_lanes<Isa>(sum[0]);
}

/// What a step of a channel takes apart from its states: 16 softplus a round, of operands in the
/// first-level cache, which a scan reads anew as well.
template <class Isa>
float softplus_rounds(int64_t rounds) {
  constexpr int kVectors = Lanes<Isa>::kVectors;
  alignas(64) float x[16 * kChannels];
  for (int i = 0; i < 16 * kChannels; ++i) x[i] = static_cast<float>(i % 41 - 30) * 0.2F;
  const float* opaque = x;
  const typename FunctionsOf<Isa>::Type functions;
  typename Isa::Vec sum[4];
  for (auto& part : sum) part = Isa::set1(0.0F);
  for (int64_t i = 0; i < rounds; ++i) {
    __asm__ volatile("" : "+r"(opaque) : : "memory");
#pragma GCC unroll 4
    for (int n = 0; n < 16 * kVectors; ++n) {
      sum[n % 4] = sum[n % 4] + functions.softplus(Isa::load(opaque + n * Isa::kLanes));
    }
  }
  return sum_of_lanes<Isa>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CPU_PIECES_H_
