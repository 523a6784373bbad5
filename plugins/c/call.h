// Calls of the C ABI: descriptors into the kernels' structs, and from there to a kernel. What is no
// template is in vssm.cpp; vssm_training.cpp calls, too.
#ifndef VSSM_PLUGINS_C_CALL_H_
#define VSSM_PLUGINS_C_CALL_H_

#include "plugins/c/vssm.h"
#include "plugins/kernels/families.h"

namespace vssm::c {

/// The ABI's return value; writes the message of a failure to `error`.
int report(const Status& status, char* error, size_t error_bytes);

/// The operator of that name, which must be of that family.
Status find_operator(const char* name, Family family, const OperatorSpec** found);

/// `with_data`: whether the memory must be there already.
Status read_tensor(const OperatorSpec& spec, std::string_view name, const vssm_tensor& tensor,
                   bool with_data, Operand* operand);

Status read_inputs(const OperatorSpec& spec, const vssm_tensor* inputs, int32_t count,
                   bool with_data, Operand* const* operands);

/// Whether there are as many as the operator has.
Status check_outputs(const OperatorSpec& spec, const vssm_tensor* outputs, int32_t count);

/// The memory of an output, which must have exactly this description.
Status read_output(const OperatorSpec& spec, int index, const vssm_tensor& tensor,
                   const Operand& expected, void** data);

/// TokenScatter's.
struct NoAttributes {};

Status read_attributes(const vssm_scan_attributes& attributes, SelectiveScanArgs* args);
Status read_attributes(const vssm_gather_attributes& attributes, TokenGatherArgs* args);
Status read_attributes(const vssm_conv_attributes& attributes, TokenConvArgs* args);
inline Status read_attributes(const NoAttributes&, TokenScatterArgs*) { return {}; }

/// The CUDA kernel that is asked for; 0 lets it be chosen.
template <class Attributes>
int32_t variant_of(const Attributes&) {
  return 0;
}
inline int32_t variant_of(const vssm_scan_attributes& attributes) { return attributes.variant; }

/// Attributes and inputs, not yet checked against each other.
template <class F, class Attributes>
Status read(const char* op, const vssm_tensor* inputs, int32_t count, const Attributes* attributes,
            bool with_data, const OperatorSpec** spec, typename F::Args* args) {
  Status status = find_operator(op, F::kFamily, spec);
  if (!status.ok()) return status;
  if (attributes == nullptr) {
    return Status::error(op, ": attributes are missing; give their struct");
  }
  *args = F::args_of(**spec);
  status = read_attributes(*attributes, args);
  if (!status.ok()) return status;
  return read_inputs(**spec, inputs, count, with_data, F::inputs(args).data());
}

/// All that a kernel takes, checked.
template <class F, class Attributes>
Status read_call(const char* op, const vssm_tensor* inputs, int32_t count,
                 const vssm_tensor* outputs, int32_t output_count, const Attributes* attributes,
                 typename F::Args* args) {
  const OperatorSpec* spec = nullptr;
  typename F::Shape shape;
  Status status = read<F>(op, inputs, count, attributes, true, &spec, args);
  if (status.ok()) status = check(*args, &shape);
  if (status.ok()) status = check_outputs(*spec, outputs, output_count);
  for (int i = 0; status.ok() && i < output_count; ++i) {
    void* data = nullptr;
    status = read_output(*spec, i, outputs[i], F::output(*args, shape, i), &data);
    F::write_to(args, i, data);
  }
  return status;
}

template <class F>
Status run_on_cpu(const typename F::Args& args, int32_t variant, const ParallelFor& parallel_for) {
  if (variant == 0) return F::run(args, parallel_for);
  return Status::error(args.name, ": variant=", variant, " is for CUDA; use 0 on the CPU");
}

}  // namespace vssm::c

#endif  // VSSM_PLUGINS_C_CALL_H_
