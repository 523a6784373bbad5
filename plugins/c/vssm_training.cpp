// The C ABI over the CPU kernels on several threads, and over the backward pass.
#include "plugins/c/vssm_training.h"

#include "plugins/c/call.h"
#include "plugins/c/threads.h"
#include "plugins/kernels/selective_scan_backward.h"

namespace vssm::c {
namespace {

Status check_threads(const char* op, int32_t threads) {
  if (threads >= 1) return {};
  return Status::error(op, ": threads=", threads, " is below 1; count the calling thread");
}

/// The memory of a gradient, which must have the type and shape of `like`.
Status read_target(const OperatorSpec& spec, std::string_view name, const vssm_tensor& tensor,
                   const Operand& like, void** data) {
  Operand given;
  Status status = read_tensor(spec, name, tensor, true, &given);
  if (!status.ok()) return status;
  bool same = given.dtype == like.dtype && given.rank == like.rank;
  for (int i = 0; i < like.rank; ++i) same = same && given.dims[i] == like.dims[i];
  *data = tensor.data;
  if (same) return {};
  return Status::error(spec.name, ": the result for ", name, " has another type or shape than ",
                       name, "; give it those of the operator table");
}

template <class F, class Attributes>
Status run(const char* op, const vssm_tensor* inputs, int32_t count, const vssm_tensor* y,
           const Attributes* attributes, int32_t threads) {
  typename F::Args args;
  Status status = read_call<F>(op, inputs, count, y, 1, attributes, &args);
  if (status.ok()) status = check_threads(op, threads);
  if (!status.ok()) return status;
  return run_on_cpu<F>(args, variant_of(*attributes), on_threads(&threads));
}

/// A gradient: the input it belongs to, its row in the operator table, and where it is written.
struct Gradient {
  const Operand* input;
  size_t row;
  float** place;
};

Status read_gradients(const OperatorSpec& spec, const vssm_tensor* given, int32_t count,
                      const Gradient* gradients, int wanted) {
  if (given == nullptr || count != wanted) {
    return Status::error(spec.name, ": gradient_count=", given == nullptr ? 0 : count,
                         ", but it must be ", wanted, "; give one for each input of floats");
  }
  Status status;
  for (int i = 0; i < count && status.ok(); ++i) {
    void* data = nullptr;
    status =
        read_target(spec, spec.inputs[gradients[i].row].name, given[i], *gradients[i].input, &data);
    *gradients[i].place = static_cast<float*>(data);
  }
  return status;
}

Status read_dy(const OperatorSpec& spec, const vssm_tensor* dy, Operand* operand) {
  if (dy == nullptr) return Status::error(spec.name, ": dy is missing; give its memory");
  return read_tensor(spec, "dy", *dy, true, operand);
}

Status run_backward(const char* op, const vssm_tensor* inputs, int32_t input_count,
                    const vssm_tensor* dy, const vssm_tensor* gradients, int32_t gradient_count,
                    const vssm_scan_attributes* attributes, int32_t threads) {
  const OperatorSpec* spec = nullptr;
  SelectiveScanBackwardArgs args;
  SelectiveScanArgs& scan = args.forward;
  Status status = read<ScanFamily>(op, inputs, input_count, attributes, true, &spec, &scan);
  if (status.ok()) status = read_dy(*spec, dy, &args.dy);
  SelectiveScanShape shape;
  if (status.ok()) status = check(args, &shape);
  if (!status.ok()) return status;
  // Order and gap, rows 7 and 8, are integers.
  const Gradient places[] = {
      {&scan.u, 0, &args.du},
      {&scan.delta, 1, &args.ddelta},
      {&scan.A, 2, &args.dA},
      {&scan.B, 3, &args.dB},
      {&scan.C, 4, &args.dC},
      {&scan.D, 5, &args.dD},
      {&scan.delta_bias, 6, &args.ddelta_bias},
      {scan.gated ? &scan.z : &scan.delta0, 9, scan.gated ? &args.dz : &args.ddelta0},
  };
  const int wanted = scan.gated || scan.constant_gap ? 8 : 7;
  status = read_gradients(*spec, gradients, gradient_count, places, wanted);
  if (status.ok()) status = check_threads(op, threads);
  return status.ok() ? selective_scan_backward_cpu(args, on_threads(&threads)) : status;
}

Status run_conv_backward(const char* op, const vssm_tensor* inputs, int32_t input_count,
                         const vssm_tensor* dy, const vssm_tensor* gradients,
                         int32_t gradient_count, const vssm_conv_attributes* attributes,
                         int32_t threads) {
  const OperatorSpec* spec = nullptr;
  TokenConvBackwardArgs args;
  TokenConvArgs& conv = args.forward;
  Status status = read<ConvFamily>(op, inputs, input_count, attributes, true, &spec, &conv);
  if (status.ok()) status = read_dy(*spec, dy, &args.dy);
  TokenConvShape shape;
  if (status.ok()) status = check(args, &shape);
  if (!status.ok()) return status;
  const Gradient places[] = {
      {&conv.x, 0, &args.dx}, {&conv.weight, 1, &args.dweight}, {&conv.bias, 2, &args.dbias}};
  status = read_gradients(*spec, gradients, gradient_count, places, 3);
  if (status.ok()) status = check_threads(op, threads);
  return status.ok() ? token_conv_backward_cpu(args, on_threads(&threads)) : status;
}

Status measure_backward(const char* op, const vssm_tensor* inputs, int32_t count,
                        const vssm_scan_attributes* attributes, int64_t* bytes) {
  const OperatorSpec* spec = nullptr;
  SelectiveScanArgs args;
  Status status = read<ScanFamily>(op, inputs, count, attributes, false, &spec, &args);
  SelectiveScanShape shape;
  if (status.ok()) status = check(args, &shape);
  if (!status.ok()) return status;
  const BackwardMemory memory = selective_scan_backward_cpu_memory(shape);
  bytes[0] = memory.shared;
  bytes[1] = memory.per_thread;
  return {};
}

}  // namespace
}  // namespace vssm::c

