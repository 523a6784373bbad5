// Contract of the backward pass of SelectiveScan, GatedSelectiveScan and SelectiveScanConstantGap.
#ifndef VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_BACKWARD_H_
#define VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_BACKWARD_H_

#include "plugins/kernels/selective_scan.h"

namespace vssm {

/// The gradients of a loss that reaches the inputs through y alone, from dy, its gradient by y.
/// In the words of selective_scan.h, and with a = exp(span A[k]), g[q] = scale dy[q], times
/// silu(z[q]) if gated, each direction goes through its steps backwards, from d = 0 on:
///
///   d      = d + g[q] C[s]             the gradient by h after step t
///   dC[s] += sum over channels of g[q] h;      dB[s] += sum over channels of d dt u[q]
///   e      = d a h(t - 1);             d = d a, for the step before
///   w      = sum over states of d B[s];        f = sum over states of e A
///   du[q] += w dt + g[q] D;            dA += e span;         dD += g[q] u[q]
///   m      = gap[t], or 1 with a delta0 and at t = 0;        ddelta0 += f (gap[t] - 1)
///   v      = (w u[q] + f m) sigmoid(delta[s] + delta_bias)   (no sigmoid without softplus)
///   ddelta[s] += v;                    ddelta_bias += v
///   dz[q]  = dy[q] (y before the gate) sigmoid(z) (1 + z (1 - sigmoid(z)))
///
/// d in w and in dB is that of step t. A gradient has the shape of its input: where an axis is
/// shared it is the sum over what shares it. `order` and `gap` are integers and have none.
///
/// The states are not kept by the forward pass: they are computed anew, from one every
/// kBackwardChunk steps that a first sweep leaves. Same numbers whatever the number of threads.
/// Derived by hand from the recurrence; exporter/vssm/ops/reference.py is the same in plain
/// PyTorch.
struct SelectiveScanBackwardArgs {
  SelectiveScanArgs forward;     // T is float32; its y is not read
  Operand dy;                    // float32 (batch, seqlen, d_inner)
  float* du = nullptr;           // (batch, seqlen, Ku, d_inner), overwritten, as are all others
  float* ddelta = nullptr;       // (batch, seqlen, Kd, d_inner)
  float* dA = nullptr;           // (Ka, d_inner, 1 or d_state)
  float* dB = nullptr;           // (batch, seqlen, Kb, d_state)
  float* dC = nullptr;           // (batch, seqlen, Kc, d_state)
  float* dD = nullptr;           // (Ks, d_inner)
  float* ddelta_bias = nullptr;  // (Kd, d_inner)
  float* dz = nullptr;           // (batch, seqlen, d_inner), if gated
  float* ddelta0 = nullptr;      // (Kd, d_inner), if there is a delta0
};

constexpr int64_t kBackwardChunk = 64;

/// What the backward pass allocates besides its gradients, in bytes: once, and for each thread.
struct BackwardMemory {
  int64_t shared, per_thread;
};
BackwardMemory selective_scan_backward_cpu_memory(const SelectiveScanShape& shape);

/// Every rule of the forward pass, and those of dy and of T. Reads no data.
Status check(const SelectiveScanBackwardArgs& args, SelectiveScanShape* shape);

/// Checks, values included, then runs on the instruction set of selective_scan_cpu.
Status selective_scan_backward_cpu(const SelectiveScanBackwardArgs& args,
                                   const ParallelFor& parallel_for);

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_BACKWARD_H_
