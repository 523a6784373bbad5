// SelectiveScan, GatedSelectiveScan and SelectiveScanConstantGap in TensorRT.
#include "plugins/kernels/selective_scan.h"
#include "plugins/tensorrt/kernel.h"

namespace vssm::trt {
namespace {

constexpr int32_t kTactics[] = {static_cast<int32_t>(kScanVariants[0]),
                                static_cast<int32_t>(kScanVariants[1])};
static_assert(sizeof(kTactics) / sizeof(kTactics[0]) ==
              sizeof(kScanVariants) / sizeof(kScanVariants[0]));

SelectiveScanArgs attributes_of(const Node& node) {
  SelectiveScanArgs args;
  args.name = node.spec->name;
  args.gated = node.spec->input_count == 10 && node.spec->inputs[9].name == "z";
  args.constant_gap = node.spec->input_count == 10 && node.spec->inputs[9].name == "delta0";
  args.delta_softplus = integer_of(node, "delta_softplus");
  args.params_by_step = integer_of(node, "params_by_step");
  args.scale = real_of(node, "scale");
  args.direction_axis = integer_of(node, "direction_axis");
  return args;
}

SelectiveScanArgs args_of(const Node& node, const Call& call) {
  SelectiveScanArgs args = attributes_of(node);
  Operand* const operands[] = {
      &args.u, &args.delta,      &args.A,     &args.B,   &args.C,
      &args.D, &args.delta_bias, &args.order, &args.gap, args.gated ? &args.z : &args.delta0};
  for (size_t i = 0; i < static_cast<size_t>(node.spec->input_count); ++i) {
    *operands[i] = call.inputs[i];
  }
  args.y = call.outputs[0];
  return args;
}

Status check_scan_attributes(const Node& node, int64_t) {
  return check_attributes(attributes_of(node));
}

Status check_scan(const Node& node, const Call& call) {
  SelectiveScanShape shape;
  return check(args_of(node, call), &shape);
}

Status scan_workspace(const Node& node, const Call& call, int32_t tactic, int64_t* bytes) {
  const SelectiveScanArgs args = args_of(node, call);
  SelectiveScanShape shape;
  const Status status = check(args, &shape);
  if (!status.ok()) return status;
  *bytes = selective_scan_cuda_workspace(shape, args.u.dtype, static_cast<ScanVariant>(tactic));
  return {};
}

Status launch_scan(const Node& node, const Call& call, int32_t tactic, const CudaLaunch& launch) {
  return selective_scan_cuda(args_of(node, call), static_cast<ScanVariant>(tactic), launch);
}

}  // namespace

const Kernel kSelectiveScan = {kTactics,
                               sizeof(kTactics) / sizeof(kTactics[0]),
                               check_scan_attributes,
                               check_scan,
                               scan_workspace,
                               launch_scan};

}  // namespace vssm::trt
