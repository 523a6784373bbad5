// How a family of operators hands a node's tensors to its CUDA kernel.
#ifndef VSSM_PLUGINS_TENSORRT_KERNEL_H_
#define VSSM_PLUGINS_TENSORRT_KERNEL_H_

#include "plugins/tensorrt/node.h"

namespace vssm::trt {

/// A tactic is a kernel variant; 0 lets the kernel choose.
struct Kernel {
  const int32_t* tactics;
  int32_t tactic_count;
  /// The rules on attributes alone; `seqlen` is -1 where it is not known.
  Status (*check_attributes)(const Node& node, int64_t seqlen);
  /// The rules on ranks, sizes and types.
  Status (*check)(const Node& node, const Call& call);
  /// Checks, and tells the device memory that a launch needs; larger sizes need no less.
  Status (*workspace)(const Node& node, const Call& call, int32_t tactic, int64_t* bytes);
  /// Checks and launches.
  Status (*launch)(const Node& node, const Call& call, int32_t tactic, const CudaLaunch& launch);
};

/// That of the operator's family.
[[nodiscard]] const Kernel& kernel_of(const OperatorSpec& spec);

}  // namespace vssm::trt

#endif  // VSSM_PLUGINS_TENSORRT_KERNEL_H_
