// Contract of TokenConv and TokenConv2D, and which token a tap reads, which the CPU and the CUDA
// kernels share.
#ifndef VSSM_PLUGINS_KERNELS_TOKEN_CONV_H_
#define VSSM_PLUGINS_KERNELS_TOKEN_CONV_H_

#include "plugins/kernels/host_device.h"
#include "plugins/kernels/types.h"

namespace vssm {

constexpr int64_t kMaxConvDirections = 2;
constexpr int64_t kMaxConvWidth = 32;
constexpr int64_t kMaxConvSide = 7;
// Of one token, in one direction.
constexpr int64_t kMaxTaps = kMaxConvSide * kMaxConvSide;

/// The depthwise convolutions in front of a scan, over a list of tokens. Direction 0 looks back:
/// with o = width - 1 - j, tap j reads the token o before; direction 1 reads the token o after:
///
///   y[b, k, t] = silu(bias[k] + sum over j of weight[k, :, j] x[b, s(k, t, o)])
///
/// where a token that is not there adds nothing. With `by_position` o counts original positions,
/// so that pruned tokens are the zeros of the full list; else it counts the list's tokens.
///
/// TokenConv2D is `on_grid`: the tokens lie on a grid, row by row. Position p, or with by_position
/// 0 the p-th token of all, is in row p / grid_width and column p % grid_width. There is one
/// direction, and its taps are a square of odd side around the token: the one in row r and column c
/// of it reads the token r - side / 2 rows below and c - side / 2 columns to the right.
///
/// Contiguous, channels last; T is float32, float16 or bfloat16, and sums are float32.
/// Source: Gu & Dao, arXiv:2312.00752 (the convolution); Zhu et al., arXiv:2401.09417 (both ways);
/// Yang et al., arXiv:2403.17695 (the grid).
struct TokenConvArgs {
  const char* name = "TokenConv";  // the operator's, for messages
  Operand x;                       // T (batch, seqlen, d_inner)
  Operand weight;                  // float32 (directions, d_inner, width) or (d_inner, side, side)
  Operand bias;                    // float32 (directions, d_inner) or (d_inner)
  Operand position;                // int32 (1 or batch, seqlen), ascending
  int64_t by_position = 0;
  int64_t activation = 1;  // 0: y is the sum itself
  void* y = nullptr;       // T (batch, directions, seqlen, d_inner), overwritten; on a grid T
                           // (batch, seqlen, d_inner)
  bool on_grid = false;
  int64_t grid_height = 0, grid_width = 0;
  int64_t group = 0;  // d_inner; for the body, which can not read it off a shape
};

struct TokenConvShape {
  int64_t batch, seqlen, directions, d_inner, width;
  int64_t side;  // of the square of taps on a grid, whose width is side^2; 0 on a line
};

/// What y must be, without its memory.
Operand y_of(const TokenConvArgs& args, const TokenConvShape& shape);

/// The rules on attributes alone, for who knows no shapes yet.
Status check_attributes(const TokenConvArgs& args);

/// Every rule on ranks, sizes, types and attributes, once, for every adapter. Reads no data.
Status check(const TokenConvArgs& args, TokenConvShape* shape);

/// The rules on values: where positions count, they ascend, on a grid within it. Needs host memory.
Status check_values(const TokenConvArgs& args, const TokenConvShape& shape);

/// Checks, then runs on the fastest instruction set of this processor (or VSSM_CPU_ISA's).
Status token_conv_cpu(const TokenConvArgs& args, const ParallelFor& parallel_for);

/// The gradients of a loss that reaches the inputs through y alone, from dy, its gradient by y.
/// With g[b, k, t] = dy[b, k, t] times the slope of silu at the sum of that token, if y is active:
///
///   dx[b, s] += weight[k, :, j] g[b, k, t]      for every tap j of every (k, t) that reads s
///   dweight[k, :, j] += g[b, k, t] x[b, s];     dbias[k] += g[b, k, t]
///
/// `position` is integers and has none. Same numbers whatever the number of threads.
struct TokenConvBackwardArgs {
  TokenConvArgs forward;     // T is float32; its y is not read
  Operand dy;                // float32, of y's shape
  float* dx = nullptr;       // of x's shape, overwritten, as are the others
  float* dweight = nullptr;  // of the weight's
  float* dbias = nullptr;    // of the bias's
};

/// Every rule of the forward pass, and those of dy and of T. Reads no data.
Status check(const TokenConvBackwardArgs& args, TokenConvShape* shape);

/// Checks, values included, then runs on the instruction set of token_conv_cpu.
Status token_conv_backward_cpu(const TokenConvBackwardArgs& args, const ParallelFor& parallel_for);

/// Device memory that a launch needs at this shape; never less for larger sizes.
int64_t token_conv_cuda_workspace(const TokenConvShape& shape);

/// Checks, then launches; for positions of any value it touches no memory outside its operands.
/// Built where there is a CUDA compiler (VSSM_CUDA).
Status token_conv_cuda(const TokenConvArgs& args, const CudaLaunch& launch);

/// The token that is `offset` positions after token t, or before it where that is negative; -1
/// where there is none. `position` is an image's, ascending; null where offsets count tokens.
/// Positions ascend, so it is no more than `offset` tokens away; where they do not, the token
/// found is still one of the list.
VSSM_HOST_DEVICE int32_t token_at(const int32_t* position, int32_t seqlen, int32_t t,
                                  int32_t offset) {
  const int32_t last = t + offset;
  if (position == nullptr) return last >= 0 && last < seqlen ? last : -1;
  const int32_t step = offset < 0 ? -1 : 1;
  const int64_t wanted = int64_t{position[t]} + offset;
  for (int32_t s = t; s >= 0 && s < seqlen; s += step) {
    if (position[s] == wanted) return s;
    if (s == last) break;
  }
  return -1;
}

/// The tokens that one row of a grid's taps reads, `down` rows below token t, from left to right;
/// -1 where there is none. `position` as in token_at; for any values every token is of the list.
VSSM_HOST_DEVICE void tokens_on_grid(const int32_t* position, int32_t seqlen, int32_t t,
                                     int64_t grid_width, int32_t side, int32_t down,
                                     int32_t* tokens) {
  const int64_t place = position == nullptr ? t : position[t];
  const int64_t column = place % grid_width, first = place + down * grid_width - side / 2;
  // The first token that is not before them.
  int32_t low = 0, high = seqlen;
  if (position == nullptr) {
    low = high = first <= 0 ? 0 : first >= seqlen ? seqlen : static_cast<int32_t>(first);
  }
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (position[middle] < first) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  for (int32_t i = 0; i < side; ++i) {
    const bool here = low < seqlen && (position == nullptr ? low : position[low]) == first + i;
    const int64_t under = column - side / 2 + i;
    // What is beyond the grid's edge on this row is at the other edge of the next one.
    tokens[i] = here && under >= 0 && under < grid_width ? low : -1;
    if (here) ++low;
  }
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_TOKEN_CONV_H_
