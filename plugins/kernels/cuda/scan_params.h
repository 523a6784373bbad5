// What the CUDA scans get: plain data, and the arithmetic on it that host and device share.
#ifndef VSSM_PLUGINS_KERNELS_CUDA_SCAN_PARAMS_H_
#define VSSM_PLUGINS_KERNELS_CUDA_SCAN_PARAMS_H_

#include "plugins/kernels/host_device.h"
#include "plugins/kernels/selective_scan.h"

namespace vssm {

/// States that a kernel holds at once; a larger d_state is scanned in groups, one after the other.
constexpr int kStateGroup = 16;

/// The same of the throughput kernel where all states of a channel share one decay, which takes one
/// register instead of as many as there are states. By reckoning, not measured: the fewer groups,
/// the fewer times step sizes are computed anew.
constexpr int kOneDecayGroup = 32;

/// Directions that one thread takes at once where they share their decays, as PlainMamba's do.
constexpr int kTogether = 4;

/// A checked scan. Strides are in elements; a shared axis has the stride 0.
struct ScanParams {
  const void *u, *delta, *B, *C;  // T
  const void* z;                  // T; null unless gated
  const float *A, *D, *delta_bias;
  const float* delta0;  // null unless the gap is constant
  const int32_t *order, *gap;
  void* y;
  float* sums;  // between directions, as each kernel says; null: in shared memory
  float scale;
  int32_t seqlen, directions, d_inner, d_state;
  int32_t groups;  // of states
  // From one token to the next, from one direction to the next, and from one image to the next.
  int32_t u_token, delta_token, B_token, C_token;
  int64_t u_direction, delta_direction, B_direction, C_direction;
  int64_t u_image, delta_image, B_image, C_image;
  int32_t D_direction, bias_direction;  // the latter of delta0, too
  int64_t A_direction;
  int32_t A_channel;  // from one channel to the next: d_state, or 1 for one decay a channel
  int64_t order_image, gap_image;
  int32_t blocks_per_image;
  bool softplus, by_step;
  bool one_decay;               // whether several states of a channel share one decay
  bool wide_A, wide_B, wide_C;  // whether groups of four states may be loaded at once
};

/// The operands of an image; `operand` is T's first element.
template <typename T>
VSSM_HOST_DEVICE const T* image_of(const void* operand, int64_t image, int64_t image_stride) {
  return static_cast<const T*>(operand) + image * image_stride;
}

/// Whether a token of `order` is one: another is read as zero and not written.
VSSM_HOST_DEVICE bool is_token(int32_t token, int32_t seqlen) {
  return static_cast<uint32_t>(token) < static_cast<uint32_t>(seqlen);
}

/// The decays that a step has beyond its own one: gap - 1, none at the first step.
VSSM_HOST_DEVICE float extra_places(int32_t step, int32_t gap) {
  return step == 0 ? 0.0F : static_cast<float>(gap) - 1.0F;
}

/// Threads of a block whose threads are channels: full warps, blocks of an image about as large as
/// each other.
VSSM_HOST_DEVICE int32_t channel_threads(int32_t d_inner, int32_t most) {
  const int32_t warps = (d_inner - 1) / 32 + 1;
  const int32_t blocks = (warps - 1) / (most / 32) + 1;
  return ((warps - 1) / blocks + 1) * 32;
}

/// Whether the directions share step sizes, A and C, so that they go on together; with one decay
/// for all states there is hardly an exponential to share.
VSSM_HOST_DEVICE bool fits_together(const ScanParams& p) {
  return !p.one_decay && p.by_step && p.directions == kTogether && p.delta_direction == 0 &&
         p.A_direction == 0 && p.C_direction == 0;
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CUDA_SCAN_PARAMS_H_
