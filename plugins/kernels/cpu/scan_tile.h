// A of one unit of work, laid out for the scans; a template over an instruction set, as cpu_lanes.h
// explains.
#ifndef VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_CPU_TILE_H_
#define VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_CPU_TILE_H_

#include <cstdint>

#include "plugins/kernels/cpu/lanes.h"

namespace vssm {

/// One row of channels a state, times log2(e) kCells, as Isa::Decay takes it.
template <class Isa, int kRows>
struct Tile {
  typename Lanes<Isa>::Row lowest;  // per channel; -inf where A is positive or NaN somewhere
  alignas(64) float rows[kRows * kChannels];

  VSSM_INLINE const float* row(int64_t n) const { return rows + n * kChannels; }

  /// From A (channels, states). Channels that do not exist decay to 1.
  VSSM_INLINE void fill(const float* A, int64_t states, int64_t width) {
    // Copied first and read as vectors later: a vector load right behind the stores that make it up
    // would wait for each of them.
    for (int64_t c = 0; c < width; ++c) {
      for (int64_t n = 0; n < states; ++n) rows[n * kChannels + c] = A[c * states + n];
    }
    for (int64_t n = 0; n < states && width < kChannels; ++n) {
      for (int64_t c = width; c < kChannels; ++c) rows[n * kChannels + c] = -0.0F;
    }
    const auto unit = Isa::set1(1.44269504F * Isa::kCells);
    lowest = Lanes<Isa>::splat(-0.0F);
    bool negative = true;
    for (int64_t n = 0; n < states; ++n) {
      for (int v = 0; v < Lanes<Isa>::kVectors; ++v) {
        float* place = rows + n * kChannels + v * Isa::kLanes;
        const auto a = Isa::load(place) * unit;
        Isa::store(place, a);
        lowest.v[v] = Isa::min(a, lowest.v[v]);
        negative &= Isa::none_above_zero(a);
      }
    }
    if (!negative) lowest = Lanes<Isa>::splat(-__builtin_inff());
  }
};

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_CPU_TILE_H_
