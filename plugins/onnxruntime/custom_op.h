// One OrtCustomOp for each operator of the table, each binding of its types and each provider.
#ifndef VSSM_PLUGINS_ONNXRUNTIME_CUSTOM_OP_H_
#define VSSM_PLUGINS_ONNXRUNTIME_CUSTOM_OP_H_

#include "plugins/kernels/op_table.h"
#include "plugins/onnxruntime/ort_abi.h"

namespace vssm::ort {

enum class Provider { kCpu, kCuda };

/// What ONNX Runtime holds: its own struct first, then which row of the table this is.
struct BoundOp : CustomOp {
  const OperatorSpec* spec;
  const TypeBinding* binding;
  Provider provider;
};

/// How a family of operators makes, runs and destroys a kernel and infers shapes.
struct Implementation {
  decltype(CustomOp::CreateKernelV2) create;
  decltype(CustomOp::KernelComputeV2) compute;
  decltype(CustomOp::KernelComputeV2) compute_cuda;  // null where the build has no CUDA
  decltype(CustomOp::KernelDestroy) destroy;
  decltype(CustomOp::InferOutputShapeFn) infer;
  decltype(CustomOp::GetMayInplace) may_inplace;  // or null
};

/// That of the operator's family.
[[nodiscard]] Implementation implementation_of(const OperatorSpec& spec);

}  // namespace vssm::ort

#endif  // VSSM_PLUGINS_ONNXRUNTIME_CUSTOM_OP_H_
