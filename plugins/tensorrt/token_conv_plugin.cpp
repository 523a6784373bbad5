// TokenConv and TokenConv2D in TensorRT.
#include "plugins/kernels/token_conv.h"
#include "plugins/tensorrt/kernel.h"

namespace vssm::trt {
namespace {

TokenConvArgs attributes_of(const Node& node) {
  TokenConvArgs args;
  args.name = node.spec->name;
  args.by_position = integer_of(node, "by_position");
  args.activation = integer_of(node, "activation");
  args.on_grid = is_on_grid(*node.spec);
  if (args.on_grid) {
    args.grid_height = integer_of(node, "grid_height");
    args.grid_width = integer_of(node, "grid_width");
    args.group = integer_of(node, "group");
  }
  return args;
}

TokenConvArgs args_of(const Node& node, const Call& call) {
  TokenConvArgs args = attributes_of(node);
  args.x = call.inputs[0];
  args.weight = call.inputs[1];
  args.bias = call.inputs[2];
  args.position = call.inputs[3];
  args.y = call.outputs[0];
  return args;
}

Status check_conv_attributes(const Node& node, int64_t) {
  return check_attributes(attributes_of(node));
}

Status check_conv(const Node& node, const Call& call) {
  TokenConvShape shape;
  return check(args_of(node, call), &shape);
}

Status conv_workspace(const Node& node, const Call& call, int32_t, int64_t* bytes) {
  TokenConvShape shape;
  const Status status = check(args_of(node, call), &shape);
  if (!status.ok()) return status;
  *bytes = token_conv_cuda_workspace(shape);
  return {};
}

Status launch_conv(const Node& node, const Call& call, int32_t, const CudaLaunch& launch) {
  return token_conv_cuda(args_of(node, call), launch);
}

}  // namespace

const Kernel kTokenConv = {nullptr,        0,          check_conv_attributes, check_conv,
                           conv_workspace, launch_conv};

}  // namespace vssm::trt
