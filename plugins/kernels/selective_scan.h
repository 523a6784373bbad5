// Contract of SelectiveScan, GatedSelectiveScan and SelectiveScanConstantGap.
#ifndef VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_H_
#define VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_H_

#include "plugins/kernels/types.h"

namespace vssm {

constexpr int64_t kMaxDState = 256;

/// All directions of a layer, summed in token order. Per direction k and step t, with
/// q = order[b, k, t] and s = params_by_step ? t : q:
///
///   dt   = softplus(delta[b, s, k] + delta_bias[k])       (no softplus when delta_softplus is 0)
///   span = gap[b, k, t] dt,  or  dt + (gap[b, k, t] - 1) delta0[k];  at t = 0: dt
///   h    = exp(span A[k]) h + dt B[b, s, k] u[b, q, k]
///   y[b, q] += scale (C[b, s, k] . h + D[k] u[b, q, k]);  at the end, if gated: y *= silu(z)
///
/// A's last axis is d_state or 1: with 1, all states of a channel decay alike (Mamba-2), at one
/// exponential a channel and step.
///
/// Contiguous, channels last; `direction_axis` says whether the directions of u, delta, B and C lie
/// inside or outside of the tokens. T is float32, float16 or bfloat16, and state, decay and sums
/// are float32. Ku, Kd, Ka, Kb, Kc and Ks are each 1 (shared) or `directions`. Sources: Gu & Dao,
/// arXiv:2312.00752, Algorithm 2; alignment: Zhan et al., arXiv:2409.18962.
struct SelectiveScanArgs {
  const char* name = "SelectiveScan";  // the operator's, for messages
  Operand u;                           // T (batch, seqlen, Ku, d_inner)
  Operand delta;                       // T (batch, seqlen, Kd, d_inner)
  Operand A;                           // float32 (Ka, d_inner, 1 or d_state), negative
  Operand B;                           // T (batch, seqlen, Kb, d_state)
  Operand C;                           // T (batch, seqlen, Kc, d_state)
  Operand D;                           // float32 (Ks, d_inner)
  Operand delta_bias;                  // float32 (Kd, d_inner)
  Operand order;                       // int32 (1 or batch, directions, seqlen), permutations
  Operand gap;                         // int32 (1 or batch, directions, seqlen), >= 1 after t = 0
  bool gated = false;                  // GatedSelectiveScan: there is a z
  bool constant_gap = false;           // SelectiveScanConstantGap: there is a delta0
  Operand z;                           // T (batch, seqlen, d_inner)
  Operand delta0;                      // float32 (Kd, d_inner)
  int64_t delta_softplus = 1;
  int64_t params_by_step = 0;
  int64_t direction_axis =
      2;  // of u, delta, B and C; with 1 their shapes are (batch, K, seqlen, .)
  float scale = 1.0F;
  void* y = nullptr;  // T (batch, seqlen, d_inner), overwritten
};

/// The sizes that `check` found, for kernels.
struct SelectiveScanShape {
  int64_t batch, seqlen, directions, d_inner, d_state;
  int64_t Ku, Kd, Ka, Kb, Kc, Ks;
  int64_t decays;  // of a channel at a step, A's last axis: d_state, or 1
  bool order_per_image, gap_per_image;
  bool directions_outside;  // direction_axis is 1

  /// Whether all states of a channel share one decay, where there are several.
  bool one_decay() const { return decays == 1 && d_state > 1; }
};

/// Elements from one image, one direction and one token of an operand to the next; 0 where they
/// share it.
struct Strides {
  int64_t image, direction, token;
};

/// Those of u, delta, B or C, which has K directions and rows of `width`.
inline Strides strides_of(const SelectiveScanShape& shape, int64_t K, int64_t width) {
  const int64_t image = shape.seqlen * K * width;
  if (shape.directions_outside) return {image, K == 1 ? 0 : shape.seqlen * width, width};
  return {image, K == 1 ? 0 : width, K * width};
}

/// The rules on attributes alone, for who knows no shapes yet.
Status check_attributes(const SelectiveScanArgs& args);

/// Every rule on ranks, sizes, types and attributes, once, for every adapter. Reads no data.
Status check(const SelectiveScanArgs& args, SelectiveScanShape* shape);

/// Every rule on values: `order` a permutation in range, `gap` >= 1. Needs host memory.
Status check_values(const SelectiveScanArgs& args, const SelectiveScanShape& shape);

/// Checks, then runs on the fastest instruction set of this processor (or VSSM_CPU_ISA's).
Status selective_scan_cpu(const SelectiveScanArgs& args, const ParallelFor& parallel_for);

/// The CUDA kernels, which cannot look at order and gap before they run: a step whose token is out
/// of range takes u, B, C and, unless params_by_step, delta as zero and writes nothing; y is then
/// unspecified for tokens that some direction does not name exactly once. Nothing outside the
/// operands is touched. kThroughput: many images; kLatency: few. kAuto takes one by the amount of
/// work against the size of the GPU (a rule of arithmetic, not measured); TensorRT tries both.
enum class ScanVariant : int32_t { kAuto = 0, kThroughput = 1, kLatency = 2 };
constexpr ScanVariant kScanVariants[] = {ScanVariant::kThroughput, ScanVariant::kLatency};

/// Device memory that a launch needs at this shape, on any GPU; never less for larger sizes of one
/// kernel (a d_state of 1 has kernels of its own).
int64_t selective_scan_cuda_workspace(const SelectiveScanShape& shape, DType dtype,
                                      ScanVariant variant);

/// Checks all but values, then launches. Built where there is a CUDA compiler (VSSM_CUDA).
Status selective_scan_cuda(const SelectiveScanArgs& args, ScanVariant variant,
                           const CudaLaunch& launch);

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_H_
