// What TensorRT tells a plugin of a case.
#include "plugins/tensorrt/node.h"
#include "tests/tensorrt_harness/life.h"

namespace vssm::harness {
namespace {

constexpr trt::DataType kTypes[] = {
    trt::DataType::kFLOAT, trt::DataType::kHALF, trt::DataType::kINT8,
    trt::DataType::kINT32, trt::DataType::kBOOL, trt::DataType::kUINT8,
    trt::DataType::kFP8,   trt::DataType::kBF16, trt::DataType::kINT64};
constexpr trt::TensorFormat kFormats[] = {trt::TensorFormat::kLINEAR, trt::TensorFormat::kCHW2,
                                          trt::TensorFormat::kHWC8, trt::TensorFormat::kCHW32};

const Tensor& tensor_at(const Case& given, size_t i) {
  return i < given.inputs.size() ? given.inputs[i] : given.outputs[i - given.inputs.size()];
}

const OperandSpec& operand_at(const Case& given, size_t i) {
  const size_t inputs = given.inputs.size();
  return i < inputs ? given.spec->inputs[i] : given.spec->outputs[i - inputs];
}

/// Whether an axis changes from call to call: its id, or 0.
int64_t changing(const Case& given, const OperandSpec& operand, const Tensor& tensor, int axis) {
  // With directions outside of the tokens the two axes are exchanged.
  const auto found = given.attributes.find("direction_axis");
  const bool outside = found != given.attributes.end() && found->second == 1;
  const bool exchanged = outside && tensor.dims.size() == 4 && (axis == 1 || axis == 2);
  const std::string_view name = trt::axis_of(operand, exchanged ? 3 - axis : axis);
  return id_of(name == "1|batch" && tensor.dims[static_cast<size_t>(axis)] > 1 ? "batch" : name);
}

trt::Dims dims_of(const Tensor& tensor) {
  trt::Dims dims = {};
  dims.nbDims = static_cast<int32_t>(tensor.dims.size());
  for (size_t i = 0; i < tensor.dims.size(); ++i) dims.d[i] = tensor.dims[i];
  return dims;
}

void extend(trt::IPluginV3OneBuild& build, const Case& given,
            std::vector<trt::DynamicPluginTensorDesc>* at, std::vector<trt::DataType>* types,
            std::vector<std::vector<trt::DataType>>* found) {
  const size_t pos = types->size();
  if (pos == at->size()) {
    found->push_back(*types);
    return;
  }
  for (const trt::DataType type : kTypes) {
    for (const trt::TensorFormat format : kFormats) {
      (*at)[pos].desc.type = type;
      (*at)[pos].desc.format = format;
      // What stands behind `pos` is nothing that the plugin may look at.
      for (size_t i = pos + 1; i < at->size(); ++i) {
        (*at)[i].desc.type = trt::DataType::kBOOL;
        (*at)[i].desc.format = trt::TensorFormat::kCHW32;
      }
      if (!build.supportsFormatCombination(static_cast<int32_t>(pos), at->data(),
                                           given.spec->input_count, given.spec->output_count)) {
        continue;
      }
      expect(format == trt::TensorFormat::kLINEAR, "only the linear format is taken");
      types->push_back(type);
      extend(build, given, at, types, found);
      types->pop_back();
      (*at)[pos].desc.type = type;
      (*at)[pos].desc.format = format;
    }
  }
}

}  // namespace

int64_t id_of(std::string_view axis) {
  return axis == "batch" ? 1 : axis == "seqlen" ? 2 : axis == "full_seqlen" ? 3 : 0;
}

std::vector<trt::PluginTensorDesc> descriptions_of(const Case& given) {
  std::vector<trt::PluginTensorDesc> found;
  for (size_t i = 0; i < given.inputs.size() + given.outputs.size(); ++i) {
    trt::PluginTensorDesc description = {};
    description.dims = dims_of(tensor_at(given, i));
    description.type = trt::data_type(tensor_at(given, i).dtype);
    description.format = trt::TensorFormat::kLINEAR;
    description.scale = 1;
    found.push_back(description);
  }
  return found;
}

std::vector<trt::DynamicPluginTensorDesc> profile_of(const Case& given) {
  std::vector<trt::DynamicPluginTensorDesc> found;
  const std::vector<trt::PluginTensorDesc> descriptions = descriptions_of(given);
  for (size_t i = 0; i < descriptions.size(); ++i) {
    trt::DynamicPluginTensorDesc one = {descriptions[i], descriptions[i].dims, descriptions[i].dims,
                                        descriptions[i].dims};
    for (int axis = 0; axis < one.desc.dims.nbDims; ++axis) {
      if (changing(given, operand_at(given, i), tensor_at(given, i), axis) == 0) continue;
      one.desc.dims.d[axis] = -1;
      one.min.d[axis] = 1;
      one.max.d[axis] *= 2;
    }
    found.push_back(one);
  }
  return found;
}

std::vector<trt::DataType> input_types_of(const Case& given) {
  std::vector<trt::DataType> types;
  for (const Tensor& input : given.inputs) types.push_back(trt::data_type(input.dtype));
  return types;
}

std::vector<trt::DimsExprs> expressions_of(const Case& given, bool dynamic, Builder* builder) {
  std::vector<trt::DimsExprs> found;
  for (size_t i = 0; i < given.inputs.size(); ++i) {
    const Tensor& tensor = given.inputs[i];
    trt::DimsExprs one = {};
    one.nbDims = static_cast<int32_t>(tensor.dims.size());
    for (int axis = 0; axis < one.nbDims; ++axis) {
      const int64_t id = dynamic ? changing(given, given.spec->inputs[i], tensor, axis) : 0;
      const int64_t size = tensor.dims[static_cast<size_t>(axis)];
      one.d[axis] = id != 0 ? builder->dynamic(id) : builder->fixed(size);
    }
    found.push_back(one);
  }
  return found;
}

std::vector<std::vector<trt::DataType>> accepted_types(trt::IPluginV3OneBuild& build,
                                                       const Case& given) {
  std::vector<std::vector<trt::DataType>> found;
  std::vector<trt::DataType> types;
  std::vector<trt::DynamicPluginTensorDesc> at = profile_of(given);
  extend(build, given, &at, &types, &found);
  return found;
}

}  // namespace vssm::harness