namespace c = vssm::c;

int vssm_selective_scan_on_threads(const char* op, const vssm_tensor* inputs, int32_t input_count,
                                   const vssm_tensor* y, const vssm_scan_attributes* attributes,
                                   int32_t threads, char* error, size_t error_bytes) {
  return c::report(c::run<vssm::ScanFamily>(op, inputs, input_count, y, attributes, threads), error,
                   error_bytes);
}

int vssm_token_conv_on_threads(const char* op, const vssm_tensor* inputs, int32_t input_count,
                               const vssm_tensor* y, const vssm_conv_attributes* attributes,
                               int32_t threads, char* error, size_t error_bytes) {
  return c::report(c::run<vssm::ConvFamily>(op, inputs, input_count, y, attributes, threads), error,
                   error_bytes);
}

int vssm_selective_scan_backward(const char* op, const vssm_tensor* inputs, int32_t input_count,
                                 const vssm_tensor* dy, const vssm_tensor* gradients,
                                 int32_t gradient_count, const vssm_scan_attributes* attributes,
                                 int32_t threads, char* error, size_t error_bytes) {
  return c::report(
      c::run_backward(op, inputs, input_count, dy, gradients, gradient_count, attributes, threads),
      error, error_bytes);
}

int vssm_token_conv_backward(const char* op, const vssm_tensor* inputs, int32_t input_count,
                             const vssm_tensor* dy, const vssm_tensor* gradients,
                             int32_t gradient_count, const vssm_conv_attributes* attributes,
                             int32_t threads, char* error, size_t error_bytes) {
  return c::report(c::run_conv_backward(op, inputs, input_count, dy, gradients, gradient_count,
                                        attributes, threads),
                   error, error_bytes);
}

int vssm_selective_scan_backward_memory(const char* op, const vssm_tensor* inputs,
                                        int32_t input_count, const vssm_scan_attributes* attributes,
                                        int64_t* bytes, char* error, size_t error_bytes) {
  return c::report(c::measure_backward(op, inputs, input_count, attributes, bytes), error,
                   error_bytes);
}
