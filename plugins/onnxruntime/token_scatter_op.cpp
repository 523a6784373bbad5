// TokenScatter on ONNX Runtime's CPU and CUDA providers.
#include "plugins/kernels/token_scatter.h"
#include "plugins/onnxruntime/cuda_host.h"
#include "plugins/onnxruntime/custom_op.h"
#include "plugins/onnxruntime/ort_host.h"

namespace vssm::ort {
namespace {

/// A node: its name inside `args`, and on CUDA where memory is.
struct ScatterNode {
  TokenScatterArgs args;
  DeviceAllocator allocator;
};

vssm::Status read_node(const BoundOp& op, const KernelInfo* info, ScatterNode* node) {
  node->args.name = op.spec->name;
  return op.provider == Provider::kCuda ? node->allocator.open(info) : vssm::Status();
}

/// Everything but the copying: operands, their check, memory of the output.
vssm::Status prepare(const ScatterNode& node, KernelContext* context, TokenScatterArgs* args,
                     TokenScatterShape* shape) {
  *args = node.args;
  Operand* const operands[] = {&args->base, &args->x, &args->position};
  vssm::Status status;
  for (size_t i = 0; i < 3 && status.ok(); ++i) status = read_input(context, i, operands[i]);
  if (status.ok()) status = check(*args, shape);
  if (!status.ok()) return status;
  return make_output(context, 0, args->base.dims, 3, &args->y);
}

ort::Status* compute(void* kernel, KernelContext* context) {
  count_call(Provider::kCpu);
  TokenScatterArgs args;
  TokenScatterShape shape;
  vssm::Status status = prepare(*static_cast<const ScatterNode*>(kernel), context, &args, &shape);
  if (status.ok()) status = token_scatter_cpu(args, parallel_for(context));
  return to_ort(status);
}

#ifdef VSSM_CUDA
ort::Status* compute_cuda(void* kernel, KernelContext* context) {
  count_call(Provider::kCuda);
  const auto& node = *static_cast<const ScatterNode*>(kernel);
  TokenScatterArgs args;
  TokenScatterShape shape;
  vssm::Status status = prepare(node, context, &args, &shape);
  if (!status.ok()) return to_ort(status);
  CudaWork work(node.allocator);
  status = work.begin(context, token_scatter_cuda_workspace(shape));
  if (status.ok()) status = token_scatter_cuda(args, work.launch());
  return to_ort(status);
}
#else
constexpr decltype(Implementation::compute_cuda) compute_cuda = nullptr;
#endif

ort::Status* infer(const CustomOp*, ShapeContext* context) {
  SymbolicShape base;
  if (!read_shape(context, 0, 3, &base)) return nullptr;
  return set_output_shape(context, 0, base);
}

/// Where nobody else reads base, y takes its memory, and the rows of x are all that moves.
size_t may_inplace(int** inputs, int** outputs) {
  static int base = 0, y = 0;
  *inputs = &base;
  *outputs = &y;
  return 1;
}

}  // namespace

const Implementation kTokenScatter = {create_node<ScatterNode, read_node>, compute, compute_cuda,
                                      destroy_node<ScatterNode>,           infer,   may_inplace};

}  // namespace vssm::ort
