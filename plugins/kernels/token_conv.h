// Contract of TokenConv, and which token a tap reads, which the CPU and the CUDA kernel share.
#ifndef VSSM_PLUGINS_KERNELS_TOKEN_CONV_H_
#define VSSM_PLUGINS_KERNELS_TOKEN_CONV_H_

#include "plugins/kernels/host_device.h"
#include "plugins/kernels/types.h"

namespace vssm {

constexpr int64_t kMaxConvDirections = 2;
constexpr int64_t kMaxConvWidth = 32;

/// The depthwise convolutions in front of a scan, over a list of tokens. Direction 0 looks back:
/// with o = width - 1 - j, tap j reads the token o before; direction 1 reads the token o after:
///
///   y[b, k, t] = silu(bias[k] + sum over j of weight[k, :, j] x[b, s(k, t, o)])
///
/// where a token that is not there adds nothing. With `by_position` o counts original positions,
/// so that pruned tokens are the zeros of the full list; else it counts the list's tokens.
/// Contiguous, channels last; T is float32, float16 or bfloat16, and sums are float32.
/// Source: Gu & Dao, arXiv:2312.00752 (the convolution); Zhu et al., arXiv:2401.09417 (both ways).
struct TokenConvArgs {
  const char* name = "TokenConv";  // the operator's, for messages
  Operand x;                       // T (batch, seqlen, d_inner)
  Operand weight;                  // float32 (directions, d_inner, width)
  Operand bias;                    // float32 (directions, d_inner)
  Operand position;                // int32 (1 or batch, seqlen), ascending
  int64_t by_position = 0;
  int64_t activation = 1;  // 0: y is the sum itself
  void* y = nullptr;       // T (batch, directions, seqlen, d_inner), overwritten
};

struct TokenConvShape {
  int64_t batch, seqlen, directions, d_inner, width;
};

/// The rules on attributes alone, for who knows no shapes yet.
Status check_attributes(const TokenConvArgs& args);

/// Every rule on ranks, sizes, types and attributes, once, for every adapter. Reads no data.
Status check(const TokenConvArgs& args, TokenConvShape* shape);

/// The rule on values: where positions count, they ascend. Needs host memory.
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
  Operand dy;                // float32 (batch, directions, seqlen, d_inner)
  float* dx = nullptr;       // (batch, seqlen, d_inner), overwritten, as are the others
  float* dweight = nullptr;  // (directions, d_inner, width)
  float* dbias = nullptr;    // (directions, d_inner)
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

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_TOKEN_CONV_H_
