#include "tests/tensorrt_harness/fuzz.h"

#include <cmath>
#include <cstring>
#include <random>

#include "plugins/tensorrt/node.h"
#include "tests/tensorrt_harness/life.h"

namespace vssm::harness {
namespace {

using trt::PluginFieldType;
using trt::TensorRTPhase;

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t end) {
    return static_cast<int64_t>(engine_() % static_cast<uint64_t>(end));
  }
  bool one_in(int64_t count) { return below(count) == 0; }
  uint32_t bits() { return static_cast<uint32_t>(engine_()); }

 private:
  std::mt19937_64 engine_;
};

constexpr int32_t kInterestingInts[] = {0, 1, -1, 2, 157, INT32_MAX, INT32_MIN};

size_t bytes_of(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kFLOAT64:
    case PluginFieldType::kINT64:
      return 8;
    case PluginFieldType::kFLOAT32:
    case PluginFieldType::kINT32:
      return 4;
    case PluginFieldType::kDIMS:
      return sizeof(trt::Dims);
    default:
      return 1;
  }
}

/// A name of the table, one of another operator, or noise.
std::string some_name(const OperatorSpec& spec, Random* random) {
  if (spec.attribute_count > 0 && !random->one_in(4)) {
    return spec.attributes[static_cast<size_t>(random->below(spec.attribute_count))].name;
  }
  if (random->one_in(2)) return random->one_in(2) ? "plugin_version" : "num_keep";
  std::string name(static_cast<size_t>(random->below(2000)), 'x');
  for (char& letter : name) letter = static_cast<char>(1 + random->below(255));
  return name;
}

/// A field whose data has the size that its type and length say, as every caller's has.
void add_field(const std::string& name, PluginFieldType right, Random* random, Fields* fields) {
  const PluginFieldType type =
      random->one_in(8) ? static_cast<PluginFieldType>(random->below(16) - 1) : right;
  const auto length = static_cast<int32_t>(random->one_in(8) ? random->below(6) - 1 : 1);
  std::vector<char> data(bytes_of(type) * static_cast<size_t>(length < 0 ? 0 : length));
  for (char& byte : data) byte = static_cast<char>(random->bits());
  if (type == PluginFieldType::kINT32 && length == 1 && !random->one_in(4)) {
    std::memcpy(data.data(), &kInterestingInts[random->below(7)], 4);
  }
  const bool is_null = random->one_in(16);
  fields->add(name, type, length, is_null ? nullptr : data.data(), data.size());
}

Fields random_fields(const OperatorSpec& spec, Random* random) {
  Fields fields;
  for (int i = 0; i < spec.attribute_count; ++i) {
    if (random->one_in(8)) continue;
    const AttributeSpec& attribute = spec.attributes[static_cast<size_t>(i)];
    add_field(attribute.name, trt::field_type(attribute), random, &fields);
  }
  while (random->one_in(6))
    add_field(some_name(spec, random), PluginFieldType::kINT32, random, &fields);
  return fields;
}

/// An engine's bytes, in a form of our own: TensorRT's is its own business.
std::string serialise(const trt::PluginFieldCollection& collection) {
  std::string bytes;
  for (int32_t i = 0; i < collection.nbFields; ++i) {
    const trt::PluginField& field = collection.fields[i];
    const auto type = static_cast<char>(field.type);
    bytes += std::string(field.name) + '\0' + type + static_cast<char>(field.length);
    bytes.append(static_cast<const char*>(field.data), 4);
  }
  return bytes;
}

void damage(std::string* bytes, Random* random) {
  if (random->one_in(3)) bytes->resize(static_cast<size_t>(random->below(bytes->size() + 1)));
  for (int64_t flips = random->below(4); flips > 0 && !bytes->empty(); --flips) {
    (*bytes)[static_cast<size_t>(random->below(bytes->size()))] ^=
        static_cast<char>(1 << random->below(8));
  }
}

Fields deserialise(const std::string& bytes) {
  Fields fields;
  size_t at = 0;
  while (at < bytes.size()) {
    const size_t end = bytes.find('\0', at);
    if (end == std::string::npos || end + 3 > bytes.size()) break;
    const auto type = static_cast<PluginFieldType>(bytes[end + 1]);
    const auto length = static_cast<int32_t>(bytes[end + 2]);
    const size_t want = bytes_of(type) * static_cast<size_t>(length < 0 ? 0 : length);
    const size_t have = bytes.size() - end - 3;
    if (want > have) break;
    fields.add(bytes.substr(at, end - at), type, length, bytes.data() + end + 3, want);
    at = end + 3 + want;
  }
  return fields;
}

