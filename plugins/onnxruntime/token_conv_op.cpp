// TokenConv and TokenConv2D on ONNX Runtime's CPU and CUDA providers.
#include "plugins/kernels/token_conv.h"
#include "plugins/onnxruntime/cuda_host.h"
#include "plugins/onnxruntime/custom_op.h"
#include "plugins/onnxruntime/ort_host.h"

namespace vssm::ort {
namespace {

/// A node: its attributes inside `args`, and on CUDA where memory is.
struct ConvNode {
  TokenConvArgs args;
  DeviceAllocator allocator;
};

vssm::Status read_node(const BoundOp& op, const KernelInfo* info, ConvNode* node) {
  const OperatorSpec& spec = *op.spec;
  node->args.name = spec.name;
  vssm::Status status = read_attribute(info, spec, "by_position", &node->args.by_position);
  if (status.ok()) status = read_attribute(info, spec, "activation", &node->args.activation);
  node->args.on_grid = is_on_grid(spec);
  if (node->args.on_grid) {
    int64_t* const sizes[] = {&node->args.grid_height, &node->args.grid_width, &node->args.group};
    const char* const names[] = {"grid_height", "grid_width", "group"};
    for (size_t i = 0; i < 3 && status.ok(); ++i) {
      status = read_attribute(info, spec, names[i], sizes[i]);
    }
  }
  if (status.ok() && op.provider == Provider::kCuda) status = node->allocator.open(info);
  return status;
}

/// Everything but the computing: operands, their check, memory of the output.
vssm::Status prepare(const ConvNode& node, KernelContext* context, TokenConvArgs* args,
                     TokenConvShape* shape) {
  *args = node.args;
  Operand* const operands[] = {&args->x, &args->weight, &args->bias, &args->position};
  vssm::Status status;
  for (size_t i = 0; i < 4 && status.ok(); ++i) status = read_input(context, i, operands[i]);
  if (status.ok()) status = check(*args, shape);
  if (!status.ok()) return status;
  const Operand y = y_of(*args, *shape);
  return make_output(context, 0, y.dims, static_cast<size_t>(y.rank), &args->y);
}

ort::Status* compute(void* kernel, KernelContext* context) {
  count_call(Provider::kCpu);
  TokenConvArgs args;
  TokenConvShape shape;
  vssm::Status status = prepare(*static_cast<const ConvNode*>(kernel), context, &args, &shape);
  if (status.ok()) status = token_conv_cpu(args, parallel_for(context));
  return to_ort(status);
}

#ifdef VSSM_CUDA
ort::Status* compute_cuda(void* kernel, KernelContext* context) {
  count_call(Provider::kCuda);
  const auto& node = *static_cast<const ConvNode*>(kernel);
  TokenConvArgs args;
  TokenConvShape shape;
  vssm::Status status = prepare(node, context, &args, &shape);
  if (!status.ok()) return to_ort(status);
  CudaWork work(node.allocator);
  status = work.begin(context, token_conv_cuda_workspace(shape));
  if (status.ok()) status = token_conv_cuda(args, work.launch());
  return to_ort(status);
}
#else
constexpr decltype(Implementation::compute_cuda) compute_cuda = nullptr;
#endif

ort::Status* infer(const CustomOp* self, ShapeContext* context) {
  SymbolicShape x, weight, y;
  if (!read_shape(context, 0, 3, &x) || !read_shape(context, 1, 3, &weight)) return nullptr;
  if (is_on_grid(*static_cast<const BoundOp*>(self)->spec)) return set_output_shape(context, 0, x);
  y.type = x.type;
  y.rank = 4;
  const SymbolicShape* const owners[] = {&x, &weight, &x, &x};
  const size_t axes[] = {0, 0, 1, 2};
  for (size_t i = 0; i < 4; ++i) {
    y.dims[i] = owners[i]->dims[axes[i]];
    y.names[i] = owners[i]->names[axes[i]];
  }
  return set_output_shape(context, 0, y);
}

}  // namespace

const Implementation kTokenConv = {create_node<ConvNode, read_node>, compute, compute_cuda,
                                   destroy_node<ConvNode>, infer};

}  // namespace vssm::ort
