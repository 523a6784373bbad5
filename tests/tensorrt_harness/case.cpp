#include "tests/tensorrt_harness/case.h"

#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>

#include "plugins/tensorrt/node.h"

namespace vssm::harness {
namespace {

DType dtype_named(const std::string& name) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt32}) {
    if (name == name_of(dtype)) return dtype;
  }
  throw std::runtime_error("no type " + name);
}

Tensor read_tensor(std::istringstream& line, const std::string& folder, bool is_input) {
  Tensor tensor;
  std::string type, file;
  size_t rank = 0;
  line >> tensor.name >> type >> rank;
  tensor.dtype = dtype_named(type);
  tensor.dims.resize(rank);
  for (int64_t& size : tensor.dims) line >> size;
  line >> file;
  if (!line) throw std::runtime_error("a tensor's line is cut");
  tensor.file = folder + file;
  if (is_input) {
    std::ifstream stream(tensor.file, std::ios::binary);
    tensor.bytes.assign(std::istreambuf_iterator<char>(stream), {});
    if (static_cast<int64_t>(tensor.bytes.size()) != tensor.size()) {
      throw std::runtime_error(tensor.file + " has another size than its tensor");
    }
  }
  return tensor;
}

/// Sizes of small cases, by the table's axis names.
int64_t small_size(std::string_view axis, int64_t batch, int64_t seqlen) {
  if (axis == "batch") return batch;
  if (axis == "seqlen") return seqlen;
  if (axis == "full_seqlen") return 2 * seqlen + 1;
  if (axis == "num_keep") return 1;
  if (axis == "d_inner" || axis == "d") return 3;
  if (axis == "d_state" || axis == "K" || axis == "d0") return 2;
  return 1;  // shared axes, d1
}

/// Zeros serve as numbers; places count up, gaps are 1.
void fill(Tensor* tensor) {
  tensor->bytes.assign(static_cast<size_t>(tensor->size()), 0);
  if (tensor->dtype != DType::kInt32) return;
  const int64_t row = tensor->dims.back();
  auto* const numbers = reinterpret_cast<int32_t*>(tensor->bytes.data());
  for (int64_t i = 0; i < tensor->size() / 4; ++i) {
    numbers[i] = tensor->name == "gap" ? 1 : static_cast<int32_t>(i % row);
  }
}

}  // namespace

int64_t Tensor::size() const {
  int64_t size = size_of(dtype);
  for (const int64_t axis : dims) size *= axis;
  return size;
}

Fields Case::fields() const {
  Fields fields;
  for (int i = 0; i < spec->attribute_count; ++i) {
    const AttributeSpec& attribute = spec->attributes[static_cast<size_t>(i)];
    const auto found = attributes.find(attribute.name);
    if (found == attributes.end()) continue;
    if (attribute.kind == AttributeKind::kInt) {
      fields.add(attribute.name, static_cast<int32_t>(found->second));
    } else {
      fields.add(attribute.name, static_cast<float>(found->second));
    }
  }
  return fields;
}

Case read_case(const std::string& path) {
  Case read;
  std::ifstream stream(path);
  const std::string folder = path.substr(0, path.rfind('/') + 1);
  std::string text, word, name;
  while (std::getline(stream, text)) {
    std::istringstream line(text);
    line >> word;
    if (word == "op") {
      line >> name;
      read.spec = &spec_of(name);
    } else if (word == "attribute") {
      double value = 0;
      line >> name >> value;
      read.attributes[name] = value;
    } else {
      const bool is_input = word == "input";
      (is_input ? read.inputs : read.outputs).push_back(read_tensor(line, folder, is_input));
    }
  }
  if (read.spec == nullptr) throw std::runtime_error(path + " names no operator");
  return read;
}

void write_outputs(const Case& given, int32_t tactic) {
  for (const Tensor& output : given.outputs) {
    std::ofstream stream(output.file + "." + std::to_string(tactic), std::ios::binary);
    stream.write(output.bytes.data(), static_cast<std::streamsize>(output.bytes.size()));
    if (!stream) throw std::runtime_error(output.file + " cannot be written");
  }
}

Case small_case(const OperatorSpec& spec, const TypeBinding& binding, int64_t batch,
                int64_t seqlen) {
  Case made;
  made.spec = &spec;
  if (spec.family == Family::kTokenGather) {
    made.attributes = {{"num_keep", 1}, {"protected_position", 2}};
  } else if (is_on_grid(spec)) {
    made.attributes = {{"grid_height", 64}, {"grid_width", 64}, {"group", 3}};
    made.attributes.insert({{"by_position", 1}, {"activation", 0}});  // not the defaults
  } else if (spec.family == Family::kTokenConv) {
    made.attributes = {{"by_position", 1}, {"activation", 0}};  // not the defaults
  } else if (spec.family == Family::kSelectiveScan) {
    made.attributes = {{"params_by_step", 1}, {"scale", 0.75}};  // not the defaults
  }
  const auto tensor = [&](const OperandSpec& operand) {
    Tensor one;
    one.name = operand.name;
    one.dtype = resolve(operand.type, binding);
    for (int i = 0; i < trt::rank_of(operand); ++i) {
      one.dims.push_back(small_size(trt::axis_of(operand, i), batch, seqlen));
    }
    fill(&one);
    return one;
  };
  for (size_t i = 0; i < static_cast<size_t>(spec.input_count); ++i) {
    made.inputs.push_back(tensor(spec.inputs[i]));
  }
  for (size_t i = 0; i < static_cast<size_t>(spec.output_count); ++i) {
    made.outputs.push_back(tensor(spec.outputs[i]));
  }
  return made;
}

}  // namespace vssm::harness
