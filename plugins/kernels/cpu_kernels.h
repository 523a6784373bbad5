// What the per-ISA translation units of the CPU kernels offer to the dispatcher. Plain data and
// function pointers only: nothing in here may be compiled twice under different flags.
#ifndef VSSM_PLUGINS_KERNELS_CPU_KERNELS_H_
#define VSSM_PLUGINS_KERNELS_CPU_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "plugins/kernels/dtype.h"

namespace vssm {

// Channels of a block: one AVX-512 vector, two AVX2 vectors, four of SSE2 or NEON.
constexpr int64_t kChannels = 16;
// Blocks of a unit of work at most; more than one where a channel has a single state.
constexpr int64_t kWidest = 4;
// The states of a block and its A lie on the stack of whatever thread runs it: 2 x 16 KiB at most.
constexpr int64_t kMaxStates = 256;

/// A checked scan, ready to run. Shapes as in selective_scan.h.
struct ScanPlan {
  int64_t batch, seqlen, directions, d_inner, d_state;
  int64_t Ku, Kd, Ka, Kb, Kc, Ks;
  int64_t blocks_per_unit;  // of kChannels channels; 1 to kWidest
  DType dtype;              // of u, delta, z and y
  const void *u, *delta;
  const float* A;
  const float *B, *C;  // already float32
  const float *D, *delta_bias;
  const int32_t *order, *gap;
  int64_t order_stride, gap_stride;  // elements from one image to the next; 0 when shared
  const void* z;                     // or null
  const float* delta0;               // or null
  bool delta_softplus, params_by_step;
  float scale;
  float* sums;  // (batch, seqlen, d_inner): y itself when it is float32; unused for one direction
  void* y;
};

/// One instruction set's kernels.
struct CpuKernels {
  const char* name;
  /// All directions of the channels from unit * blocks_per_unit * kChannels on, of one image.
  void (*scan_unit)(const ScanPlan& plan, int64_t image, int64_t unit);
  /// float16 or bfloat16 to float32, exact.
  void (*widen)(const void* source, DType dtype, float* target, int64_t count);
  /// Pieces for tests and for the floor of a benchmark; `count` is a multiple of kChannels.
  void (*decay)(const float* dt, const float* A, float* target, int64_t count);
  void (*softplus)(const float* x, float* target, int64_t count);
  /// Evaluates `rounds` * kChannels * 16 decays exp2(dt A), summed so that none can be left out.
  float (*decay_rounds)(int64_t rounds);
};

extern const CpuKernels kBaselineKernels;
#ifdef VSSM_X86_KERNELS
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
#endif

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CPU_KERNELS_H_
