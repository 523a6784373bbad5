// The C ABI over the kernels: reads descriptors into the kernels' structs, calls, reports.
#include "plugins/c/vssm.h"

#include <cstdio>
#include <string>

#include "plugins/c/call.h"

namespace vssm::c {

static_assert(static_cast<int>(DType::kFloat32) == VSSM_FLOAT32, "the ABI's codes are ours");
static_assert(static_cast<int>(DType::kFloat16) == VSSM_FLOAT16, "the ABI's codes are ours");
static_assert(static_cast<int>(DType::kBFloat16) == VSSM_BFLOAT16, "the ABI's codes are ours");
static_assert(static_cast<int>(DType::kInt32) == VSSM_INT32, "the ABI's codes are ours");
static_assert(sizeof(vssm_tensor::dims) == kMaxRank * sizeof(int64_t), "one rank for both");

int report(const Status& status, char* error, size_t error_bytes) {
  if (status.ok()) return 0;
  if (error != nullptr && error_bytes > 0) {
    std::snprintf(error, error_bytes, "%s", status.message());
  }
  return 1;
}

Status find_operator(const char* name, Family family, const OperatorSpec** found) {
  for (const OperatorSpec& spec : kOperators) {
    if (name == nullptr || name != std::string_view(spec.name) || spec.family != family) continue;
    *found = &spec;
    return {};
  }
  constexpr const char* kFamilies[] = {"scan", "gather", "convolution", "scatter"};
  return Status::error("op=", name == nullptr ? "(null)" : name, " is no ",
                       kFamilies[static_cast<int>(family)],
                       " operator; vssm_operator_table() lists them");
}

Status read_tensor(const OperatorSpec& spec, std::string_view name, const vssm_tensor& tensor,
                   bool with_data, Operand* operand) {
  if (tensor.dtype < VSSM_FLOAT32 || tensor.dtype > VSSM_INT32) {
    return Status::error(spec.name, ": dtype(", name, ")=", tensor.dtype,
                         " is outside [0, 3]; use a VSSM_... code");
  }
  if (tensor.rank < 0 || tensor.rank > kMaxRank) {
    return Status::error(spec.name, ": rank(", name, ")=", tensor.rank, " is outside [0, ",
                         kMaxRank, "]; no operand has more");
  }
  *operand = {tensor.data, static_cast<DType>(tensor.dtype), tensor.rank, {}};
  bool empty = false;
  for (int i = 0; i < tensor.rank; ++i) {
    if (tensor.dims[i] < 0) {
      return Status::error(spec.name, ": dims[", i, "] of ", name, "=", tensor.dims[i],
                           " is negative; give the size of the axis");
    }
    operand->dims[i] = tensor.dims[i];
    empty = empty || tensor.dims[i] == 0;
  }
  if (with_data && tensor.data == nullptr && !empty) {
    return Status::error(spec.name, ": ", name, " has no data; give its memory");
  }
  return {};
}

Status read_inputs(const OperatorSpec& spec, const vssm_tensor* inputs, int32_t count,
                   bool with_data, Operand* const* operands) {
  if (inputs == nullptr || count != spec.input_count) {
    return Status::error(spec.name, ": input_count=", inputs == nullptr ? 0 : count,
                         ", but it must be ", spec.input_count,
                         "; give them in the order of the operator table");
  }
  Status status;
  for (int i = 0; i < count && status.ok(); ++i) {
    status = read_tensor(spec, spec.inputs[static_cast<size_t>(i)].name, inputs[i], with_data,
                         operands[i]);
  }
  return status;
}

Status check_outputs(const OperatorSpec& spec, const vssm_tensor* outputs, int32_t count) {
  if (outputs != nullptr && count == spec.output_count) return {};
  if (spec.output_count == 1) {
    return Status::error(spec.name, ": ", spec.outputs[0].name, " is missing; give its memory");
  }
  return Status::error(spec.name, ": output_count=", outputs == nullptr ? 0 : count,
                       ", but it must be ", spec.output_count,
                       "; give them in the order of the operator table");
}

Status read_output(const OperatorSpec& spec, int index, const vssm_tensor& tensor,
                   const Operand& expected, void** data) {
  const std::string_view name = spec.outputs[static_cast<size_t>(index)].name;
  Operand given;
  const Status status = read_tensor(spec, name, tensor, true, &given);
  if (!status.ok()) return status;
  bool same = given.dtype == expected.dtype && given.rank == expected.rank;
  for (int i = 0; i < expected.rank; ++i) same = same && given.dims[i] == expected.dims[i];
  *data = tensor.data;
  if (same) return {};
  return Status::error(spec.name, ": ", name, " must be ", name_of(expected.dtype), " (",
                       expected.dims[0], ", ", expected.dims[1], expected.rank == 3 ? ", " : "",
                       expected.rank == 3 ? "..." : "", "), the shape of the operator table");
}

Status read_attributes(const vssm_scan_attributes& attributes, SelectiveScanArgs* args) {
  if (attributes.variant < 0 || attributes.variant > 2) {
    return Status::error(args->name, ": variant=", attributes.variant,
                         " is outside [0, 2]; use 0 to let it be chosen");
  }
  args->delta_softplus = attributes.delta_softplus;
  args->params_by_step = attributes.params_by_step;
  args->scale = attributes.scale;
  // 0 is what programs have there that were compiled before it was an attribute.
  args->direction_axis = attributes.direction_axis == 0 ? 2 : attributes.direction_axis;
  return {};
}

Status read_attributes(const vssm_gather_attributes& attributes, TokenGatherArgs* args) {
  args->num_keep = attributes.num_keep;
  args->protected_position = attributes.protected_position;
  return {};
}

Status read_attributes(const vssm_conv_attributes& attributes, TokenConvArgs* args) {
  args->by_position = attributes.by_position;
  args->activation = attributes.activation;
  if (!args->on_grid) return {};
  args->grid_height = attributes.grid_height;
  args->grid_width = attributes.grid_width;
  args->group = attributes.group;
  return {};
}

namespace {

constexpr NoAttributes kNoAttributes;

[[maybe_unused]] Status no_cuda(const char* op) {
  return Status::error(op,
                       ": this library has no CUDA kernels; build it where nvcc is, or pass no ",
                       "launch to run on the CPU");
}

template <class F, class Attributes>
Status run(const char* op, const vssm_tensor* inputs, int32_t count, const vssm_tensor* outputs,
           int32_t output_count, const Attributes* attributes, const vssm_launch* launch) {
  typename F::Args args;
  const Status status = read_call<F>(op, inputs, count, outputs, output_count, attributes, &args);
  if (!status.ok()) return status;
  if (launch == nullptr) return run_on_cpu<F>(args, variant_of(*attributes), {});
#if defined(VSSM_CUDA)
  return F::launch(args, variant_of(*attributes),
                   {launch->stream, launch->workspace, launch->workspace_bytes});
#else
  return no_cuda(op);
#endif
}

template <class F, class Attributes>
Status workspace(const char* op, const vssm_tensor* inputs, int32_t count,
                 const Attributes* attributes, int64_t* bytes) {
  const OperatorSpec* spec = nullptr;
  typename F::Args args;
  typename F::Shape shape;
  Status status = read<F>(op, inputs, count, attributes, false, &spec, &args);
  if (status.ok()) status = check(args, &shape);
  if (!status.ok()) return status;
#if defined(VSSM_CUDA)
  *bytes = F::workspace(args, shape, variant_of(*attributes));
  return {};
#else
  *bytes = 0;
  return no_cuda(op);
#endif
}

}  // namespace
}  // namespace vssm::c

