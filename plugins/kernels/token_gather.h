// Contract of TokenGather and TokenGather1.
#ifndef VSSM_PLUGINS_KERNELS_TOKEN_GATHER_H_
#define VSSM_PLUGINS_KERNELS_TOKEN_GATHER_H_

#include "plugins/kernels/types.h"

namespace vssm {

/// Keeps the token whose position is `protected_position` and the highest scores, in ascending slot
/// order. Equal scores keep the lower slot, -0 equals +0, NaN ranks below -inf, the protected token
/// above +inf; if no slot holds it, scores alone decide. Positions are distinct within an image.
/// Source of the selection: Zhan et al., arXiv:2409.18962.
struct TokenGatherArgs {
  const char* name = "TokenGather";  // the operator's, for messages
  int count = 2;                     // tensors whose rows are gathered: 1 or 2
  Operand score;                     // float32 (batch, seqlen)
  Operand position;                  // int32 (1 or batch, seqlen)
  Operand x[2];                      // (batch, seqlen, d0), (batch, seqlen, d1), any float type
  int64_t num_keep = 0;
  int64_t protected_position = -1;   // -1: none
  int32_t* kept_position = nullptr;  // (batch, num_keep), overwritten
  void* y[2] = {nullptr, nullptr};   // (batch, num_keep, d), of the type of x, overwritten
};

struct TokenGatherShape {
  int64_t batch, seqlen;
  int64_t width[2];  // d0, d1
};

/// The rule on num_keep alone, for who knows no shapes yet; `seqlen` is -1 where it is not known.
Status check_num_keep(const TokenGatherArgs& args, int64_t seqlen);

/// The rules on all attributes, likewise.
Status check_attributes(const TokenGatherArgs& args, int64_t seqlen);

/// Every rule on ranks, sizes, types and attributes, once, for every adapter. Reads no data.
Status check(const TokenGatherArgs& args, TokenGatherShape* shape);

/// Checks, then runs.
Status token_gather_cpu(const TokenGatherArgs& args, const ParallelFor& parallel_for);

/// Device memory that a launch needs at this shape; never less for larger sizes.
int64_t token_gather_cuda_workspace(const TokenGatherShape& shape);

/// Checks, then launches. Built where there is a CUDA compiler (VSSM_CUDA).
Status token_gather_cuda(const TokenGatherArgs& args, const CudaLaunch& launch);

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_TOKEN_GATHER_H_
