// TokenGather and TokenGather1 on ONNX Runtime's CPU and CUDA providers.
#include "plugins/kernels/token_gather.h"
#include "plugins/onnxruntime/cuda_host.h"
#include "plugins/onnxruntime/custom_op.h"
#include "plugins/onnxruntime/ort_host.h"

namespace vssm::ort {
namespace {

/// A node: its attributes inside `args`, and on CUDA where memory is.
struct GatherNode {
  TokenGatherArgs args;
  DeviceAllocator allocator;
};

vssm::Status read_node(const BoundOp& op, const KernelInfo* info, GatherNode* node) {
  const OperatorSpec& spec = *op.spec;
  TokenGatherArgs& args = node->args;
  args.name = spec.name;
  args.count = spec.variable_count;
  vssm::Status status = read_attribute(info, spec, "num_keep", &args.num_keep);
  if (status.ok()) {
    status = read_attribute(info, spec, "protected_position", &args.protected_position);
  }
  // Shape inference could refuse it, but ONNX Runtime only logs what that says.
  if (status.ok()) status = check_num_keep(args, static_size(info, 0, 1));
  if (status.ok() && op.provider == Provider::kCuda) status = node->allocator.open(info);
  return status;
}

vssm::Status make_outputs(KernelContext* context, const TokenGatherShape& shape,
                          TokenGatherArgs* args) {
  const int64_t kept[] = {shape.batch, args->num_keep};
  void* data = nullptr;
  vssm::Status status = make_output(context, 0, kept, 2, &data);
  args->kept_position = static_cast<int32_t*>(data);
  for (int i = 0; i < args->count && status.ok(); ++i) {
    const int64_t dims[] = {shape.batch, args->num_keep, shape.width[i]};
    status = make_output(context, static_cast<size_t>(i) + 1, dims, 3, &args->y[i]);
  }
  return status;
}

/// Everything but the computing: operands, their check, memory of the outputs.
vssm::Status prepare(const GatherNode& node, KernelContext* context, TokenGatherArgs* args,
                     TokenGatherShape* shape) {
  *args = node.args;
  Operand* const operands[] = {&args->score, &args->position, &args->x[0], &args->x[1]};
  vssm::Status status;
  for (size_t i = 0; i < static_cast<size_t>(args->count) + 2 && status.ok(); ++i) {
    status = read_input(context, i, operands[i]);
  }
  if (status.ok()) status = check(*args, shape);
  if (status.ok()) status = make_outputs(context, *shape, args);
  return status;
}

ort::Status* compute(void* kernel, KernelContext* context) {
  count_call(Provider::kCpu);
  TokenGatherArgs args;
  TokenGatherShape shape;
  vssm::Status status = prepare(*static_cast<const GatherNode*>(kernel), context, &args, &shape);
  if (status.ok()) status = token_gather_cpu(args, parallel_for(context));
  return to_ort(status);
}

#ifdef VSSM_CUDA
ort::Status* compute_cuda(void* kernel, KernelContext* context) {
  count_call(Provider::kCuda);
  const auto& node = *static_cast<const GatherNode*>(kernel);
  TokenGatherArgs args;
  TokenGatherShape shape;
  vssm::Status status = prepare(node, context, &args, &shape);
  if (!status.ok()) return to_ort(status);
  CudaWork work(node.allocator);
  status = work.begin(context, token_gather_cuda_workspace(shape));
  if (status.ok()) status = token_gather_cuda(args, work.launch());
  return to_ort(status);
}
#else
constexpr decltype(Implementation::compute_cuda) compute_cuda = nullptr;
#endif

ort::Status* infer(const CustomOp* op, ShapeContext* context) {
  // One function serves all types of an operator: only its row of the table counts here.
  const OperatorSpec& spec = *static_cast<const BoundOp*>(op)->spec;
  const Attribute* attribute = nullptr;
  ort::Status* status = api().ShapeInferContext_GetAttribute(context, "num_keep", &attribute);
  if (status != nullptr) return status;
  int64_t num_keep = 0;
  size_t size = 0;
  status = api().ReadOpAttr(attribute, kIntAttribute, &num_keep, sizeof(num_keep), &size);
  if (status != nullptr) return status;
  SymbolicShape shape;
  if (!read_shape(context, 0, 2, &shape)) return nullptr;
  shape.dims[1] = num_keep;
  shape.names[1] = "";
  shape.type = kInt32;
  status = set_output_shape(context, 0, shape);
  for (int i = 0; i < spec.variable_count && status == nullptr; ++i) {
    SymbolicShape x;
    if (!read_shape(context, static_cast<size_t>(i) + 2, 3, &x)) continue;
    x.dims[1] = num_keep;
    x.names[1] = "";
    status = set_output_shape(context, static_cast<size_t>(i) + 1, x);
  }
  return status;
}

}  // namespace

const Implementation kTokenGather = {create_node<GatherNode, read_node>, compute, compute_cuda,
                                     destroy_node<GatherNode>, infer};

}  // namespace vssm::ort
