// TokenGather and TokenGather1 in TensorRT.
#include "plugins/kernels/token_gather.h"
#include "plugins/tensorrt/kernel.h"

namespace vssm::trt {
namespace {

TokenGatherArgs attributes_of(const Node& node) {
  TokenGatherArgs args;
  args.name = node.spec->name;
  args.count = node.spec->variable_count;
  args.num_keep = integer_of(node, "num_keep");
  args.protected_position = integer_of(node, "protected_position");
  return args;
}

TokenGatherArgs args_of(const Node& node, const Call& call) {
  TokenGatherArgs args = attributes_of(node);
  Operand* const operands[] = {&args.score, &args.position, &args.x[0], &args.x[1]};
  for (size_t i = 0; i < static_cast<size_t>(node.spec->input_count); ++i) {
    *operands[i] = call.inputs[i];
  }
  args.kept_position = static_cast<int32_t*>(call.outputs[0]);
  args.y[0] = call.outputs[1];
  args.y[1] = call.outputs[2];
  return args;
}

Status check_gather_attributes(const Node& node, int64_t seqlen) {
  return check_attributes(attributes_of(node), seqlen);
}

Status check_gather(const Node& node, const Call& call) {
  TokenGatherShape shape;
  return check(args_of(node, call), &shape);
}

Status gather_workspace(const Node& node, const Call& call, int32_t, int64_t* bytes) {
  TokenGatherShape shape;
  const Status status = check(args_of(node, call), &shape);
  if (!status.ok()) return status;
  *bytes = token_gather_cuda_workspace(shape);
  return {};
}

Status launch_gather(const Node& node, const Call& call, int32_t, const CudaLaunch& launch) {
  return token_gather_cuda(args_of(node, call), launch);
}

}  // namespace

const Kernel kTokenGather = {
    nullptr, 0, check_gather_attributes, check_gather, gather_workspace, launch_gather};

}  // namespace vssm::trt
