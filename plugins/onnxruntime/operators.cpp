// The operators on ONNX Runtime's CPU and CUDA providers.
#include <new>

#include "plugins/kernels/families.h"
#include "plugins/onnxruntime/cuda_host.h"
#include "plugins/onnxruntime/custom_op.h"
#include "plugins/onnxruntime/ort_host.h"

namespace vssm::ort {
namespace {

/// A node: its row of the table, its attributes inside `args`, and on CUDA where memory is.
template <class F>
struct Node {
  const OperatorSpec* spec = nullptr;
  typename F::Args args;
  DeviceAllocator allocator;
};

template <class F>
vssm::Status read_node(const BoundOp& op, const KernelInfo* info, Node<F>* node) {
  const OperatorSpec& spec = *op.spec;
  node->spec = &spec;
  node->args = F::args_of(spec);
  vssm::Status status;
  F::each_attribute(&node->args, [&](const char* name, auto* value) {
    if (status.ok()) status = read_attribute(info, spec, name, value);
  });
  // Shape inference could refuse them, but ONNX Runtime only logs what that says.
  if (status.ok()) status = F::check_attributes(node->args, static_size(info, 0, 1));
  if (status.ok() && op.provider == Provider::kCuda) status = node->allocator.open(info);
  return status;
}

template <class F>
ort::Status* create(const CustomOp* op, const Api*, const KernelInfo* info, void** kernel) {
  auto* node = new (std::nothrow) Node<F>;
  if (node == nullptr) return api().CreateStatus(kFail, "no memory for a kernel");
  const vssm::Status status = read_node(*static_cast<const BoundOp*>(op), info, node);
  if (!status.ok()) {
    delete node;
    return to_ort(status);
  }
  *kernel = node;
  return nullptr;
}

/// Everything but the computing: operands, their check, memory of the outputs.
template <class F>
vssm::Status prepare(const Node<F>& node, KernelContext* context, typename F::Args* args,
                     typename F::Shape* shape) {
  *args = node.args;
  const auto inputs = F::inputs(args);
  vssm::Status status;
  for (size_t i = 0; i < static_cast<size_t>(node.spec->input_count) && status.ok(); ++i) {
    status = read_input(context, i, inputs[i]);
  }
  if (status.ok()) status = check(*args, shape);
  for (int i = 0; i < node.spec->output_count && status.ok(); ++i) {
    const Operand y = F::output(*args, *shape, i);
    void* data = nullptr;
    status =
        make_output(context, static_cast<size_t>(i), y.dims, static_cast<size_t>(y.rank), &data);
    F::write_to(args, i, data);
  }
  return status;
}

template <class F>
ort::Status* compute(void* kernel, KernelContext* context) {
  count_call(Provider::kCpu);
  typename F::Args args;
  typename F::Shape shape;
  vssm::Status status = prepare(*static_cast<const Node<F>*>(kernel), context, &args, &shape);
  if (status.ok()) status = F::run(args, parallel_for(context));
  return to_ort(status);
}

#ifdef VSSM_CUDA
template <class F>
ort::Status* compute_cuda(void* kernel, KernelContext* context) {
  count_call(Provider::kCuda);
  const auto& node = *static_cast<const Node<F>*>(kernel);
  typename F::Args args;
  typename F::Shape shape;
  vssm::Status status = prepare(node, context, &args, &shape);
  if (!status.ok()) return to_ort(status);
  CudaWork work(node.allocator);
  status = work.begin(context, F::workspace(args, shape, 0));
  if (status.ok()) status = F::launch(args, 0, work.launch());
  return to_ort(status);
}
#else
template <class F>
constexpr decltype(Implementation::compute_cuda) compute_cuda = nullptr;
#endif

template <class F>
void destroy(void* kernel) {
  delete static_cast<Node<F>*>(kernel);
}

// ONNX Runtime keeps one inference function for all types of an operator: types are taken from its
// inputs.

/// Adds an axis of another shape behind those that there are.
void add_axis(const SymbolicShape& from, size_t axis, SymbolicShape* shape) {
  shape->dims[shape->rank] = from.dims[axis];
  shape->names[shape->rank++] = from.names[axis];
}

ort::Status* read_integer(const ShapeContext* context, const char* name, int64_t* value) {
  const Attribute* attribute = nullptr;
  size_t size = 0;
  ort::Status* status = api().ShapeInferContext_GetAttribute(context, name, &attribute);
  if (status != nullptr) return status;
  return api().ReadOpAttr(attribute, kIntAttribute, value, sizeof(*value), &size);
}

ort::Status* infer_scan(const CustomOp*, ShapeContext* context) {
  SymbolicShape u, y;
  if (!read_shape(context, 0, 4, &u)) return nullptr;
  int64_t direction_axis = 2;  // its default: one that is not there is an error of ONNX Runtime's
  ort::Status* absent = read_integer(context, "direction_axis", &direction_axis);
  if (absent != nullptr) api().ReleaseStatus(absent);
  y.type = u.type;
  add_axis(u, 0, &y);
  add_axis(u, direction_axis == 1 ? 2 : 1, &y);
  add_axis(u, 3, &y);
  return set_output_shape(context, 0, y);
}

ort::Status* infer_gather(const CustomOp* op, ShapeContext* context) {
  const OperatorSpec& spec = *static_cast<const BoundOp*>(op)->spec;
  int64_t num_keep = 0;
  ort::Status* status = read_integer(context, "num_keep", &num_keep);
  if (status != nullptr) return status;
  SymbolicShape shape;
  if (!read_shape(context, 0, 2, &shape)) return nullptr;
  shape.dims[1] = num_keep;
  shape.names[1] = "";
  shape.type = kInt32;
  status = set_output_shape(context, 0, shape);
  for (int i = 0; i < spec.variable_count && status == nullptr; ++i) {
    SymbolicShape x;
    if (!read_shape(context, static_cast<size_t>(i) + 2, 3, &x)) continue;
    x.dims[1] = num_keep;
    x.names[1] = "";
    status = set_output_shape(context, static_cast<size_t>(i) + 1, x);
  }
  return status;
}

ort::Status* infer_conv(const CustomOp* op, ShapeContext* context) {
  SymbolicShape x, weight, y;
  if (!read_shape(context, 0, 3, &x) || !read_shape(context, 1, 3, &weight)) return nullptr;
  if (is_on_grid(*static_cast<const BoundOp*>(op)->spec)) return set_output_shape(context, 0, x);
  y.type = x.type;
  add_axis(x, 0, &y);
  add_axis(weight, 0, &y);
  add_axis(x, 1, &y);
  add_axis(x, 2, &y);
  return set_output_shape(context, 0, y);
}

ort::Status* infer_scatter(const CustomOp*, ShapeContext* context) {
  SymbolicShape base;
  if (!read_shape(context, 0, 3, &base)) return nullptr;
  return set_output_shape(context, 0, base);
}

/// Where nobody else reads base, y takes its memory, and the rows of x are all that moves.
size_t scatter_inplace(int** inputs, int** outputs) {
  static int base = 0, y = 0;
  *inputs = &base;
  *outputs = &y;
  return 1;
}

template <class F>
constexpr Implementation implement(decltype(CustomOp::InferOutputShapeFn) infer,
                                   decltype(CustomOp::GetMayInplace) may_inplace = nullptr) {
  return {create<F>, compute<F>, compute_cuda<F>, destroy<F>, infer, may_inplace};
}

}  // namespace

Implementation implementation_of(const OperatorSpec& spec) {
  switch (spec.family) {
    case Family::kTokenGather:
      return implement<GatherFamily>(infer_gather);
    case Family::kTokenConv:
      return implement<ConvFamily>(infer_conv);
    case Family::kTokenScatter:
      return implement<ScatterFamily>(infer_scatter, scatter_inplace);
    default:
      return implement<ScanFamily>(infer_scan);
  }
}

}  // namespace vssm::ort
