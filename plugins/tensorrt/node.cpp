#include "plugins/tensorrt/node.h"

#include <cstdio>
#include <cstring>

namespace vssm::trt {
namespace {

/// More than any operator has: a count beyond it is no collection of ours.
constexpr int32_t kMaxFields = 64;

/// Position among the row's attributes; attribute_count where there is none.
size_t find_attribute(const OperatorSpec& spec, std::string_view name) {
  const auto count = static_cast<size_t>(spec.attribute_count);
  size_t i = 0;
  while (i < count && spec.attributes[i].name != name) ++i;
  return i;
}

/// The name may be noise: whoever reads the log expects text.
Status unknown_field(const OperatorSpec& spec, const char* name) {
  char printable[64] = "";
  for (size_t i = 0; i + 1 < sizeof(printable) && name[i] != '\0'; ++i) {
    printable[i] = name[i] >= ' ' && name[i] <= '~' ? name[i] : '?';
  }
  if (spec.attribute_count == 0) {
    return Status::error(spec.name, ": attribute ", printable,
                         " is unknown; the operator has none in its version 1");
  }
  const auto known = [&spec](int i) {
    return i < spec.attribute_count ? spec.attributes[static_cast<size_t>(i)].name : "";
  };
  return Status::error(spec.name, ": attribute ", printable, " is unknown; known are ", known(0),
                       " ", known(1), " ", known(2), " ", known(3),
                       ", in version 1 of the operator");
}

Status read_field(const OperatorSpec& spec, size_t i, const PluginField& field, Node* node) {
  const AttributeSpec& attribute = spec.attributes[i];
  if (field.type != field_type(attribute)) {
    return Status::error(spec.name, ": type(", attribute.name,
                         ")=", static_cast<int32_t>(field.type), ", but it must be ",
                         attribute.kind == AttributeKind::kInt ? "kINT32 (5)" : "kFLOAT32 (1)",
                         "; write the attribute with the type that the operator table has");
  }
  if (field.length != 1 || field.data == nullptr) {
    return Status::error(spec.name, ": length(", attribute.name,
                         ")=", field.data == nullptr ? 0 : field.length, ", but it is one number; ",
                         "give it one value");
  }
  // Data of a deserialised engine need not be aligned.
  if (attribute.kind == AttributeKind::kInt) {
    std::memcpy(&node->integers[i], field.data, sizeof(int32_t));
  } else {
    std::memcpy(&node->reals[i], field.data, sizeof(float));
  }
  return {};
}

Status use_defaults(const OperatorSpec& spec, TensorRTPhase phase,
                    const std::array<bool, kMaxAttributes>& given, Node* node) {
  for (size_t i = 0; i < static_cast<size_t>(spec.attribute_count); ++i) {
    const AttributeSpec& attribute = spec.attributes[i];
    if (given[i]) continue;
    if (phase == TensorRTPhase::kRUNTIME) {
      return Status::error(spec.name, ": attribute ", attribute.name,
                           " is missing in the engine; build the engine again");
    }
    if (attribute.required) {
      return Status::error(spec.name, ": attribute ", attribute.name,
                           " is missing and has no default; export the file again");
    }
    node->integers[i] = static_cast<int32_t>(attribute.default_value);
    node->reals[i] = static_cast<float>(attribute.default_value);
  }
  return {};
}

}  // namespace

void read(const Node& node, std::string_view name, int64_t* value) {
  *value = node.integers[find_attribute(*node.spec, name)];
}

void read(const Node& node, std::string_view name, float* value) {
  *value = node.reals[find_attribute(*node.spec, name)];
}

PluginFieldType field_type(const AttributeSpec& attribute) {
  return attribute.kind == AttributeKind::kInt ? PluginFieldType::kINT32
                                               : PluginFieldType::kFLOAT32;
}

Status read_fields(const OperatorSpec& spec, const PluginFieldCollection* collection,
                   TensorRTPhase phase, Node* node) {
  *node = {};
  node->spec = &spec;
  const int32_t count = collection == nullptr ? 0 : collection->nbFields;
  if (count < 0 || count > kMaxFields || (count > 0 && collection->fields == nullptr)) {
    return Status::error(spec.name, ": nbFields=", count,
                         " is no count of attributes, or there is no array of them; pass the "
                         "collection that TensorRT's parser or engine gives");
  }
  std::array<bool, kMaxAttributes> given = {};
  for (int32_t f = 0; f < count; ++f) {
    const PluginField& field = collection->fields[f];
    if (field.name == nullptr) {
      return Status::error(spec.name, ": field ", f, " has no name; name the attribute");
    }
    const size_t i = find_attribute(spec, field.name);
    if (i == static_cast<size_t>(spec.attribute_count)) return unknown_field(spec, field.name);
    if (given[i]) {
      return Status::error(spec.name, ": attribute ", field.name, " is there twice; give it once");
    }
    given[i] = true;
    const Status status = read_field(spec, i, field, node);
    if (!status.ok()) return status;
  }
  return use_defaults(spec, phase, given, node);
}

void write_fields(const Node& node, std::array<PluginField, kMaxAttributes>* fields) {
  for (size_t i = 0; i < static_cast<size_t>(node.spec->attribute_count); ++i) {
    const AttributeSpec& attribute = node.spec->attributes[i];
    PluginField& field = (*fields)[i];
    field.name = attribute.name;
    field.type = field_type(attribute);
    field.length = 1;
    field.data = &node.integers[i];
    if (attribute.kind == AttributeKind::kFloat) field.data = &node.reals[i];
  }
}

void write_text(const Node& node, char* text, size_t capacity) {
  size_t used = 0;
  text[0] = '\0';
  for (size_t i = 0; i < static_cast<size_t>(node.spec->attribute_count); ++i) {
    const AttributeSpec& attribute = node.spec->attributes[i];
    const bool is_int = attribute.kind == AttributeKind::kInt;
    // Nine digits tell any two floats apart, ten any two ints.
    const double value = is_int ? node.integers[i] : static_cast<double>(node.reals[i]);
    const int wrote = std::snprintf(text + used, capacity - used, "%s%s=%.*g", i == 0 ? "" : ",",
                                    attribute.name, is_int ? 10 : 9, value);
    used += static_cast<size_t>(wrote);
    if (used >= capacity) return;
  }
}

DType dtype_of(DataType type) {
  if (type == DataType::kFLOAT) return DType::kFloat32;
  if (type == DataType::kHALF) return DType::kFloat16;
  if (type == DataType::kBF16) return DType::kBFloat16;
  if (type == DataType::kINT32) return DType::kInt32;
  return DType::kOther;
}

DataType data_type(DType dtype) {
  if (dtype == DType::kFloat16) return DataType::kHALF;
  if (dtype == DType::kBFloat16) return DataType::kBF16;
  return dtype == DType::kInt32 ? DataType::kINT32 : DataType::kFLOAT;
}

Operand describe(const Dims& dims, DataType type) {
  Operand operand;
  operand.dtype = dtype_of(type);
  operand.rank = dims.nbDims < 0 || dims.nbDims > kMaxRank ? kMaxRank + 1 : dims.nbDims;
  for (int i = 0; i < operand.rank && i < kMaxRank; ++i) operand.dims[i] = dims.d[i];
  return operand;
}

int rank_of(const OperandSpec& operand) {
  int rank = 1;
  for (const char letter : operand.shape) rank += letter == ',' ? 1 : 0;
  return rank;
}

std::string_view axis_of(const OperandSpec& operand, int axis) {
  std::string_view rest = operand.shape;
  for (int i = 0; i < axis; ++i) rest.remove_prefix(rest.find(',') + 1);
  return rest.substr(0, rest.find(','));
}

}  // namespace vssm::trt
