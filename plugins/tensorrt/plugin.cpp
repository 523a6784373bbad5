// Every phase, and what TensorRT asks while an engine runs.
#include "plugins/tensorrt/plugin.h"

#include <cstdio>
#include <new>

#include "plugins/tensorrt/host.h"

namespace vssm::trt {
namespace {

Call described(const OperatorSpec& spec, const PluginTensorDesc* inputs) {
  Call call;
  for (size_t i = 0; i < static_cast<size_t>(spec.input_count); ++i) {
    call.inputs[i] = describe(inputs[i].dims, inputs[i].type);
  }
  return call;
}

bool is_empty(const Operand& operand) {
  for (int i = 0; i < operand.rank && i < kMaxRank; ++i) {
    if (operand.dims[i] == 0) return true;
  }
  return false;
}

}  // namespace

Plugin::Plugin(const Node& node, const char* name) : node_(node) {
  write_fields(node_, &fields_);
  collection_.nbFields = node_.spec->attribute_count;
  collection_.fields = fields_.data();
  // TensorRT keeps timings between builds: those of another version of the kernels do not count.
  const int used = std::snprintf(timing_id_, sizeof(timing_id_), "%s:", VSSM_VERSION);
  write_text(node_, timing_id_ + used, sizeof(timing_id_) - static_cast<size_t>(used));
  std::snprintf(name_, sizeof(name_), "%s", name == nullptr ? "" : name);
}

IPluginCapability* Plugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
  if (type == PluginCapabilityType::kCORE) return static_cast<IPluginV3OneCore*>(this);
  if (type == PluginCapabilityType::kBUILD) return static_cast<IPluginV3OneBuild*>(this);
  if (type == PluginCapabilityType::kRUNTIME) return static_cast<IPluginV3OneRuntime*>(this);
  return nullptr;
}

IPluginV3* Plugin::clone() noexcept {
  auto* const copy = new (std::nothrow) Plugin(*this);
  if (copy == nullptr) log_error(name_, Status::error(node_.spec->name, ": no memory for a copy"));
  return copy;
}

IPluginV3* Plugin::attachToContext(IPluginResourceContext*) noexcept { return clone(); }

int32_t Plugin::setTactic(int32_t tactic) noexcept {
  const Kernel& kernel = kernel_of(*node_.spec);
  bool known = tactic == 0;
  for (int32_t i = 0; i < kernel.tactic_count; ++i) known |= kernel.tactics[i] == tactic;
  if (!known) {
    return report(name_,
                  Status::error(node_.spec->name, ": tactic=", tactic, " is outside [0, ",
                                kernel.tactic_count,
                                "], the kernel variants of this library; build the engine again"));
  }
  tactic_ = tactic;
  return 0;
}

int32_t Plugin::onShapeChange(const PluginTensorDesc* in, int32_t nbInputs, const PluginTensorDesc*,
                              int32_t nbOutputs) noexcept {
  const Status status = check_counts(nbInputs, nbOutputs);
  if (!status.ok()) return report(name_, status);
  return report(name_, kernel_of(*node_.spec).check(node_, described(*node_.spec, in)));
}

int32_t Plugin::enqueue(const PluginTensorDesc* inputDesc, const PluginTensorDesc*,
                        const void* const* inputs, void* const* outputs, void* workspace,
                        cudaStream_t stream) noexcept {
  return report(name_, run(inputDesc, inputs, outputs, {stream, workspace, 0}));
}

Status Plugin::check_counts(int32_t inputs, int32_t outputs) const {
  if (inputs == node_.spec->input_count && outputs == node_.spec->output_count) return {};
  return Status::error(node_.spec->name, ": ", inputs, " inputs and ", outputs,
                       " outputs, but the operator has ", node_.spec->input_count, " and ",
                       node_.spec->output_count, "; export the file again");
}

Status Plugin::run(const PluginTensorDesc* descriptions, const void* const* inputs,
                   void* const* outputs, CudaLaunch launch) const {
  const OperatorSpec& spec = *node_.spec;
  Call call = described(spec, descriptions);
  for (size_t i = 0; i < static_cast<size_t>(spec.input_count); ++i) {
    call.inputs[i].data = inputs[i];
    if (inputs[i] == nullptr && !is_empty(call.inputs[i])) {
      return Status::error(spec.name, ": there is no ", spec.inputs[i].name,
                           "; the operator has no optional inputs");
    }
  }
  for (size_t i = 0; i < static_cast<size_t>(spec.output_count); ++i) call.outputs[i] = outputs[i];
  const Kernel& kernel = kernel_of(spec);
  const Status status = kernel.workspace(node_, call, tactic_, &launch.workspace_bytes);
  if (!status.ok()) return status;
  if (launch.workspace_bytes > 0 && launch.workspace == nullptr) {
    return Status::error(spec.name, ": no workspace, but this shape needs ", launch.workspace_bytes,
                         " bytes; build the engine again");
  }
  return kernel.launch(node_, call, tactic_, launch);
}

}  // namespace vssm::trt
