// SelectiveScan, GatedSelectiveScan and SelectiveScanConstantGap on ONNX Runtime's CPU and CUDA
// providers.
#include "plugins/kernels/selective_scan.h"
#include "plugins/onnxruntime/cuda_host.h"
#include "plugins/onnxruntime/custom_op.h"
#include "plugins/onnxruntime/ort_host.h"

namespace vssm::ort {
namespace {

/// A node: its row of the table, its attributes inside `args`, and on CUDA where memory is.
struct ScanNode {
  const OperatorSpec* spec = nullptr;
  SelectiveScanArgs args;
  DeviceAllocator allocator;
};

vssm::Status read_node(const BoundOp& op, const KernelInfo* info, ScanNode* node) {
  const OperatorSpec& spec = *op.spec;
  node->spec = &spec;
  node->args.name = spec.name;
  node->args.gated = spec.input_count == 10 && spec.inputs[9].name == "z";
  node->args.constant_gap = spec.input_count == 10 && spec.inputs[9].name == "delta0";
  vssm::Status status = read_attribute(info, spec, "delta_softplus", &node->args.delta_softplus);
  if (status.ok()) {
    status = read_attribute(info, spec, "params_by_step", &node->args.params_by_step);
  }
  if (status.ok()) status = read_attribute(info, spec, "scale", &node->args.scale);
  if (status.ok()) {
    status = read_attribute(info, spec, "direction_axis", &node->args.direction_axis);
  }
  if (status.ok() && op.provider == Provider::kCuda) status = node->allocator.open(info);
  return status;
}

/// Everything but the computing: operands, their check, memory of the output.
vssm::Status prepare(const ScanNode& node, KernelContext* context, SelectiveScanArgs* args,
                     SelectiveScanShape* shape) {
  *args = node.args;
  Operand* const operands[] = {&args->u,          &args->delta,
                               &args->A,          &args->B,
                               &args->C,          &args->D,
                               &args->delta_bias, &args->order,
                               &args->gap,        args->gated ? &args->z : &args->delta0};
  vssm::Status status;
  for (int i = 0; i < node.spec->input_count && status.ok(); ++i) {
    status = read_input(context, static_cast<size_t>(i), operands[i]);
  }
  if (status.ok()) status = check(*args, shape);
  if (!status.ok()) return status;
  const int64_t dims[] = {shape->batch, shape->seqlen, shape->d_inner};
  return make_output(context, 0, dims, 3, &args->y);
}

ort::Status* compute(void* kernel, KernelContext* context) {
  count_call(Provider::kCpu);
  SelectiveScanArgs args;
  SelectiveScanShape shape;
  vssm::Status status = prepare(*static_cast<const ScanNode*>(kernel), context, &args, &shape);
  if (status.ok()) status = selective_scan_cpu(args, parallel_for(context));
  return to_ort(status);
}

#ifdef VSSM_CUDA
ort::Status* compute_cuda(void* kernel, KernelContext* context) {
  count_call(Provider::kCuda);
  const auto& node = *static_cast<const ScanNode*>(kernel);
  SelectiveScanArgs args;
  SelectiveScanShape shape;
  vssm::Status status = prepare(node, context, &args, &shape);
  if (!status.ok()) return to_ort(status);
  CudaWork work(node.allocator);
  status =
      work.begin(context, selective_scan_cuda_workspace(shape, args.u.dtype, ScanVariant::kAuto));
  if (status.ok()) status = selective_scan_cuda(args, ScanVariant::kAuto, work.launch());
  return to_ort(status);
}
#else
constexpr decltype(Implementation::compute_cuda) compute_cuda = nullptr;
#endif

/// Where shapes are inferred; an attribute that is not there is an error of ONNX Runtime's.
int64_t direction_axis_of(const ShapeContext* context) {
  const Attribute* attribute = nullptr;
  int64_t axis = 2;
  size_t size = 0;
  ort::Status* status = api().ShapeInferContext_GetAttribute(context, "direction_axis", &attribute);
  if (status == nullptr) {
    status = api().ReadOpAttr(attribute, kIntAttribute, &axis, sizeof(axis), &size);
  }
  if (status != nullptr) api().ReleaseStatus(status);
  return axis;
}

// ONNX Runtime keeps one inference function for all types of an operator: take them from the input.
ort::Status* infer(const CustomOp*, ShapeContext* context) {
  SymbolicShape u;
  if (!read_shape(context, 0, 4, &u)) return nullptr;
  SymbolicShape y;
  y.type = u.type;
  y.rank = 3;
  const size_t axes[] = {0, direction_axis_of(context) == 1 ? size_t{2} : size_t{1}, 3};
  for (size_t i = 0; i < 3; ++i) {
    y.dims[i] = u.dims[axes[i]];
    y.names[i] = u.names[axes[i]];
  }
  return set_output_shape(context, 0, y);
}

}  // namespace

const Implementation kSelectiveScan = {create_node<ScanNode, read_node>, compute, compute_cuda,
                                       destroy_node<ScanNode>, infer};

}  // namespace vssm::ort
