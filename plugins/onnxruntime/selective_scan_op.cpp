// SelectiveScan, GatedSelectiveScan and SelectiveScanConstantGap on ONNX Runtime's CPU provider.
#include <new>

#include "plugins/kernels/selective_scan.h"
#include "plugins/onnxruntime/custom_op.h"
#include "plugins/onnxruntime/ort_host.h"

namespace vssm::ort {
namespace {

/// A node: its row of the table, and its attributes inside `args`.
struct ScanNode {
  const OperatorSpec* spec;
  SelectiveScanArgs args;
};

ort::Status* create(const CustomOp* op, const Api*, const KernelInfo* info, void** kernel) {
  const OperatorSpec& spec = *static_cast<const BoundOp*>(op)->spec;
  ScanNode node = {&spec, {}};
  node.args.name = spec.name;
  node.args.gated = spec.input_count == 10 && spec.inputs[9].name == "z";
  node.args.constant_gap = spec.input_count == 10 && spec.inputs[9].name == "delta0";
  vssm::Status status = read_attribute(info, spec, "delta_softplus", &node.args.delta_softplus);
  if (status.ok()) status = read_attribute(info, spec, "params_by_step", &node.args.params_by_step);
  if (status.ok()) status = read_attribute(info, spec, "scale", &node.args.scale);
  if (!status.ok()) return to_ort(status);
  *kernel = new (std::nothrow) ScanNode(node);
  return *kernel != nullptr ? nullptr : api().CreateStatus(kFail, "no memory for a kernel");
}

ort::Status* compute(void* kernel, KernelContext* context) {
  count_call();
  const auto& node = *static_cast<const ScanNode*>(kernel);
  SelectiveScanArgs args = node.args;
  Operand* const operands[] = {
      &args.u, &args.delta,      &args.A,     &args.B,   &args.C,
      &args.D, &args.delta_bias, &args.order, &args.gap, args.gated ? &args.z : &args.delta0};
  for (int i = 0; i < node.spec->input_count; ++i) {
    const vssm::Status status = read_input(context, static_cast<size_t>(i), operands[i]);
    if (!status.ok()) return to_ort(status);
  }
  SelectiveScanShape shape;
  vssm::Status status = check(args, &shape);
  if (!status.ok()) return to_ort(status);
  const int64_t dims[] = {shape.batch, shape.seqlen, shape.d_inner};
  status = make_output(context, 0, dims, 3, &args.y);
  if (status.ok()) status = selective_scan_cpu(args, parallel_for(context));
  return to_ort(status);
}

void destroy(void* kernel) { delete static_cast<ScanNode*>(kernel); }

// ONNX Runtime keeps one inference function for all types of an operator: take them from the input.
ort::Status* infer(const CustomOp*, ShapeContext* context) {
  SymbolicShape u;
  if (!read_shape(context, 0, 4, &u)) return nullptr;
  SymbolicShape y;
  y.type = u.type;
  y.rank = 3;
  const size_t axes[] = {0, 1, 3};
  for (size_t i = 0; i < 3; ++i) {
    y.dims[i] = u.dims[axes[i]];
    y.names[i] = u.names[axes[i]];
  }
  return set_output_shape(context, 0, y);
}

}  // namespace

const Implementation kSelectiveScan = {create, compute, destroy, infer};

}  // namespace vssm::ort
