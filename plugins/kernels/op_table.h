// The operator table, C++ copy of exporter/vssm/ops/spec.py: a test compares describe_table() of
// the two. Adapters take names, types and default attributes from here.
#ifndef VSSM_PLUGINS_KERNELS_OP_TABLE_H_
#define VSSM_PLUGINS_KERNELS_OP_TABLE_H_

#include <array>
#include <cstdio>
#include <string>
#include <string_view>

#include "plugins/kernels/types.h"

namespace vssm {

constexpr const char* kDomain = "vssm";

/// One input or output; `type` is "float32", "int32" or a type variable ("T", "T0", "T1").
struct OperandSpec {
  std::string_view name, type, shape;
};

enum class AttributeKind { kInt, kFloat };

struct AttributeSpec {
  const char* name;
  AttributeKind kind;
  bool required;
  double default_value;
};

constexpr int kMaxOperands = 10;
constexpr int kMaxBindings = 5;
constexpr int kMaxAttributes = 5;

/// The element types of T, or of T0 and T1.
using TypeBinding = std::array<DType, 2>;

enum class Family { kSelectiveScan, kTokenGather, kTokenConv, kTokenScatter };

/// One operator; unused tails of the arrays are empty.
struct OperatorSpec {
  const char* name;
  Family family;
  int input_count, output_count, attribute_count, variable_count, binding_count;
  std::array<OperandSpec, kMaxOperands> inputs;
  std::array<OperandSpec, 3> outputs;
  std::array<AttributeSpec, kMaxAttributes> attributes;
  std::array<TypeBinding, kMaxBindings> bindings;
};

namespace table {

constexpr DType kF32 = DType::kFloat32;
constexpr DType kF16 = DType::kFloat16;
constexpr DType kBF16 = DType::kBFloat16;
constexpr std::array<TypeBinding, kMaxBindings> kOneType = {{{kF32}, {kF16}, {kBF16}}};
constexpr std::array<AttributeSpec, kMaxAttributes> kScanAttributes = {{
    {"delta_softplus", AttributeKind::kInt, false, 1},
    {"params_by_step", AttributeKind::kInt, false, 0},
    {"scale", AttributeKind::kFloat, false, 1},
    {"direction_axis", AttributeKind::kInt, false, 2},
}};
constexpr std::array<AttributeSpec, kMaxAttributes> kGatherAttributes = {{
    {"num_keep", AttributeKind::kInt, true, 0},
    {"protected_position", AttributeKind::kInt, false, -1},
}};
constexpr std::array<AttributeSpec, kMaxAttributes> kConvAttributes = {{
    {"by_position", AttributeKind::kInt, false, 0},
    {"activation", AttributeKind::kInt, false, 1},
}};
constexpr std::array<AttributeSpec, kMaxAttributes> kGridAttributes = {{
    {"grid_height", AttributeKind::kInt, true, 0},
    {"grid_width", AttributeKind::kInt, true, 0},
    {"group", AttributeKind::kInt, true, 0},
    {"by_position", AttributeKind::kInt, false, 0},
    {"activation", AttributeKind::kInt, false, 1},
}};
constexpr std::array<OperandSpec, 3> kScanOutputs = {{{"y", "T", "batch,seqlen,d_inner"}}};

/// SelectiveScan's nine inputs, and a tenth if it has a name.
constexpr std::array<OperandSpec, kMaxOperands> scan_inputs(OperandSpec last = {}) {
  return {{{"u", "T", "batch,seqlen,Ku,d_inner"},
           {"delta", "T", "batch,seqlen,Kd,d_inner"},
           {"A", "float32", "Ka,d_inner,1|d_state"},
           {"B", "T", "batch,seqlen,Kb,d_state"},
           {"C", "T", "batch,seqlen,Kc,d_state"},
           {"D", "float32", "Ks,d_inner"},
           {"delta_bias", "float32", "Kd,d_inner"},
           {"order", "int32", "1|batch,K,seqlen"},
           {"gap", "int32", "1|batch,K,seqlen"},
           last}};
}

constexpr OperatorSpec scan(const char* name, int input_count, OperandSpec last = {}) {
  return {name,         Family::kSelectiveScan, input_count, 1, 4, 1, 3, scan_inputs(last),
          kScanOutputs, kScanAttributes,        kOneType};
}

}  // namespace table

inline constexpr std::array<OperatorSpec, 8> kOperators = {{
    table::scan("SelectiveScan", 9),
    table::scan("GatedSelectiveScan", 10, {"z", "T", "batch,seqlen,d_inner"}),
    table::scan("SelectiveScanConstantGap", 10, {"delta0", "float32", "Kd,d_inner"}),
    {"TokenGather",
     Family::kTokenGather,
     4,
     3,
     2,
     2,
     5,
     {{{"score", "float32", "batch,seqlen"},
       {"position", "int32", "1|batch,seqlen"},
       {"x0", "T0", "batch,seqlen,d0"},
       {"x1", "T1", "batch,seqlen,d1"}}},
     {{{"kept_position", "int32", "batch,num_keep"},
       {"y0", "T0", "batch,num_keep,d0"},
       {"y1", "T1", "batch,num_keep,d1"}}},
     table::kGatherAttributes,
     {{{table::kF32, table::kF32},
       {table::kF16, table::kF16},
       {table::kBF16, table::kBF16},
       {table::kF16, table::kF32},
       {table::kBF16, table::kF32}}}},
    {"TokenGather1",
     Family::kTokenGather,
     3,
     2,
     2,
     1,
     3,
     {{{"score", "float32", "batch,seqlen"},
       {"position", "int32", "1|batch,seqlen"},
       {"x0", "T0", "batch,seqlen,d0"}}},
     {{{"kept_position", "int32", "batch,num_keep"}, {"y0", "T0", "batch,num_keep,d0"}}},
     table::kGatherAttributes,
     table::kOneType},
    {"TokenConv",
     Family::kTokenConv,
     4,
     1,
     2,
     1,
     3,
     {{{"x", "T", "batch,seqlen,d_inner"},
       {"weight", "float32", "K,d_inner,width"},
       {"bias", "float32", "K,d_inner"},
       {"position", "int32", "1|batch,seqlen"}}},
     {{{"y", "T", "batch,K,seqlen,d_inner"}}},
     table::kConvAttributes,
     table::kOneType},
    {"TokenConv2D",
     Family::kTokenConv,
     4,
     1,
     5,
     1,
     3,
     {{{"x", "T", "batch,seqlen,d_inner"},
       {"weight", "float32", "d_inner,side,side"},
       {"bias", "float32", "d_inner"},
       {"position", "int32", "1|batch,seqlen"}}},
     {{{"y", "T", "batch,seqlen,d_inner"}}},
     table::kGridAttributes,
     table::kOneType},
    {"TokenScatter",
     Family::kTokenScatter,
     3,
     1,
     0,
     1,
     3,
     {{{"base", "T", "batch,full_seqlen,d"},
       {"x", "T", "batch,seqlen,d"},
       {"position", "int32", "1|batch,seqlen"}}},
     {{{"y", "T", "batch,full_seqlen,d"}}},
     {},
     table::kOneType},
}};

/// Whether an operator, of the family of convolutions, goes over a grid.
constexpr bool is_on_grid(const OperatorSpec& op) {
  return std::string_view(op.name) == "TokenConv2D";
}

/// The element type of an operand under one binding of the type variables.
constexpr DType resolve(std::string_view type, const TypeBinding& binding) {
  if (type == "float32") return DType::kFloat32;
  if (type == "int32") return DType::kInt32;
  return binding[type == "T1" ? 1 : 0];
}

inline std::string describe(const OperandSpec& operand) {
  return std::string(operand.name) + ":" + std::string(operand.type) + "[" +
         std::string(operand.shape) + "]";
}

inline std::string describe(const AttributeSpec& attribute) {
  std::string text = attribute.name;
  text += attribute.kind == AttributeKind::kInt ? ":int" : ":float";
  if (attribute.required) return text;
  char digits[32];
  std::snprintf(digits, sizeof(digits), "=%g", attribute.default_value);
  return text + digits;
}

inline std::string describe(const OperatorSpec& op) {
  const auto list = [](const auto& items, int count) {
    std::string text;
    for (int i = 0; i < count; ++i) text += (i == 0 ? "" : ", ") + describe(items[i]);
    return text;
  };
  std::string text = op.name;
  text += "(" + list(op.inputs, op.input_count) + ") -> (" + list(op.outputs, op.output_count);
  text += ") {" + list(op.attributes, op.attribute_count) + "} ";
  text += op.variable_count == 2 ? "T0,T1" : op.family == Family::kTokenGather ? "T0" : "T";
  text += " in ";
  for (int b = 0; b < op.binding_count; ++b) {
    text += b == 0 ? "" : " | ";
    for (int v = 0; v < op.variable_count; ++v) {
      text += (v == 0 ? "" : ",") + std::string(name_of(op.bindings[b][v]));
    }
  }
  return text;
}

/// The whole table, one operator a line: what vssm.ops.spec.describe_table() prints.
inline std::string describe_table() {
  std::string text;
  for (const OperatorSpec& op : kOperators) text += describe(op) + "\n";
  return text;
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_OP_TABLE_H_
