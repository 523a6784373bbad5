// The build phase: what TensorRT asks before there is an engine.
#include "plugins/tensorrt/host.h"
#include "plugins/tensorrt/plugin.h"

namespace vssm::trt {
namespace {

const OperandSpec& operand_at(const OperatorSpec& spec, int32_t pos) {
  if (pos < spec.input_count) return spec.inputs[static_cast<size_t>(pos)];
  return spec.outputs[static_cast<size_t>(pos - spec.input_count)];
}

/// The first binding that has the types of the first `count` operands; null where there is none.
template <typename TypeAt>
const TypeBinding* find_binding(const OperatorSpec& spec, int32_t count, TypeAt type_at) {
  for (size_t b = 0; b < static_cast<size_t>(spec.binding_count); ++b) {
    const TypeBinding& binding = spec.bindings[b];
    int32_t i = 0;
    while (i < count && dtype_of(type_at(i)) == resolve(operand_at(spec, i).type, binding)) ++i;
    if (i == count) return &binding;
  }
  return nullptr;
}

Status no_binding(const OperatorSpec& spec, const DataType* types) {
  for (int i = 0; i < spec.input_count; ++i) {
    const OperandSpec& operand = spec.inputs[static_cast<size_t>(i)];
    const DType dtype = dtype_of(types[i]);
    const bool is_fixed = operand.type[0] != 'T';
    if (is_fixed ? dtype == resolve(operand.type, {}) : dtype != DType::kOther) continue;
    return Status::error(spec.name, ": type(", operand.name, ")=", static_cast<int32_t>(types[i]),
                         " (nvinfer1::DataType), but it must be ",
                         is_fixed ? operand.type : "float32, float16 or bfloat16",
                         "; cast it, or export the file again");
  }
  return Status::error(spec.name,
                       ": the types of the inputs are no row of the operator table (u, delta, B, C "
                       "and z have one type, x0 and x1 a pair that the table has); export the file "
                       "again with the --dtype that you want");
}

/// A description whose sizes are those of a profile's largest shapes.
Call largest(const OperatorSpec& spec, const DynamicPluginTensorDesc* inputs) {
  Call call;
  for (size_t i = 0; i < static_cast<size_t>(spec.input_count); ++i) {
    call.inputs[i] = describe(inputs[i].max, inputs[i].desc.type);
  }
  return call;
}

}  // namespace

int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t nbInputs,
                                const DynamicPluginTensorDesc*, int32_t nbOutputs) noexcept {
  const Status status = check_counts(nbInputs, nbOutputs);
  if (!status.ok()) return report(name_, status);
  return report(name_, kernel_of(*node_.spec).check(node_, largest(*node_.spec, in)));
}

int32_t Plugin::getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs,
                                   const DataType* inputTypes, int32_t nbInputs) const noexcept {
  const Status status = check_counts(nbInputs, nbOutputs);
  if (!status.ok()) return report(name_, status);
  const TypeBinding* const binding =
      find_binding(*node_.spec, nbInputs, [inputTypes](int32_t i) { return inputTypes[i]; });
  if (binding == nullptr) return report(name_, no_binding(*node_.spec, inputTypes));
  for (int32_t i = 0; i < nbOutputs; ++i) {
    outputTypes[i] = data_type(resolve(node_.spec->outputs[static_cast<size_t>(i)].type, *binding));
  }
  return 0;
}

int32_t Plugin::getOutputShapes(const DimsExprs* inputs, int32_t nbInputs, const DimsExprs*,
                                int32_t nbShapeInputs, DimsExprs* outputs, int32_t nbOutputs,
                                IExprBuilder& exprBuilder) noexcept {
  Status status = check_counts(nbInputs, nbOutputs);
  if (status.ok() && nbShapeInputs != 0) {
    status = Status::error(node_.spec->name, ": ", nbShapeInputs,
                           " shape inputs, but the operator has none; make every input of the "
                           "layer a plain one");
  }
  if (status.ok()) status = check_static(inputs);
  if (!status.ok()) return report(name_, status);
  for (int32_t i = 0; i < nbOutputs; ++i) {
    const OperandSpec& output = node_.spec->outputs[static_cast<size_t>(i)];
    outputs[i].nbDims = rank_of(output);
    for (int axis = 0; axis < outputs[i].nbDims; ++axis) {
      outputs[i].d[axis] = output_axis(axis_of(output, axis), inputs, exprBuilder);
      if (outputs[i].d[axis] == nullptr) {
        return report(name_, Status::error(node_.spec->name, ": TensorRT made no expression for ",
                                           output.name, "; see its own messages"));
      }
    }
  }
  return 0;
}

