// How the latency scan is cut into blocks, chunks and tiles: plain arithmetic, for host and device.
#ifndef VSSM_PLUGINS_KERNELS_CUDA_SCAN_LATENCY_H_
#define VSSM_PLUGINS_KERNELS_CUDA_SCAN_LATENCY_H_

#include "plugins/kernels/cuda/scan_params.h"
#include "plugins/kernels/host_device.h"

namespace vssm {

constexpr int kLatencySteps = 4;  // that a thread takes at a time

/// A block has `channels` channels of an image; its threads are directions x chunks x channels x
/// lanes, filled up to whole warps. Where there are more directions, or steps, than it takes at
/// once, it takes them in turn.
struct LatencyCut {
  int32_t lanes;       // threads that share the states of a channel
  int32_t states;      // of each
  int32_t channels;    // a power of two
  int32_t directions;  // at once
  int32_t chunks;      // scanned at once
  int32_t chunk;       // steps of each, a multiple of kLatencySteps
  int32_t steps;       // of a tile: chunks * chunk
};

/// Where things lie in shared memory, in floats. Everything that is read four floats at a time lies
/// before what may have any size.
struct LatencyLayout {
  int32_t rows;      // (directions, steps, 2, lanes * states): B, C
  int32_t pairs;     // (directions, steps, channels, 2): span, dt u
  int32_t ends;      // (directions, chunks, channels, lanes * states): states behind each chunk
  int32_t carry;     // (2, directions, channels, lanes * states): states between tiles
  int32_t spans;     // (directions, chunks, channels): sums of the chunk's spans
  int32_t tokens;    // (directions, steps) int32
  int32_t partials;  // (all directions, seqlen, channels), if they lie here
};

VSSM_HOST_DEVICE LatencyLayout latency_layout(const LatencyCut& cut) {
  const int32_t width = cut.lanes * cut.states;
  LatencyLayout at = {};
  at.pairs = at.rows + cut.directions * cut.steps * 2 * width;
  at.ends = at.pairs + cut.directions * cut.steps * cut.channels * 2;
  at.carry = at.ends + cut.directions * cut.chunks * cut.channels * width;
  at.spans = at.carry + 2 * cut.directions * cut.channels * width;
  at.tokens = at.spans + cut.directions * cut.chunks * cut.channels;
  at.partials = at.tokens + cut.directions * cut.steps;
  return at;
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CUDA_SCAN_LATENCY_H_