namespace c = vssm::c;
using vssm::ConvFamily, vssm::GatherFamily, vssm::ScanFamily, vssm::ScatterFamily;

int vssm_selective_scan(const char* op, const vssm_tensor* inputs, int32_t input_count,
                        const vssm_tensor* y, const vssm_scan_attributes* attributes,
                        const vssm_launch* launch, char* error, size_t error_bytes) {
  return c::report(c::run<ScanFamily>(op, inputs, input_count, y, 1, attributes, launch), error,
                   error_bytes);
}

int vssm_selective_scan_workspace(const char* op, const vssm_tensor* inputs, int32_t input_count,
                                  const vssm_scan_attributes* attributes, int64_t* bytes,
                                  char* error, size_t error_bytes) {
  return c::report(c::workspace<ScanFamily>(op, inputs, input_count, attributes, bytes), error,
                   error_bytes);
}

int vssm_token_gather(const char* op, const vssm_tensor* inputs, int32_t input_count,
                      const vssm_tensor* outputs, int32_t output_count,
                      const vssm_gather_attributes* attributes, const vssm_launch* launch,
                      char* error, size_t error_bytes) {
  return c::report(
      c::run<GatherFamily>(op, inputs, input_count, outputs, output_count, attributes, launch),
      error, error_bytes);
}

int vssm_token_gather_workspace(const char* op, const vssm_tensor* inputs, int32_t input_count,
                                const vssm_gather_attributes* attributes, int64_t* bytes,
                                char* error, size_t error_bytes) {
  return c::report(c::workspace<GatherFamily>(op, inputs, input_count, attributes, bytes), error,
                   error_bytes);
}

int vssm_token_conv(const char* op, const vssm_tensor* inputs, int32_t input_count,
                    const vssm_tensor* y, const vssm_conv_attributes* attributes,
                    const vssm_launch* launch, char* error, size_t error_bytes) {
  return c::report(c::run<ConvFamily>(op, inputs, input_count, y, 1, attributes, launch), error,
                   error_bytes);
}

int vssm_token_conv_workspace(const char* op, const vssm_tensor* inputs, int32_t input_count,
                              const vssm_conv_attributes* attributes, int64_t* bytes, char* error,
                              size_t error_bytes) {
  return c::report(c::workspace<ConvFamily>(op, inputs, input_count, attributes, bytes), error,
                   error_bytes);
}

int vssm_token_scatter(const char* op, const vssm_tensor* inputs, int32_t input_count,
                       const vssm_tensor* y, const vssm_launch* launch, char* error,
                       size_t error_bytes) {
  return c::report(c::run<ScatterFamily>(op, inputs, input_count, y, 1, &c::kNoAttributes, launch),
                   error, error_bytes);
}

int vssm_token_scatter_workspace(const char* op, const vssm_tensor* inputs, int32_t input_count,
                                 int64_t* bytes, char* error, size_t error_bytes) {
  return c::report(c::workspace<ScatterFamily>(op, inputs, input_count, &c::kNoAttributes, bytes),
                   error, error_bytes);
}

int vssm_has_cuda(void) {
#if defined(VSSM_CUDA)
  return 1;
#else
  return 0;
#endif
}

const char* vssm_version(void) { return VSSM_VERSION; }

const char* vssm_operator_table(void) {
  static const std::string text = vssm::describe_table();
  return text.c_str();
}
