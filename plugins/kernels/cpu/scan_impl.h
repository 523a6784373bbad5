// The scan of one unit of work (one image, some blocks of channels, all directions), as a template
// over an instruction set; lanes.h says how it is kept apart from the other sets.
//
// `Isa` has: Vec, kLanes, kVectorsAtOnce, kStateVectors (state vectors that fit in registers),
// kCells, kMasked, Part, FlushDenormals and the static functions used here and in lanes.h;
// `Decay` is its exp2, whose unit is 1 / kCells of an octave.
#ifndef VSSM_PLUGINS_KERNELS_CPU_SCAN_IMPL_H_
#define VSSM_PLUGINS_KERNELS_CPU_SCAN_IMPL_H_

#include <cstdint>

#include "plugins/kernels/cpu/scan_direction.h"
#include "plugins/kernels/cpu/scan_shared.h"

namespace vssm {

template <class Isa, DType kType, int kStates>
void scan_directions(const ScanPlan& plan, int64_t image, int64_t block) {
  using Scan = DirectionScan<Isa, kType, kStates>;
  const typename Isa::Decay decay;
  for (int64_t k = 0; k < plan.directions; ++k) {
    Scan scan(plan, image, block, k);
    typename Scan::Row h[kStates == 0 ? kMaxStates : kStates];
    scan.clear(h);
    for (int64_t t = 0; t < plan.seqlen; t += Scan::kSteps) scan.advance_block(decay, t, h);
  }
}

/// The same for `count` blocks at a time, in `kRows` rows of states. With one state or one decay a
/// channel there is so little to compute that memory counts; the cache lines of a token lie side by
/// side, and the blocks read B and C of some steps one after the other. VMamba (L 3136, D 192, K 4,
/// AVX-512) on Zen 5: 1.63 ms one block at a time, 1.48 three; while others used the third-level
/// cache 5.9, 1.9.
template <class Isa, class Scan, int kRows>
void scan_wide(const ScanPlan& plan, int64_t image, int64_t first, int64_t count) {
  const typename Isa::Decay decay;
  const int64_t last = first + count - 1;
  for (int64_t k = 0; k < plan.directions; ++k) {
    Scan scans[kWidest] = {
        {plan, image, first, k},
        {plan, image, first + 1 < last ? first + 1 : last, k},
        {plan, image, first + 2 < last ? first + 2 : last, k},
        {plan, image, last, k},
    };
    typename Scan::Row h[kRows];
    const int64_t rows = plan.d_state;
    for (int64_t i = 0; i < count; ++i) scans[i].clear(h + i * rows);
    for (int64_t t = 0; t < plan.seqlen; t += Scan::kSteps) {
      for (int64_t i = 0; i < count; ++i) scans[i].advance_block(decay, t, h + i * rows);
    }
  }
}

/// A part of a long list. The states, and A as the kernel takes it, lie in memory between parts.
template <class Isa, class Scan, int kRows>
void scan_steps(const ScanPlan& plan, const ScanPart& part) {
  using L = Lanes<Isa>;
  const typename Isa::Decay decay;
  const int64_t N = Scan::kFixedStates == 0 ? plan.d_state : Scan::kFixedStates;
  const bool first = part.from == 0;
  for (int64_t i = 0; i < part.blocks; ++i) {
    float *states = part.memory + i * floats_of_part(N), *kept = states + N * kChannels;
    Scan scan(plan, part.image, part.first + i, part.direction, first ? nullptr : kept);
    typename Scan::Row h[kRows];
    if (first) {
      scan.keep(kept);
      scan.clear(h);
    } else {
      for (int64_t n = 0; n < N; ++n) h[n] = L::load(states + n * kChannels);
    }
    scan.look_ahead(part);
    for (int64_t t = part.from; t < part.to; t += Scan::kSteps) {
      scan.template advance_block<true>(decay, t, h);
    }
    for (int64_t n = 0; n < N; ++n) L::store(states + n * kChannels, h[n]);
  }
}

template <class Isa, DType kType>
void scan_part_typed(const ScanPlan& plan, const ScanPart& part) {
  if (plan.one_decay()) {
    return scan_steps<Isa, DirectionScan<Isa, kType, 0, true>, kMaxStates>(plan, part);
  }
  if (plan.d_state == 1) return scan_steps<Isa, DirectionScan<Isa, kType, 1>, 1>(plan, part);
  if constexpr (Isa::kStateVectors >= 16) {
    if (plan.d_state == 16) return scan_steps<Isa, DirectionScan<Isa, kType, 16>, 16>(plan, part);
    if (plan.d_state == 8) return scan_steps<Isa, DirectionScan<Isa, kType, 8>, 8>(plan, part);
  }
  scan_steps<Isa, DirectionScan<Isa, kType, 0>, kMaxStates>(plan, part);
}

template <class Isa>
void scan_part(const ScanPlan& plan, const ScanPart& part) {
  const typename Isa::FlushDenormals flush;
  switch (plan.dtype) {
    case DType::kFloat16:
      return scan_part_typed<Isa, DType::kFloat16>(plan, part);
    case DType::kBFloat16:
      return scan_part_typed<Isa, DType::kBFloat16>(plan, part);
    default:
      return scan_part_typed<Isa, DType::kFloat32>(plan, part);
  }
}

template <class Isa, DType kType>
void scan_block(const ScanPlan& plan, int64_t image, int64_t block) {
  if (plan.together()) {
    SharedScan<Isa, kType> scan(plan, image, block);
    return scan.run();
  }
  // Specialised where the states of a unit fit in the registers.
  if constexpr (Isa::kStateVectors >= 16) {
    if (plan.d_state == 16) return scan_directions<Isa, kType, 16>(plan, image, block);
    if (plan.d_state == 8) return scan_directions<Isa, kType, 8>(plan, image, block);
  }
  scan_directions<Isa, kType, 0>(plan, image, block);
}

template <class Isa, DType kType>
void scan_typed(const ScanPlan& plan, int64_t image, int64_t first, int64_t count) {
  if (plan.one_decay()) {
    using Scan = DirectionScan<Isa, kType, 0, true>;
    return scan_wide<Isa, Scan, kMaxStates>(plan, image, first, count);
  }
  if (!plan.together() && plan.d_state == 1) {
    using Scan = DirectionScan<Isa, kType, 1>;
    return scan_wide<Isa, Scan, kWidest>(plan, image, first, count);
  }
  for (int64_t i = 0; i < count; ++i) scan_block<Isa, kType>(plan, image, first + i);
}

template <class Isa>
void scan_unit(const ScanPlan& plan, int64_t image, int64_t unit) {
  const int64_t blocks = (plan.d_inner + kChannels - 1) / kChannels;
  const int64_t first = unit * plan.blocks_per_unit;
  const int64_t rest = blocks - first;
  const int64_t count = rest < plan.blocks_per_unit ? rest : plan.blocks_per_unit;
  // Without this a decaying state spends its tail in denormals, at a hundred cycles each.
  const typename Isa::FlushDenormals flush;
  switch (plan.dtype) {
    case DType::kFloat16:
      return scan_typed<Isa, DType::kFloat16>(plan, image, first, count);
    case DType::kBFloat16:
      return scan_typed<Isa, DType::kBFloat16>(plan, image, first, count);
    default:
      return scan_typed<Isa, DType::kFloat32>(plan, image, first, count);
  }
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CPU_SCAN_IMPL_H_
