// A node of a network as the plugins hold it: a row of the operator table, the values of its
// attributes, and for a call the tensors. Reading them from TensorRT's structures is done here,
// once.
#ifndef VSSM_PLUGINS_TENSORRT_NODE_H_
#define VSSM_PLUGINS_TENSORRT_NODE_H_

#include <array>

#include "plugins/kernels/op_table.h"
#include "plugins/tensorrt/trt_abi.h"

namespace vssm::trt {

constexpr int kMaxOutputs = 3;

/// Values stand in the order of the row's attributes, each in the member of its kind: TensorRT
/// passes and keeps attributes as 32-bit numbers.
struct Node {
  const OperatorSpec* spec = nullptr;
  std::array<int32_t, kMaxAttributes> integers = {};
  std::array<float, kMaxAttributes> reals = {};
};

/// The attribute of that name, which the row must have.
void read(const Node& node, std::string_view name, int64_t* value);
void read(const Node& node, std::string_view name, float* value);

/// The type in which an attribute travels.
[[nodiscard]] PluginFieldType field_type(const AttributeSpec& attribute);

/// Reads attributes. While a network is built the optional ones may be absent; an engine holds them
/// all. Refuses what is unknown, twice there, missing, or of another type or length; what a value
/// may be is the kernel's to say.
Status read_fields(const OperatorSpec& spec, const PluginFieldCollection* collection,
                   TensorRTPhase phase, Node* node);

/// The fields that hold a node's attributes: pointers into `node`.
void write_fields(const Node& node, std::array<PluginField, kMaxAttributes>* fields);

/// The attributes as text, e.g. "num_keep=157,protected_position=98".
void write_text(const Node& node, char* text, size_t capacity);

/// The tensors of one call, in the order of the row.
struct Call {
  std::array<Operand, kMaxOperands> inputs;
  std::array<void*, kMaxOutputs> outputs = {};
};

[[nodiscard]] DType dtype_of(DataType type);
[[nodiscard]] DataType data_type(DType dtype);

/// An operand without data.
[[nodiscard]] Operand describe(const Dims& dims, DataType type);

/// Number of axes that the table gives an operand.
[[nodiscard]] int rank_of(const OperandSpec& operand);

/// Name of an axis in the table: "batch", "Ku", "1|batch", ...
[[nodiscard]] std::string_view axis_of(const OperandSpec& operand, int axis);

}  // namespace vssm::trt

#endif  // VSSM_PLUGINS_TENSORRT_NODE_H_
