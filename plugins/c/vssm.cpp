// The C ABI over the kernels: reads descriptors into the kernels' structs, calls, reports.
#include "plugins/c/vssm.h"

#include <cstdio>
#include <string>

#include "plugins/c/read.h"
#include "plugins/kernels/token_gather.h"
#include "plugins/kernels/token_scatter.h"

namespace vssm {
namespace {

static_assert(static_cast<int>(DType::kFloat32) == VSSM_FLOAT32, "the ABI's codes are ours");
static_assert(static_cast<int>(DType::kFloat16) == VSSM_FLOAT16, "the ABI's codes are ours");
static_assert(static_cast<int>(DType::kBFloat16) == VSSM_BFLOAT16, "the ABI's codes are ours");
static_assert(static_cast<int>(DType::kInt32) == VSSM_INT32, "the ABI's codes are ours");
static_assert(sizeof(vssm_tensor::dims) == kMaxRank * sizeof(int64_t), "one rank for both");

}  // namespace

int c::report(const Status& status, char* error, size_t error_bytes) {
  if (status.ok()) return 0;
  if (error != nullptr && error_bytes > 0) {
    std::snprintf(error, error_bytes, "%s", status.message());
  }
  return 1;
}

namespace {

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

}  // namespace

Status c::read_tensor(const OperatorSpec& spec, std::string_view name, const vssm_tensor& tensor,
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

namespace {

Status read_inputs(const OperatorSpec& spec, const vssm_tensor* inputs, int32_t count,
                   bool with_data, Operand* const* operands) {
  if (inputs == nullptr || count != spec.input_count) {
    return Status::error(spec.name, ": input_count=", inputs == nullptr ? 0 : count,
                         ", but it must be ", spec.input_count,
                         "; give them in the order of the operator table");
  }
  Status status;
  for (int i = 0; i < count && status.ok(); ++i) {
    status = c::read_tensor(spec, spec.inputs[static_cast<size_t>(i)].name, inputs[i], with_data,
                            operands[i]);
  }
  return status;
}

/// The memory of an output, which must have exactly this description.
template <typename T>
Status read_output(const OperatorSpec& spec, int index, const vssm_tensor& tensor,
                   const Operand& expected, T** data) {
  const std::string_view name = spec.outputs[static_cast<size_t>(index)].name;
  Operand given;
  const Status status = c::read_tensor(spec, name, tensor, true, &given);
  if (!status.ok()) return status;
  bool same = given.dtype == expected.dtype && given.rank == expected.rank;
  for (int i = 0; i < expected.rank; ++i) same = same && given.dims[i] == expected.dims[i];
  *data = static_cast<T*>(tensor.data);
  if (same) return {};
  return Status::error(spec.name, ": ", name, " must be ", name_of(expected.dtype), " (",
                       expected.dims[0], ", ", expected.dims[1], expected.rank == 3 ? ", " : "",
                       expected.rank == 3 ? "..." : "", "), the shape of the operator table");
}

}  // namespace

Status c::read_scan(const char* op, const vssm_tensor* inputs, int32_t count,
                    const vssm_scan_attributes* attributes, bool with_data,
                    const OperatorSpec** spec, SelectiveScanArgs* args) {
  Status status = find_operator(op, Family::kSelectiveScan, spec);
  if (!status.ok()) return status;
  if (attributes == nullptr) {
    return Status::error(op, ": attributes are missing; give their struct");
  }
  if (attributes->variant < 0 || attributes->variant > 2) {
    return Status::error(op, ": variant=", attributes->variant,
                         " is outside [0, 2]; use 0 to let it be chosen");
  }
  args->name = (*spec)->name;
  args->gated = (*spec)->inputs[9].name == "z";
  args->constant_gap = (*spec)->inputs[9].name == "delta0";
  args->delta_softplus = attributes->delta_softplus;
  args->params_by_step = attributes->params_by_step;
  args->scale = attributes->scale;
  // 0 is what programs have there that were compiled before it was an attribute.
  args->direction_axis = attributes->direction_axis == 0 ? 2 : attributes->direction_axis;
  Operand* const operands[] = {&args->u,          &args->delta,
                               &args->A,          &args->B,
                               &args->C,          &args->D,
                               &args->delta_bias, &args->order,
                               &args->gap,        args->gated ? &args->z : &args->delta0};
  return read_inputs(**spec, inputs, count, with_data, operands);
}

Status c::read_conv(const char* op, const vssm_tensor* inputs, int32_t count,
                    const vssm_conv_attributes* attributes, bool with_data,
                    const OperatorSpec** spec, TokenConvArgs* args) {
  const Status status = find_operator(op, Family::kTokenConv, spec);
  if (!status.ok()) return status;
  if (attributes == nullptr) {
    return Status::error(op, ": attributes are missing; give their struct");
  }
  args->name = (*spec)->name;
  args->by_position = attributes->by_position;
  args->activation = attributes->activation;
  args->on_grid = is_on_grid(**spec);
  if (args->on_grid) {
    args->grid_height = attributes->grid_height;
    args->grid_width = attributes->grid_width;
    args->group = attributes->group;
  }
  Operand* const operands[] = {&args->x, &args->weight, &args->bias, &args->position};
  return read_inputs(**spec, inputs, count, with_data, operands);
}

namespace {

Status read_gather(const char* op, const vssm_tensor* inputs, int32_t count,
                   const vssm_gather_attributes* attributes, bool with_data,
                   const OperatorSpec** spec, TokenGatherArgs* args) {
  Status status = find_operator(op, Family::kTokenGather, spec);
  if (!status.ok()) return status;
  if (attributes == nullptr) {
    return Status::error(op, ": attributes are missing; give their struct");
  }
  args->name = (*spec)->name;
  args->count = (*spec)->variable_count;
  args->num_keep = attributes->num_keep;
  args->protected_position = attributes->protected_position;
  Operand* const operands[] = {&args->score, &args->position, &args->x[0], &args->x[1]};
  return read_inputs(**spec, inputs, count, with_data, operands);
}

Status read_scatter(const char* op, const vssm_tensor* inputs, int32_t count, bool with_data,
                    const OperatorSpec** spec, TokenScatterArgs* args) {
  const Status status = find_operator(op, Family::kTokenScatter, spec);
  if (!status.ok()) return status;
  args->name = (*spec)->name;
  Operand* const operands[] = {&args->base, &args->x, &args->position};
  return read_inputs(**spec, inputs, count, with_data, operands);
}

[[maybe_unused]] Status no_cuda(const char* op) {
  return Status::error(op,
                       ": this library has no CUDA kernels; build it where nvcc is, or pass no ",
                       "launch to run on the CPU");
}

Status scan_on_cuda([[maybe_unused]] const SelectiveScanArgs& args,
                    [[maybe_unused]] int32_t variant, [[maybe_unused]] const vssm_launch& launch) {
#if defined(VSSM_CUDA)
  return selective_scan_cuda(args, static_cast<ScanVariant>(variant),
                             {launch.stream, launch.workspace, launch.workspace_bytes});
#else
  return no_cuda(args.name);
#endif
}

Status gather_on_cuda([[maybe_unused]] const TokenGatherArgs& args,
                      [[maybe_unused]] const vssm_launch& launch) {
#if defined(VSSM_CUDA)
  return token_gather_cuda(args, {launch.stream, launch.workspace, launch.workspace_bytes});
#else
  return no_cuda(args.name);
#endif
}

Status conv_on_cuda([[maybe_unused]] const TokenConvArgs& args,
                    [[maybe_unused]] const vssm_launch& launch) {
#if defined(VSSM_CUDA)
  return token_conv_cuda(args, {launch.stream, launch.workspace, launch.workspace_bytes});
#else
  return no_cuda(args.name);
#endif
}

Status scatter_on_cuda([[maybe_unused]] const TokenScatterArgs& args,
                       [[maybe_unused]] const vssm_launch& launch) {
#if defined(VSSM_CUDA)
  return token_scatter_cuda(args, {launch.stream, launch.workspace, launch.workspace_bytes});
#else
  return no_cuda(args.name);
#endif
}

Status run_scan(const char* op, const vssm_tensor* inputs, int32_t count, const vssm_tensor* y,
                const vssm_scan_attributes* attributes, const vssm_launch* launch) {
  const OperatorSpec* spec = nullptr;
  SelectiveScanArgs args;
  Status status = c::read_scan(op, inputs, count, attributes, true, &spec, &args);
  SelectiveScanShape shape;
  if (status.ok()) status = check(args, &shape);
  if (!status.ok()) return status;
  if (y == nullptr) return Status::error(op, ": y is missing; give its memory");
  const Operand expected = {nullptr, args.u.dtype, 3, {shape.batch, shape.seqlen, shape.d_inner}};
  status = read_output(*spec, 0, *y, expected, &args.y);
  if (!status.ok()) return status;
  if (launch != nullptr) return scan_on_cuda(args, attributes->variant, *launch);
  if (attributes->variant == 0) return selective_scan_cpu(args, {});
  return Status::error(op, ": variant=", attributes->variant, " is for CUDA; use 0 on the CPU");
}

Status run_gather(const char* op, const vssm_tensor* inputs, int32_t count,
                  const vssm_tensor* outputs, int32_t output_count,
                  const vssm_gather_attributes* attributes, const vssm_launch* launch) {
  const OperatorSpec* spec = nullptr;
  TokenGatherArgs args;
  Status status = read_gather(op, inputs, count, attributes, true, &spec, &args);
  TokenGatherShape shape;
  if (status.ok()) status = check(args, &shape);
  if (!status.ok()) return status;
  if (outputs == nullptr || output_count != spec->output_count) {
    return Status::error(op, ": output_count=", outputs == nullptr ? 0 : output_count,
                         ", but it must be ", spec->output_count,
                         "; give them in the order of the operator table");
  }
  const Operand kept = {nullptr, DType::kInt32, 2, {shape.batch, args.num_keep}};
  status = read_output(*spec, 0, outputs[0], kept, &args.kept_position);
  for (int i = 0; i < args.count && status.ok(); ++i) {
    const Operand y = {nullptr, args.x[i].dtype, 3, {shape.batch, args.num_keep, shape.width[i]}};
    status = read_output(*spec, i + 1, outputs[i + 1], y, &args.y[i]);
  }
  if (!status.ok()) return status;
  return launch != nullptr ? gather_on_cuda(args, *launch) : token_gather_cpu(args, {});
}

Status run_conv(const char* op, const vssm_tensor* inputs, int32_t count, const vssm_tensor* y,
                const vssm_conv_attributes* attributes, const vssm_launch* launch) {
  const OperatorSpec* spec = nullptr;
  TokenConvArgs args;
  Status status = c::read_conv(op, inputs, count, attributes, true, &spec, &args);
  TokenConvShape shape;
  if (status.ok()) status = check(args, &shape);
  if (!status.ok()) return status;
  if (y == nullptr) return Status::error(op, ": y is missing; give its memory");
  status = read_output(*spec, 0, *y, y_of(args, shape), &args.y);
  if (!status.ok()) return status;
  return launch != nullptr ? conv_on_cuda(args, *launch) : token_conv_cpu(args, {});
}

Status run_scatter(const char* op, const vssm_tensor* inputs, int32_t count, const vssm_tensor* y,
                   const vssm_launch* launch) {
  const OperatorSpec* spec = nullptr;
  TokenScatterArgs args;
  Status status = read_scatter(op, inputs, count, true, &spec, &args);
  TokenScatterShape shape;
  if (status.ok()) status = check(args, &shape);
  if (!status.ok()) return status;
  if (y == nullptr) return Status::error(op, ": y is missing; give its memory");
  Operand expected = args.base;
  expected.data = nullptr;
  status = read_output(*spec, 0, *y, expected, &args.y);
  if (!status.ok()) return status;
  return launch != nullptr ? scatter_on_cuda(args, *launch) : token_scatter_cpu(args, {});
}

Status scan_workspace(const char* op, const vssm_tensor* inputs, int32_t count,
                      const vssm_scan_attributes* attributes, int64_t* bytes) {
  const OperatorSpec* spec = nullptr;
  SelectiveScanArgs args;
  Status status = c::read_scan(op, inputs, count, attributes, false, &spec, &args);
  SelectiveScanShape shape;
  if (status.ok()) status = check(args, &shape);
  if (!status.ok()) return status;
#if defined(VSSM_CUDA)
  *bytes = selective_scan_cuda_workspace(shape, args.u.dtype,
                                         static_cast<ScanVariant>(attributes->variant));
  return {};
#else
  *bytes = 0;
  return no_cuda(op);
#endif
}

Status conv_workspace(const char* op, const vssm_tensor* inputs, int32_t count,
                      const vssm_conv_attributes* attributes, int64_t* bytes) {
  const OperatorSpec* spec = nullptr;
  TokenConvArgs args;
  Status status = c::read_conv(op, inputs, count, attributes, false, &spec, &args);
  TokenConvShape shape;
  if (status.ok()) status = check(args, &shape);
  if (!status.ok()) return status;
#if defined(VSSM_CUDA)
  *bytes = token_conv_cuda_workspace(shape);
  return {};
#else
  *bytes = 0;
  return no_cuda(op);
#endif
}

Status scatter_workspace(const char* op, const vssm_tensor* inputs, int32_t count, int64_t* bytes) {
  const OperatorSpec* spec = nullptr;
  TokenScatterArgs args;
  Status status = read_scatter(op, inputs, count, false, &spec, &args);
  TokenScatterShape shape;
  if (status.ok()) status = check(args, &shape);
  if (!status.ok()) return status;
#if defined(VSSM_CUDA)
  *bytes = token_scatter_cuda_workspace(shape);
  return {};
#else
  *bytes = 0;
  return no_cuda(op);
#endif
}

Status gather_workspace(const char* op, const vssm_tensor* inputs, int32_t count,
                        const vssm_gather_attributes* attributes, int64_t* bytes) {
  const OperatorSpec* spec = nullptr;
  TokenGatherArgs args;
  Status status = read_gather(op, inputs, count, attributes, false, &spec, &args);
  TokenGatherShape shape;
  if (status.ok()) status = check(args, &shape);
  if (!status.ok()) return status;
#if defined(VSSM_CUDA)
  *bytes = token_gather_cuda_workspace(shape);
  return {};
#else
  *bytes = 0;
  return no_cuda(op);
#endif
}

}  // namespace
}  // namespace vssm

int vssm_selective_scan(const char* op, const vssm_tensor* inputs, int32_t input_count,
                        const vssm_tensor* y, const vssm_scan_attributes* attributes,
                        const vssm_launch* launch, char* error, size_t error_bytes) {
  return vssm::c::report(vssm::run_scan(op, inputs, input_count, y, attributes, launch), error,
                         error_bytes);
}

int vssm_selective_scan_workspace(const char* op, const vssm_tensor* inputs, int32_t input_count,
                                  const vssm_scan_attributes* attributes, int64_t* bytes,
                                  char* error, size_t error_bytes) {
  return vssm::c::report(vssm::scan_workspace(op, inputs, input_count, attributes, bytes), error,
                         error_bytes);
}

int vssm_token_gather(const char* op, const vssm_tensor* inputs, int32_t input_count,
                      const vssm_tensor* outputs, int32_t output_count,
                      const vssm_gather_attributes* attributes, const vssm_launch* launch,
                      char* error, size_t error_bytes) {
  return vssm::c::report(
      vssm::run_gather(op, inputs, input_count, outputs, output_count, attributes, launch), error,
      error_bytes);
}

int vssm_token_gather_workspace(const char* op, const vssm_tensor* inputs, int32_t input_count,
                                const vssm_gather_attributes* attributes, int64_t* bytes,
                                char* error, size_t error_bytes) {
  return vssm::c::report(vssm::gather_workspace(op, inputs, input_count, attributes, bytes), error,
                         error_bytes);
}

int vssm_token_conv(const char* op, const vssm_tensor* inputs, int32_t input_count,
                    const vssm_tensor* y, const vssm_conv_attributes* attributes,
                    const vssm_launch* launch, char* error, size_t error_bytes) {
  return vssm::c::report(vssm::run_conv(op, inputs, input_count, y, attributes, launch), error,
                         error_bytes);
}

int vssm_token_conv_workspace(const char* op, const vssm_tensor* inputs, int32_t input_count,
                              const vssm_conv_attributes* attributes, int64_t* bytes, char* error,
                              size_t error_bytes) {
  return vssm::c::report(vssm::conv_workspace(op, inputs, input_count, attributes, bytes), error,
                         error_bytes);
}

int vssm_token_scatter(const char* op, const vssm_tensor* inputs, int32_t input_count,
                       const vssm_tensor* y, const vssm_launch* launch, char* error,
                       size_t error_bytes) {
  return vssm::c::report(vssm::run_scatter(op, inputs, input_count, y, launch), error, error_bytes);
}

int vssm_token_scatter_workspace(const char* op, const vssm_tensor* inputs, int32_t input_count,
                                 int64_t* bytes, char* error, size_t error_bytes) {
  return vssm::c::report(vssm::scatter_workspace(op, inputs, input_count, bytes), error,
                         error_bytes);
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
