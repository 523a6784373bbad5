// What the adapters ask of ONNX Runtime: operands, attributes, outputs, errors, threads.
#ifndef VSSM_PLUGINS_ONNXRUNTIME_ORT_HOST_H_
#define VSSM_PLUGINS_ONNXRUNTIME_ORT_HOST_H_

#include "plugins/kernels/op_table.h"
#include "plugins/kernels/types.h"
#include "plugins/onnxruntime/custom_op.h"
#include "plugins/onnxruntime/ort_abi.h"

namespace vssm::ort {

/// ONNX Runtime's functions; set once, by RegisterCustomOps.
const Api& api();
void set_api(const Api* table);

/// Null for success, else an ONNX Runtime error with our message.
ort::Status* to_ort(const vssm::Status& status);

/// Our Status from theirs, which is released.
vssm::Status from_ort(ort::Status* status, const char* what);

[[nodiscard]] ElementType element_type(DType dtype);

/// Description and data of input `index`.
vssm::Status read_input(const KernelContext* context, size_t index, Operand* operand);

/// Memory of output `index` with these dimensions.
vssm::Status make_output(KernelContext* context, size_t index, const int64_t* dims, size_t rank,
                         void** data);

/// The attribute, or its default in the operator table; refused when it has another type, or is
/// missing and required.
vssm::Status read_attribute(const KernelInfo* info, const OperatorSpec& spec, const char* name,
                            int64_t* value);
vssm::Status read_attribute(const KernelInfo* info, const OperatorSpec& spec, const char* name,
                            float* value);

/// Size of an axis of input `index` as the graph states it; -1 where it does not.
[[nodiscard]] int64_t static_size(const KernelInfo* info, size_t index, size_t axis);

/// Counts a run of an operator on a provider; and how many there were in this process.
void count_call(Provider provider);
[[nodiscard]] uint64_t kernel_calls(Provider provider);

/// Work is spread over the session's intra-op threads.
ParallelFor parallel_for(const KernelContext* context);

/// A shape during shape inference: known sizes, or names of unknown ones.
struct SymbolicShape {
  ElementType type = kAny;
  size_t rank = 0;
  int64_t dims[kMaxRank] = {};       // -1 where unknown
  const char* names[kMaxRank] = {};  // "" where there is none; owned by ONNX Runtime
};

/// False where nothing is known of input `index`, or its rank is not `rank`.
bool read_shape(const ShapeContext* context, size_t index, size_t rank, SymbolicShape* shape);

ort::Status* set_output_shape(ShapeContext* context, size_t index, const SymbolicShape& shape);

}  // namespace vssm::ort

#endif  // VSSM_PLUGINS_ONNXRUNTIME_ORT_HOST_H_