/// The rules, written once more: what a plugin was made from.
bool obeys(const trt::PluginFieldCollection& collection) {
  for (int32_t i = 0; i < collection.nbFields; ++i) {
    const trt::PluginField& field = collection.fields[i];
    int32_t integer = 0;
    float real = 0;
    std::memcpy(&integer, field.data, 4);
    std::memcpy(&real, field.data, 4);
    const std::string name = field.name;
    if (name == "num_keep" && integer < 1) return false;
    if (name == "protected_position" && integer < -1) return false;
    if ((name == "grid_height" || name == "grid_width") && integer < 1) return false;
    if (name == "scale" && !std::isfinite(real)) return false;
    if ((name == "delta_softplus" || name == "params_by_step") && (integer < 0 || integer > 1)) {
      return false;
    }
  }
  return true;
}

/// Random sizes and types: whatever the answer, nothing may break.
void live_a_little(trt::IPluginV3& plugin, const OperatorSpec& spec, Random* random) {
  Faces faces(plugin);
  const PluginPointer copy(random->one_in(2) ? plugin.clone()
                                             : faces.runtime.attachToContext(nullptr));
  Case given =
      small_case(spec, spec.bindings[static_cast<size_t>(random->below(spec.binding_count))]);
  for (Tensor& input : given.inputs) {
    if (random->one_in(3)) input.dims[0] = random->below(4) - 1;
    if (random->one_in(6)) input.dims.push_back(static_cast<int64_t>(random->bits()) << 29);
  }
  std::vector<trt::DynamicPluginTensorDesc> profile = profile_of(given);
  for (auto& one : profile) {
    if (random->one_in(8)) one.desc.type = static_cast<trt::DataType>(random->below(14) - 1);
    if (random->one_in(16)) one.max.nbDims = static_cast<int32_t>(random->below(12) - 2);
  }
  trt::IPluginV3OneBuild& build = Faces(*copy).build;
  const int32_t inputs = spec.input_count;
  const int32_t outputs = spec.output_count;
  build.configurePlugin(profile.data(), inputs, profile.data() + inputs, outputs);
  build.getWorkspaceSize(profile.data(), inputs, profile.data() + inputs, outputs);
  build.supportsFormatCombination(static_cast<int32_t>(random->below(inputs + outputs)),
                                  profile.data(), inputs, outputs);
  std::vector<trt::PluginTensorDesc> now = descriptions_of(given);
  Faces(*copy).runtime.onShapeChange(now.data(), inputs, now.data() + inputs, outputs);
  Faces(*copy).runtime.setTactic(static_cast<int32_t>(random->below(6) - 2));
}

}  // namespace

FuzzCount fuzz(const Library& library, int64_t count, uint64_t seed) {
  Random random(seed);
  FuzzCount counted;
  while (counted.tried < count) {
    const OperatorSpec& spec = kOperators[static_cast<size_t>(random.below(kOperators.size()))];
    const bool is_engine = random.one_in(2);
    Fields fields = random_fields(spec, &random);
    if (is_engine) {
      const PluginPointer good = create(library, small_case(spec, spec.bindings[0]), {});
      std::string bytes = serialise(*Faces(*good).runtime.getFieldsToSerialize());
      damage(&bytes, &random);
      fields = deserialise(bytes);
    }
    const TensorRTPhase phase = is_engine ? TensorRTPhase::kRUNTIME : TensorRTPhase::kBUILD;
    const PluginPointer plugin(
        library.creator(spec.name).createPlugin("fuzz", fields.collection(), phase));
    ++counted.tried;
    if (plugin == nullptr) {
      ++counted.refused;
      expect(!take_log().empty(), "what is refused is explained");
      continue;
    }
    ++counted.accepted;
    expect(obeys(*Faces(*plugin).runtime.getFieldsToSerialize()),
           "what is accepted obeys the rules");
    live_a_little(*plugin, spec, &random);
    take_log();
  }
  return counted;
}

}  // namespace vssm::harness
