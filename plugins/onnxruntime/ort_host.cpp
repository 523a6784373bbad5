#include "plugins/onnxruntime/ort_host.h"

#include <atomic>
#include <cstring>

namespace vssm::ort {
namespace {

std::atomic<const Api*> g_api{nullptr};
std::atomic<uint64_t> g_calls[2] = {};

DType dtype_of(ElementType type) {
  switch (type) {
    case kFloat:
      return DType::kFloat32;
    case kFloat16:
      return DType::kFloat16;
    case kBFloat16:
      return DType::kBFloat16;
    case kInt32:
      return DType::kInt32;
    case kAny:
      break;
  }
  return DType::kOther;
}

/// Releases a status; whether it was a success.
bool succeeded(ort::Status* status) {
  if (status == nullptr) return true;
  api().ReleaseStatus(status);
  return false;
}

const AttributeSpec& spec_of(const OperatorSpec& spec, const char* name) {
  int i = 0;
  while (std::strcmp(spec.attributes[static_cast<size_t>(i)].name, name) != 0) ++i;
  return spec.attributes[static_cast<size_t>(i)];
}

vssm::Status describe(const TensorInfo* info, Operand* operand) {
  ElementType type = kAny;
  size_t rank = 0;
  vssm::Status status = from_ort(api().GetTensorElementType(info, &type), "GetTensorElementType");
  if (status.ok()) status = from_ort(api().GetDimensionsCount(info, &rank), "GetDimensionsCount");
  if (!status.ok()) return status;
  operand->dtype = dtype_of(type);
  operand->rank = rank > kMaxRank ? kMaxRank + 1 : static_cast<int>(rank);
  if (rank > kMaxRank) return {};
  return from_ort(api().GetDimensions(info, operand->dims, rank), "GetDimensions");
}

/// Missing is not the same as of another type, but the runtime says both with one error.
template <typename T>
vssm::Status use_default(const KernelInfo* info, const OperatorSpec& spec, const char* name,
                         T* value) {
  const AttributeSpec& attribute = spec_of(spec, name);
  float real = 0;
  int64_t integer = 0;
  size_t size = 0;
  const bool is_there =
      succeeded(api().KernelInfoGetAttribute_float(info, name, &real)) ||
      succeeded(api().KernelInfoGetAttribute_int64(info, name, &integer)) ||
      (succeeded(api().KernelInfoGetAttribute_string(info, name, nullptr, &size)) && size > 0);
  if (is_there) {
    return vssm::Status::error(spec.name, ": attribute ", name, " is not ",
                               attribute.kind == AttributeKind::kInt ? "an int" : "a float",
                               "; write it with the type that the operator table has");
  }
  if (attribute.required) {
    return vssm::Status::error(spec.name, ": attribute ", name,
                               " is missing and has no default; export the file again");
  }
  *value = static_cast<T>(attribute.default_value);
  return {};
}

void run_parallel(void* host, ParallelFor::Task task, size_t count, void* argument) {
  const auto* context = static_cast<const KernelContext*>(host);
  // Batches: 0 lets the pool decide. Should the pool refuse, the work is still done, here.
  if (succeeded(api().KernelContext_ParallelFor(context, task, count, 0, argument))) return;
  for (size_t i = 0; i < count; ++i) task(argument, i);
}

}  // namespace

const Api& api() { return *g_api.load(std::memory_order_relaxed); }
void set_api(const Api* table) { g_api.store(table, std::memory_order_relaxed); }

ort::Status* to_ort(const vssm::Status& status) {
  return status.ok() ? nullptr : api().CreateStatus(kInvalidArgument, status.message());
}

vssm::Status from_ort(ort::Status* status, const char* what) {
  if (status == nullptr) return {};
  const vssm::Status ours =
      vssm::Status::error("onnxruntime ", what, ": ", api().GetErrorMessage(status));
  api().ReleaseStatus(status);
  return ours;
}

ElementType element_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return kFloat;
    case DType::kFloat16:
      return kFloat16;
    case DType::kBFloat16:
      return kBFloat16;
    case DType::kInt32:
      return kInt32;
    case DType::kOther:
      break;
  }
  return kAny;
}

