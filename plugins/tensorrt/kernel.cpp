#include "plugins/tensorrt/kernel.h"

#include "plugins/kernels/families.h"

namespace vssm::trt {
namespace {

template <class F>
typename F::Args attributes_of(const Node& node) {
  typename F::Args args = F::args_of(*node.spec);
  F::each_attribute(&args, [&node](const char* name, auto* value) { read(node, name, value); });
  return args;
}

template <class F>
typename F::Args args_of(const Node& node, const Call& call) {
  typename F::Args args = attributes_of<F>(node);
  const auto inputs = F::inputs(&args);
  for (size_t i = 0; i < static_cast<size_t>(node.spec->input_count); ++i) {
    *inputs[i] = call.inputs[i];
  }
  for (int i = 0; i < node.spec->output_count; ++i) {
    F::write_to(&args, i, call.outputs[static_cast<size_t>(i)]);
  }
  return args;
}

template <class F>
Status check_attributes(const Node& node, int64_t seqlen) {
  return F::check_attributes(attributes_of<F>(node), seqlen);
}

template <class F>
Status check_call(const Node& node, const Call& call) {
  typename F::Shape shape;
  return check(args_of<F>(node, call), &shape);
}

template <class F>
Status workspace(const Node& node, const Call& call, int32_t tactic, int64_t* bytes) {
  const typename F::Args args = args_of<F>(node, call);
  typename F::Shape shape;
  const Status status = check(args, &shape);
  if (status.ok()) *bytes = F::workspace(args, shape, tactic);
  return status;
}

template <class F>
Status launch(const Node& node, const Call& call, int32_t tactic, const CudaLaunch& launch) {
  return F::launch(args_of<F>(node, call), tactic, launch);
}

template <class F>
constexpr Kernel kKernel = {F::kVariants.data(), static_cast<int32_t>(F::kVariants.size()),
                            check_attributes<F>, check_call<F>,
                            workspace<F>,        launch<F>};

}  // namespace

const Kernel& kernel_of(const OperatorSpec& spec) {
  switch (spec.family) {
    case Family::kTokenGather:
      return kKernel<GatherFamily>;
    case Family::kTokenConv:
      return kKernel<ConvFamily>;
    case Family::kTokenScatter:
      return kKernel<ScatterFamily>;
    default:
      return kKernel<ScanFamily>;
  }
}

}  // namespace vssm::trt
