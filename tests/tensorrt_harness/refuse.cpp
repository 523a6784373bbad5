// Everything that a plugin must refuse, and the message that says so.
#include "tests/tensorrt_harness/refuse.h"

#include <cmath>
#include <cstring>

#include "tests/tensorrt_harness/life.h"

namespace vssm::harness {
namespace {

using trt::PluginFieldType;
using trt::TensorRTPhase;

/// A creator refuses these fields, and its message has `words`.
void refused(const Library& library, const char* op, Fields fields, const std::string& words,
             TensorRTPhase phase = TensorRTPhase::kBUILD) {
  const PluginPointer plugin(
      library.creator(op).createPlugin("blocks.3", fields.collection(), phase));
  const std::string log = take_log();
  expect(plugin == nullptr, std::string(op) + " takes fields that break a rule: " + words);
  expect(log.find(words) != std::string::npos, "\"" + words + "\" is not in: " + log);
  expect(log.find("vssm: node blocks.3: " + std::string(op)) == 0, "who speaks, in: " + log);
}

void refuse_values(const Library& library) {
  const struct {
    const char* op;
    const char* name;
    double value;
    const char* words;
  } rules[] = {
      {"TokenGather", "num_keep", 0, "num_keep=0 is outside [1, seqlen]"},
      {"TokenGather", "num_keep", -5, "num_keep=-5 is outside"},
      {"TokenGather", "num_keep", -2147483648.0, "num_keep=-2147483648 is outside"},
      {"TokenGather1", "protected_position", -2, "protected_position=-2 is below -1"},
      {"SelectiveScan", "delta_softplus", 2, "delta_softplus=2 is outside [0, 1]"},
      {"SelectiveScan", "delta_softplus", -1, "delta_softplus=-1 is outside [0, 1]"},
      {"GatedSelectiveScan", "params_by_step", 7, "params_by_step=7 is outside [0, 1]"},
      {"TokenConv", "by_position", 2, "by_position=2 is outside [0, 1]"},
      {"TokenConv", "activation", -1, "activation=-1 is outside [0, 1]"},
      {"TokenConv2D", "grid_height", -1, "grid_height=-1 is outside [1, 2147483647]"},
      {"TokenConv2D", "grid_width", 0, "grid_width=0 is outside [1, 2147483647]"},
      {"TokenConv2D", "activation", 2, "activation=2 is outside [0, 1]"},
      {"SelectiveScan", "direction_axis", 3, "direction_axis=3 is outside [1, 2]"},
      {"SelectiveScanConstantGap", "scale", NAN, "scale=nan is not finite"},
      {"SelectiveScan", "scale", INFINITY, "scale=inf is not finite"},
  };
  for (const auto& rule : rules) {
    const OperatorSpec& spec = spec_of(rule.op);
    for (const TensorRTPhase phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME}) {
      Case given = small_case(spec, spec.bindings[0]);
      for (int i = 0; i < spec.attribute_count; ++i) {  // an engine holds them all
        const AttributeSpec& attribute = spec.attributes[static_cast<size_t>(i)];
        given.attributes.emplace(attribute.name, attribute.default_value);
      }
      given.attributes[rule.name] = rule.value;
      refused(library, rule.op, given.fields(), rule.words, phase);
    }
  }
}

void refuse_types(const Library& library) {
  const int64_t wide = 3;
  const float real = 3;
  const auto with = [](PluginFieldType type, int32_t length, const void* data, size_t bytes) {
    Fields fields;
    fields.add("num_keep", type, length, data, bytes);
    return fields;
  };
  refused(library, "TokenGather", with(PluginFieldType::kINT64, 1, &wide, 8), "type(num_keep)=10");
  refused(library, "TokenGather", with(PluginFieldType::kFLOAT32, 1, &real, 4), "type(num_keep)=1");
  refused(library, "TokenGather", with(PluginFieldType::kCHAR, 1, "3", 1), "type(num_keep)=6");
  refused(library, "TokenGather", with(PluginFieldType::kUNKNOWN, 1, &wide, 4), "type(num_keep)=8");
  refused(library, "TokenGather", with(static_cast<PluginFieldType>(99), 1, &wide, 4), "=99");
  refused(library, "TokenGather", with(PluginFieldType::kINT32, 0, &wide, 4), "length(num_keep)=0");
  refused(library, "TokenGather", with(PluginFieldType::kINT32, 2, &wide, 8), "length(num_keep)=2");
  refused(library, "TokenGather", with(PluginFieldType::kINT32, -1, &wide, 4), "num_keep)=-1");
  refused(library, "TokenGather", with(PluginFieldType::kINT32, 1, nullptr, 0), "num_keep)=0");
  Fields scale;
  scale.add("scale", 1);
  refused(library, "SelectiveScan", std::move(scale), "type(scale)=5");
}

void refuse_collections(const Library& library) {
  refused(library, "TokenGather", {}, "attribute num_keep is missing and has no default");
  Fields unknown;
  unknown.add("num_keep", 3);
  unknown.add("keep_ratio", 0.8F);
  refused(library, "TokenGather", std::move(unknown), "attribute keep_ratio is unknown");
  Fields twice;
  twice.add("num_keep", 3);
  twice.add("num_keep", 3);
  refused(library, "TokenGather1", std::move(twice), "attribute num_keep is there twice");
  Fields partial;
  partial.add("num_keep", 3);
  refused(library, "TokenGather", std::move(partial), "protected_position is missing in the engine",
          TensorRTPhase::kRUNTIME);
  refused(library, "SelectiveScan", {}, "delta_softplus is missing in the engine",
          TensorRTPhase::kRUNTIME);
  for (const trt::PluginFieldCollection& bad :
       {trt::PluginFieldCollection{-1, nullptr}, {3, nullptr}, {1 << 30, nullptr}}) {
    const PluginPointer plugin(
        library.creator("TokenGather").createPlugin(nullptr, &bad, TensorRTPhase::kBUILD));
    expect(plugin == nullptr, "a collection that is none");
    expect(take_log().find("nbFields=") != std::string::npos, "and its count is named");
  }
  trt::PluginField nameless;
  const trt::PluginFieldCollection anonymous = {1, &nameless};
  Fields foreign;
  foreign.add("num_keep", 3);
  refused(library, "TokenScatter", std::move(foreign), "attribute num_keep is unknown");
  const PluginPointer plugin(
      library.creator("TokenGather").createPlugin("", &anonymous, TensorRTPhase::kBUILD));
  expect(plugin == nullptr && take_log().find("field 0 has no name") != std::string::npos,
         "a field without a name");
}

void logged(const std::string& words) {
  const std::string log = take_log();
  expect(log.find(words) != std::string::npos, words + " is not in: " + log);
}

Case too_many_kept() {
  Case given = small_case(spec_of("TokenGather"), spec_of("TokenGather").bindings[0]);
  given.attributes["num_keep"] = 6;  // of 5 tokens
  return given;
}

void refuse_shapes(const Library& library) {
  const Case given = too_many_kept();
  const PluginPointer gather = create(library, given, TensorRTPhase::kBUILD);
  trt::IPluginV3OneBuild& build = Faces(*gather).build;
  Builder builder;
  std::vector<trt::DimsExprs> inputs = expressions_of(given, false, &builder);
  std::vector<trt::DimsExprs> outputs(3);
  const auto shapes = [&](int32_t input_count, int32_t output_count) {
    return build.getOutputShapes(inputs.data(), input_count, nullptr, 0, outputs.data(),
                                 output_count, builder);
  };
  expect(shapes(4, 3) != 0, "num_keep above a known seqlen");
  logged("num_keep=6 is outside [1, 5]");
  expect(shapes(3, 3) != 0 && shapes(4, 2) != 0, "other numbers of inputs and outputs");
  logged("4 inputs and 2 outputs, but the operator has 4 and 3");
  // Of four inputs one as a shape input: the array of sizes is shorter then, and must not be read.
  const std::vector<trt::DimsExprs> three(inputs.begin(), inputs.begin() + 3);
  expect(
      build.getOutputShapes(three.data(), 3, &inputs[3], 1, outputs.data(), 3, builder) != 0 &&
          build.getOutputShapes(inputs.data(), 4, &inputs[3], 1, outputs.data(), 3, builder) != 0,
      "a shape input");
  logged("1 shape inputs, but the operator has none");
  inputs = expressions_of(given, true, &builder);
  expect(shapes(4, 3) == 0, "num_keep where seqlen is not known yet");
  builder.refuses = true;
  expect(shapes(4, 3) != 0, "TensorRT gives no expression");
  logged("made no expression");
  inputs[2].nbDims = 2;
  expect(shapes(4, 3) != 0, "a wrong rank");
  logged("rank(x0)=2, but it must be 3");
}

void refuse_profiles(const Library& library) {
  const Case given = too_many_kept();
  const PluginPointer gather = create(library, given, TensorRTPhase::kBUILD);
  trt::IPluginV3OneBuild& build = Faces(*gather).build;
  std::vector<trt::DynamicPluginTensorDesc> profile = profile_of(given);
  for (auto& one : profile) one.max = one.opt;
  expect(build.configurePlugin(profile.data(), 4, profile.data() + 4, 3) != 0,
         "num_keep above the profile's largest seqlen");
  logged("num_keep=6 is outside [1, 5]");
  expect(build.getWorkspaceSize(profile.data(), 4, profile.data() + 4, 3) == 0, "no workspace");
  logged("num_keep=6");
  int32_t tactics[2];
  expect(build.getValidTactics(tactics, 2) != 0, "tactics that were not announced");
  logged("nbTactics=2");
  expect(!build.supportsFormatCombination(-1, profile.data(), 4, 3), "a place below 0");
  expect(!build.supportsFormatCombination(7, profile.data(), 4, 3), "a place beyond the last");
  expect(gather->getCapabilityInterface(static_cast<trt::PluginCapabilityType>(9)) == nullptr,
         "a capability that is none");
}

void refuse_data_types(const Library& library) {
  const Case given = small_case(spec_of("TokenGather"), spec_of("TokenGather").bindings[0]);
  const PluginPointer gather = create(library, given, TensorRTPhase::kBUILD);
  trt::IPluginV3OneBuild& build = Faces(*gather).build;
  std::vector<trt::DataType> types = input_types_of(given);
  trt::DataType made[3];
  types[1] = trt::DataType::kINT64;
  expect(build.getOutputDataTypes(made, 3, types.data(), 4) != 0, "position as int64");
  logged("type(position)=8 (nvinfer1::DataType), but it must be int32");
  types[1] = trt::DataType::kINT32;
  types[3] = trt::DataType::kHALF;
  expect(build.getOutputDataTypes(made, 3, types.data(), 4) != 0, "float32 with float16");
  logged("x0 and x1 a pair that the table has");
}

/// What the runtime phase refuses.
void refuse_calls(const Library& library) {
  const OperatorSpec& spec = spec_of("SelectiveScan");
  const Case given = small_case(spec, spec.bindings[0]);
  const PluginPointer scan = create(library, given, TensorRTPhase::kBUILD);
  trt::IPluginV3OneRuntime& runtime = Faces(*scan).runtime;
  expect(runtime.setTactic(99) != 0 && runtime.setTactic(-1) != 0, "tactics that are none");
  expect(take_log().find("tactic=99 is outside [0, 2]") != std::string::npos, "and says so");

  std::vector<trt::PluginTensorDesc> all = descriptions_of(given);
  std::vector<const void*> inputs;
  for (const Tensor& input : given.inputs) inputs.push_back(input.bytes.data());
  std::vector<char> y(1024);
  void* outputs[] = {y.data()};
  const auto enqueue = [&](void* workspace) {
    return runtime.enqueue(all.data(), all.data() + 9, inputs.data(), outputs, workspace, nullptr);
  };
  inputs[3] = nullptr;
  expect(enqueue(nullptr) != 0, "an input that is not there");
  expect(take_log().find("there is no B; the operator has no optional inputs") != std::string::npos,
         "and says which");
  inputs[3] = given.inputs[3].bytes.data();
  all[3].dims.d[1] = 4;
  expect(runtime.onShapeChange(all.data(), 9, all.data() + 9, 1) != 0,
         "onShapeChange: a wrong size");
  expect(enqueue(nullptr) != 0, "enqueue: a wrong size");
  expect(take_log().find("seqlen(B)=4, but the other inputs have 5") != std::string::npos,
         "and says which");
  all = descriptions_of(given);
  all[0].dims.nbDims = 8;
  expect(enqueue(nullptr) != 0, "a rank that no operator has");
  all[0].dims.nbDims = -1;
  expect(enqueue(nullptr) != 0, "a rank that no tensor has");
  all = descriptions_of(given);
  all[0].type = trt::DataType::kINT8;
  expect(enqueue(nullptr) != 0, "a type that no operator has");
  take_log();
  all = descriptions_of(given);
  const std::vector<trt::DynamicPluginTensorDesc> profile = profile_of(given);
  if (Faces(*scan).build.getWorkspaceSize(profile.data(), 9, profile.data() + 9, 1) > 0) {
    expect(runtime.setTactic(2) == 0 && enqueue(nullptr) != 0, "no workspace where one is needed");
    expect(take_log().find("no workspace, but this shape needs") != std::string::npos,
           "and says so");
  }
}

}  // namespace

void refuse(const Library& library) {
  refuse_values(library);
  refuse_types(library);
  refuse_collections(library);
  refuse_shapes(library);
  refuse_profiles(library);
  refuse_data_types(library);
  refuse_calls(library);
}

}  // namespace vssm::harness
