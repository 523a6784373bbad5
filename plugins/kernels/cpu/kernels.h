// What the per-ISA translation units of the CPU kernels offer to the dispatcher. Plain data and
// function pointers only: nothing in here may be compiled twice under different flags.
#ifndef VSSM_PLUGINS_KERNELS_CPU_KERNELS_H_
#define VSSM_PLUGINS_KERNELS_CPU_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "plugins/kernels/dtype.h"

namespace vssm {

struct SelectiveScanArgs;  // declared only: their header brings code, which kernels must not
struct SelectiveScanShape;

// Channels of a block: one AVX-512 vector, two AVX2 vectors, four of SSE2 or NEON.
constexpr int64_t kChannels = 16;
// Blocks of a unit of work at most; more than one where a channel has a single state or decay.
constexpr int64_t kWidest = 4;
// The states of a unit and its A lie on the stack of whatever thread runs it: 2 x 16 KiB at most.
constexpr int64_t kMaxStates = 256;
// Directions that a unit takes step by step together, at most.
constexpr int64_t kMaxTogether = 4;

/// A checked scan, ready to run. Shapes as in selective_scan.h.
struct ScanPlan {
  int64_t batch, seqlen, directions, d_inner, d_state;
  int64_t Ku, Kd, Ka, Kb, Kc, Ks;
  // Elements from one image, one direction and one token to the next; 0 where they share it.
  struct Steps {
    int64_t image, direction, token;
  };
  Steps u_steps, delta_steps, B_steps, C_steps;
  int64_t decays;           // of a channel at a step: d_state, or 1
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
  bool every_place;  // whether each step stands for its own place alone: gaps of 1
  float scale;
  float* sums;  // (batch, seqlen, d_inner): y itself when it is float32; unused for one direction
  void* y;

  bool one_decay() const { return decays == 1 && d_state > 1; }

  /// Whether the directions share step sizes, A and C and take their steps together.
  bool together() const {
    return !one_decay() && params_by_step && Kd == 1 && Ka == 1 && Kc == 1 && directions > 1 &&
           directions <= kMaxTogether && d_state <= kMaxStates / kMaxTogether;
  }
};

/// Some steps of one direction of neighbouring blocks of channels, one block after the other: those
/// from `from`, which is 0 or the `to` of the part before.
struct ScanPart {
  int64_t image, first, blocks, direction, from, to;
  float* memory;  // of the first block, aligned; floats_of_part(d_state) for each
};

constexpr int64_t floats_of_part(int64_t d_state) { return (2 * d_state + 2) * kChannels; }

/// `blocks_per_unit` is left to the caller; B and C must be float32 before the kernels run.
ScanPlan plan_from(const SelectiveScanArgs& args, const SelectiveScanShape& shape);

/// A checked backward pass, ready to run. A unit of work is one image and one group of blocks;
/// where units share a gradient each has a row of its own, and the rows are added up afterwards.
struct BackwardPlan {
  ScanPlan scan;  // float32; its y and sums are unused
  const float* dy;
  float *du, *ddelta;
  float* dz;  // or null
  // Row 0 is the gradient itself; row i begins at rest + (i - 1) size.
  struct Rows {
    float *first, *rest;
    int64_t size;
  };
  Rows dB, dC;               // a row for each group, with every image
  Rows dA, dD, ddelta_bias;  // a row for each image
  Rows ddelta0;              // likewise; its `first` may be null
  int64_t blocks, groups, blocks_per_group;
  int64_t chunk;  // steps between the states that the first sweep keeps
  // Where each part of a unit's scratch begins, in floats; rows of kChannels floats, each aligned.
  int64_t starts, carry, sums_of_A, sums, decays, states, lanes_of_B, lanes_of_C, scratch;
};

/// A checked convolution, as its kernel sees it. Shapes as in token_conv.h.
struct ConvPlan {
  int64_t d_inner;
  DType dtype;  // of x and y
  bool activation;
};

/// A tap that reads a token: the token's row of x, and the tap of every channel, padded to whole
/// blocks of kChannels.
struct ConvTap {
  const void* x;
  const float* weight;
};

// Columns of a grid that one tile has, whose sums are held at once; places around them that the
// widest square of taps reads.
constexpr int kTileColumns = 4;
constexpr int kMaxWindow = 7 * (7 + kTileColumns - 1);

/// A square of taps, row by row: side * side of them, each padded as the taps above; and the bias.
struct ConvSquare {
  int64_t side, padded;
  const float *weight, *bias;
};

/// Neighbouring columns in a row of a grid, some of which have a token: where each one's row of y
/// is, and above it the rows of x that the taps read. Each of `side` rows of the window has
/// side + kTileColumns - 1 columns, and begins side / 2 left of the tile. Null where no token is.
struct ConvTile {
  const void* x[kMaxWindow];
  void* y[kTileColumns];
};

/// The same tap with where its gradients are added: to the token's row, which ends with the last
/// channel as x does, and to the tap's, which is padded.
struct ConvGradientTap {
  const float* x;
  const float* weight;
  float* dx;
  float* dweight;
};

/// One instruction set's kernels.
struct CpuKernels {
  const char* name;
  /// One part; `to` is a multiple of kChannels or the end of the list.
  void (*scan_part)(const ScanPlan& plan, const ScanPart& part);
  /// All directions of the channels from unit * blocks_per_unit * kChannels on, of one image.
  void (*scan_unit)(const ScanPlan& plan, int64_t image, int64_t unit);
  /// The gradients of one image and one group of blocks.
  void (*backward_unit)(const BackwardPlan& plan, int64_t image, int64_t group, float* scratch);
  /// The row y of one token in one direction, from `count` taps. `bias` is padded as the taps are.
  void (*conv_token)(const ConvPlan& plan, const ConvTap* taps, int64_t count, const float* bias,
                     void* y);
  /// The rows y of the tokens of tiles.
  void (*conv_tiles)(const ConvPlan& plan, const ConvSquare& square, const ConvTile* tiles,
                     int64_t count);
  /// Adds the gradients of one token in one direction; all float32. `dbias` is padded.
  void (*conv_token_backward)(const ConvPlan& plan, const ConvGradientTap* taps, int64_t count,
                              const float* bias, const float* dy, float* dbias);
  /// float16 or bfloat16 to float32, exact.
  void (*widen)(const void* source, DType dtype, float* target, int64_t count);
  /// Pieces for tests and for the floor of a benchmark; `count` is a multiple of kChannels.
  void (*decay)(const float* dt, const float* A, float* target, int64_t count);
  void (*softplus)(const float* x, float* target, int64_t count);
  /// Evaluates `rounds` * kChannels * 16 decays exp2(dt A), summed so that none can be left out.
  float (*decay_rounds)(int64_t rounds);
  /// As many multiplications, each with an addition, from registers alone.
  float (*product_rounds)(int64_t rounds);
  /// As many values of softplus, likewise.
  float (*softplus_rounds)(int64_t rounds);
};

extern const CpuKernels kBaselineKernels;
#ifdef VSSM_X86_KERNELS
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
#endif

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CPU_KERNELS_H_
