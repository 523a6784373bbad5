// TokenScatter in TensorRT.
#include "plugins/kernels/token_scatter.h"
#include "plugins/tensorrt/kernel.h"

namespace vssm::trt {
namespace {

TokenScatterArgs args_of(const Node& node, const Call& call) {
  TokenScatterArgs args;
  args.name = node.spec->name;
  args.base = call.inputs[0];
  args.x = call.inputs[1];
  args.position = call.inputs[2];
  args.y = call.outputs[0];
  return args;
}

/// There are none.
Status check_scatter_attributes(const Node&, int64_t) { return {}; }

Status check_scatter(const Node& node, const Call& call) {
  TokenScatterShape shape;
  return check(args_of(node, call), &shape);
}

Status scatter_workspace(const Node& node, const Call& call, int32_t, int64_t* bytes) {
  TokenScatterShape shape;
  const Status status = check(args_of(node, call), &shape);
  if (!status.ok()) return status;
  *bytes = token_scatter_cuda_workspace(shape);
  return {};
}

Status launch_scatter(const Node& node, const Call& call, int32_t, const CudaLaunch& launch) {
  return token_scatter_cuda(args_of(node, call), launch);
}

}  // namespace

const Kernel kTokenScatter = {
    nullptr, 0, check_scatter_attributes, check_scatter, scatter_workspace, launch_scatter};

}  // namespace vssm::trt