bool Plugin::supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* inOut,
                                       int32_t nbInputs, int32_t nbOutputs) noexcept {
  const OperatorSpec& spec = *node_.spec;
  if (!check_counts(nbInputs, nbOutputs).ok() || pos < 0 || pos >= nbInputs + nbOutputs) {
    return false;
  }
  for (int32_t i = 0; i <= pos; ++i) {
    if (inOut[i].desc.format != TensorFormat::kLINEAR) return false;
  }
  const auto type_at = [inOut](int32_t i) { return inOut[i].desc.type; };
  return find_binding(spec, pos + 1, type_at) != nullptr;
}

size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t nbInputs,
                                const DynamicPluginTensorDesc*, int32_t nbOutputs) const noexcept {
  int64_t bytes = 0;
  Status status = check_counts(nbInputs, nbOutputs);
  if (status.ok()) status = largest_workspace(inputs, &bytes);
  if (!status.ok()) log_error(name_, status);
  return static_cast<size_t>(bytes);
}

int32_t Plugin::getValidTactics(int32_t* tactics, int32_t nbTactics) noexcept {
  const Kernel& kernel = kernel_of(*node_.spec);
  if (nbTactics != kernel.tactic_count) {
    return report(name_, Status::error(node_.spec->name, ": nbTactics=", nbTactics,
                                       ", but getNbTactics said ", kernel.tactic_count));
  }
  for (int32_t i = 0; i < nbTactics; ++i) tactics[i] = kernel.tactics[i];
  return 0;
}

/// What can be told before shapes are known: ranks, and attributes against constant sizes.
Status Plugin::check_static(const DimsExprs* inputs) const {
  int64_t seqlen = -1;
  for (int i = 0; i < node_.spec->input_count; ++i) {
    const OperandSpec& operand = node_.spec->inputs[static_cast<size_t>(i)];
    const int rank = rank_of(operand);
    if (inputs[i].nbDims != rank) {
      return Status::error(node_.spec->name, ": rank(", operand.name, ")=", inputs[i].nbDims,
                           ", but it must be ", rank, "; give ", operand.name,
                           " the shape that the operator table has");
    }
    const IDimensionExpr* const length = inputs[i].d[1];
    if (axis_of(operand, 1) == "seqlen" && length != nullptr && length->isConstant()) {
      seqlen = length->getConstantValue();
    }
  }
  return kernel_of(*node_.spec).check_attributes(node_, seqlen);
}

/// An output's axis is an attribute of the node or the axis of that name of an input: of the last
/// one, since a scan's tables come behind the operands whose axes an attribute may exchange.
const IDimensionExpr* Plugin::output_axis(std::string_view axis, const DimsExprs* inputs,
                                          IExprBuilder& builder) const {
  for (int i = node_.spec->input_count - 1; i >= 0; --i) {
    const OperandSpec& operand = node_.spec->inputs[static_cast<size_t>(i)];
    for (int j = 0; j < inputs[i].nbDims; ++j) {
      if (axis_of(operand, j) == axis) return inputs[i].d[j];
    }
  }
  int64_t size = 0;
  read(node_, axis, &size);
  return builder.constant(size);
}

/// TensorRT asks once, for whatever variant it will choose.
Status Plugin::largest_workspace(const DynamicPluginTensorDesc* inputs, int64_t* bytes) const {
  const Kernel& kernel = kernel_of(*node_.spec);
  const Call call = largest(*node_.spec, inputs);
  Status status = kernel.workspace(node_, call, 0, bytes);
  for (int32_t i = 0; i < kernel.tactic_count && status.ok(); ++i) {
    int64_t other = 0;
    status = kernel.workspace(node_, call, kernel.tactics[i], &other);
    if (other > *bytes) *bytes = other;
  }
  return status;
}

}  // namespace vssm::trt