vssm::Status read_input(const KernelContext* context, size_t index, Operand* operand) {
  const Value* value = nullptr;
  vssm::Status status = from_ort(api().KernelContext_GetInput(context, index, &value), "GetInput");
  if (!status.ok()) return status;
  TensorInfo* info = nullptr;
  status = from_ort(api().GetTensorTypeAndShape(value, &info), "GetTensorTypeAndShape");
  if (!status.ok()) return status;
  status = describe(info, operand);
  api().ReleaseTensorTypeAndShapeInfo(info);
  if (!status.ok()) return status;
  // The C API has one accessor for both; inputs are only read.
  void* data = nullptr;
  status = from_ort(api().GetTensorMutableData(const_cast<Value*>(value), &data), "GetTensorData");
  operand->data = data;
  return status;
}

vssm::Status make_output(KernelContext* context, size_t index, const int64_t* dims, size_t rank,
                         void** data) {
  Value* value = nullptr;
  vssm::Status status =
      from_ort(api().KernelContext_GetOutput(context, index, dims, rank, &value), "GetOutput");
  if (status.ok()) status = from_ort(api().GetTensorMutableData(value, data), "GetTensorData");
  return status;
}

vssm::Status read_attribute(const KernelInfo* info, const OperatorSpec& spec, const char* name,
                            int64_t* value) {
  if (succeeded(api().KernelInfoGetAttribute_int64(info, name, value))) return {};
  return use_default(info, spec, name, value);
}

vssm::Status read_attribute(const KernelInfo* info, const OperatorSpec& spec, const char* name,
                            float* value) {
  if (succeeded(api().KernelInfoGetAttribute_float(info, name, value))) return {};
  return use_default(info, spec, name, value);
}

int64_t static_size(const KernelInfo* info, size_t index, size_t axis) {
  TypeInfo* type = nullptr;
  if (!succeeded(api().KernelInfo_GetInputTypeInfo(info, index, &type))) return -1;
  const TensorInfo* tensor = nullptr;
  Operand operand;
  const bool known = succeeded(api().CastTypeInfoToTensorInfo(type, &tensor)) &&
                     tensor != nullptr && describe(tensor, &operand).ok() &&
                     static_cast<int>(axis) < operand.rank && operand.rank <= kMaxRank;
  api().ReleaseTypeInfo(type);
  return known ? operand.dims[axis] : -1;
}

void count_call(Provider provider) {
  g_calls[static_cast<size_t>(provider)].fetch_add(1, std::memory_order_relaxed);
}

uint64_t kernel_calls(Provider provider) {
  return g_calls[static_cast<size_t>(provider)].load(std::memory_order_relaxed);
}

ParallelFor parallel_for(const KernelContext* context) {
  return {run_parallel, const_cast<KernelContext*>(context)};
}

bool read_shape(const ShapeContext* context, size_t index, size_t rank, SymbolicShape* shape) {
  TensorInfo* info = nullptr;  // owned by the context
  if (!succeeded(api().ShapeInferContext_GetInputTypeShape(context, index, &info))) return false;
  if (info == nullptr || !succeeded(api().GetTensorElementType(info, &shape->type)) ||
      !succeeded(api().GetDimensionsCount(info, &shape->rank))) {
    return false;
  }
  return shape->rank == rank && succeeded(api().GetDimensions(info, shape->dims, rank)) &&
         succeeded(api().GetSymbolicDimensions(info, shape->names, rank));
}

ort::Status* set_output_shape(ShapeContext* context, size_t index, const SymbolicShape& shape) {
  TensorInfo* info = nullptr;
  ort::Status* status = api().CreateTensorTypeAndShapeInfo(&info);
  if (status != nullptr) return status;
  status = api().SetTensorElementType(info, shape.type);
  if (status == nullptr) status = api().SetDimensions(info, shape.dims, shape.rank);
  if (status == nullptr) {
    auto** names = const_cast<const char**>(shape.names);
    status = api().SetSymbolicDimensions(info, names, shape.rank);
  }
  if (status == nullptr) {
    status = api().ShapeInferContext_SetOutputTypeShape(context, index, info);
  }
  api().ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

}  // namespace vssm::ort
