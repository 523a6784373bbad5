// What the CUDA scans get: plain data, and the arithmetic on it that host and device share.
#ifndef VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_CUDA_PARAMS_H_
#define VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_CUDA_PARAMS_H_

#include "plugins/kernels/selective_scan.h"

#if defined(__CUDACC__)
#define VSSM_HOST_DEVICE __host__ __device__
#else
#define VSSM_HOST_DEVICE
#endif

namespace vssm {

/// States that a kernel holds at once; a larger d_state is scanned in groups, one after the other.
constexpr int kStateGroup = 16;

/// A checked scan. Strides are in elements; a shared axis has the stride 0.
struct ScanParams {
  const void *u, *delta, *B, *C;  // T
  const void* z;                  // T; null unless gated
  const float *A, *D, *delta_bias;
  const float* delta0;  // null unless the gap is constant
  const int32_t *order, *gap;
  void* y;
  float* sums;  // float32 memory between directions, as each kernel says; null: shared memory
  float scale;
  int32_t seqlen, directions, d_inner, d_state;
  int32_t groups;  // of states
  // From one token to the next, and from one direction to the next.
  int32_t u_token, delta_token, B_token, C_token;
  int32_t u_direction, delta_direction, B_direction, C_direction, D_direction;
  int64_t A_direction;
  int64_t order_image, gap_image;
  int32_t blocks_per_image;
  bool softplus, by_step;
  bool wide_A, wide_B, wide_C;  // whether groups of four states may be loaded at once
};

/// How the latency kernel cuts an image. A block has `channels` channels; its threads are
/// directions x chunks x channels x lanes. Directions, and steps, are taken `directions` and `steps`
/// at a time where they are more.
struct LatencyCut {
  int32_t lanes;       // that share the states of a channel
  int32_t channels;    // a power of two
  int32_t directions;  // at once
  int32_t chunks;      // of `steps`, scanned at once
  int32_t chunk;       // steps of a chunk, a multiple of kLatencySteps
  int32_t steps;       // of a tile: chunks * chunk
};

/// Steps that the latency kernel takes at a time.
constexpr int kLatencySteps = 4;

/// The operands of an image; `operand` is T's first element.
template <typename T>
VSSM_HOST_DEVICE const T* image_of(const void* operand, const ScanParams& p, int64_t image,
                                   int32_t token_stride) {
  return static_cast<const T*>(operand) + image * p.seqlen * token_stride;
}

/// Whether a token of `order` is one: another is read as zero and not written.
VSSM_HOST_DEVICE inline bool is_token(int32_t token, int32_t seqlen) {
  return static_cast<uint32_t>(token) < static_cast<uint32_t>(seqlen);
}

/// The decays that a step has beyond its own one: gap - 1, none at the first step.
VSSM_HOST_DEVICE inline float extra_places(int32_t step, int32_t gap) {
  return step == 0 ? 0.0F : static_cast<float>(gap) - 1.0F;
}

/// The params of a checked scan, without sums. Refuses rows too long for 32-bit strides.
Status scan_params(const SelectiveScanArgs& args, const SelectiveScanShape& shape,
                   ScanParams* params);

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_CUDA_PARAMS_H_
