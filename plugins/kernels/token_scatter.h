// Contract of TokenScatter.
#ifndef VSSM_PLUGINS_KERNELS_TOKEN_SCATTER_H_
#define VSSM_PLUGINS_KERNELS_TOKEN_SCATTER_H_

#include <cstdint>

#include "plugins/kernels/types.h"

namespace vssm {

/// The inverse of TokenGather: rows at their positions over a base.
///
///   y[b, position[b, j]] = x[b, j];   y[b, p] = base[b, p] at all other p
///
/// Positions are distinct within an image, in any order, and in [0, full_seqlen). Rows are copied,
/// never computed with. T is float32, float16 or bfloat16.
struct TokenScatterArgs {
  const char* name = "TokenScatter";  // the operator's, for messages
  Operand base;                       // T (batch, full_seqlen, d)
  Operand x;                          // T (batch, seqlen, d)
  Operand position;                   // int32 (1 or batch, seqlen)
  void* y = nullptr;                  // T (batch, full_seqlen, d), overwritten; may be base.data
};

struct TokenScatterShape {
  int64_t batch, full_seqlen, seqlen, width;  // width: d
};

/// Every rule on ranks, sizes and types, once, for every adapter. Reads no data.
Status check(const TokenScatterArgs& args, TokenScatterShape* shape);

/// Checks, positions included, then runs.
Status token_scatter_cpu(const TokenScatterArgs& args, const ParallelFor& parallel_for);

/// Device memory that a launch needs at this shape; never less for larger sizes.
int64_t token_scatter_cuda_workspace(const TokenScatterShape& shape);

/// Checks, then launches. A row whose position is outside is left out, and of rows that share one
/// any is taken. Built where there is a CUDA compiler (VSSM_CUDA).
Status token_scatter_cuda(const TokenScatterArgs& args, const CudaLaunch& launch);

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_TOKEN_SCATTER_H_
