// Plays TensorRT: vssm_tensorrt_harness LIBRARY life|refuse|cost|run|fuzz [options], see `usage`.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>

#include "tests/tensorrt_harness/fuzz.h"
#include "tests/tensorrt_harness/life.h"
#include "tests/tensorrt_harness/refuse.h"

namespace vssm::harness {
namespace {

constexpr const char* kUsage =
    "LIBRARY life host|cuda|stub|none   every operator and type; none: enqueue must refuse to run\n"
    "LIBRARY refuse                every failure path\n"
    "LIBRARY cost ROUNDS           nanoseconds of an enqueue on the host, a line per operator\n"
    "LIBRARY run host|cuda stream|graph CASE...   cases from files; see case.h\n"
    "LIBRARY fuzz COUNT SEED       random fields and damaged serialisations\n"
    "LIBRARY break overrun|leak    what a sanitizer must stop\n"
    "--version 110100 before LIBRARY: which TensorRT to play (default 101600)\n";

void check_creators(const Library& library) {
  expect(library.creators().size() == kOperators.size(), "a creator for every operator");
  for (const OperatorSpec& spec : kOperators) {
    IPluginCreatorV3One& creator = library.creator(spec.name);
    expect(std::strcmp(creator.getPluginVersion(), "1") == 0, "the creator's version");
    expect(std::strcmp(creator.getPluginNamespace(), kDomain) == 0, "the creator's namespace");
    const trt::InterfaceInfo info = creator.getInterfaceInfo();
    expect(std::strcmp(info.kind, "PLUGIN CREATOR_V3ONE") == 0 && info.major == 1, "its interface");
    expect(creator.getAPILanguage() == trt::APILanguage::kCPP, "its language");
    const trt::PluginFieldCollection& names = *creator.getFieldNames();
    expect(names.nbFields == spec.attribute_count, "a field for every attribute");
    for (int32_t i = 0; i < names.nbFields; ++i) {
      const AttributeSpec& attribute = spec.attributes[static_cast<size_t>(i)];
      const bool is_int = attribute.kind == AttributeKind::kInt;
      expect(std::strcmp(names.fields[i].name, attribute.name) == 0, "a field's name");
      expect(names.fields[i].type ==
                 (is_int ? trt::PluginFieldType::kINT32 : trt::PluginFieldType::kFLOAT32),
             "a field's type");
    }
  }
}

/// Nodes that differ in an attribute must not share timings.
void check_timings(const Library& library) {
  for (const OperatorSpec& spec : kOperators) {
    if (spec.attribute_count == 0) continue;
    Case given = small_case(spec, spec.bindings[0]);
    // Those that must be given, of whatever operator.
    given.attributes = {{"num_keep", 1}, {"grid_height", 1}, {"grid_width", 1}, {"group", 1}};
    const PluginPointer one = create(library, given, trt::TensorRTPhase::kBUILD);
    const size_t first = is_on_grid(spec) ? 3 : 0;
    given.attributes[spec.attributes[first + 1].name] = 0;
    given.attributes[spec.attributes[first].name] = 1;
    const PluginPointer same = create(library, given, trt::TensorRTPhase::kBUILD);
    given.attributes[spec.attributes[first + 1].name] = 1;
    const PluginPointer other = create(library, given, trt::TensorRTPhase::kBUILD);
    const std::string id = Faces(*same).build.getTimingCacheID();
    expect(id != Faces(*other).build.getTimingCacheID(), "another attribute, other timings");
    const bool is_default = spec.family == Family::kSelectiveScan;  // 1 and 0 are its defaults
    expect((id == Faces(*one).build.getTimingCacheID()) == is_default, "a default, the same ones");
  }
}

void run_life(const Library& library, const std::string& device_kind) {
  const std::unique_ptr<Device> device = open_device(device_kind == "cuda" ? "cuda" : "host");
  check_creators(library);
  check_timings(library);
  for (const OperatorSpec& spec : kOperators) {
    for (size_t b = 0; b < static_cast<size_t>(spec.binding_count); ++b) {
      Case given = small_case(spec, spec.bindings[b]);
      live(library, {device.get(), false, device_kind != "none", device_kind == "stub", {}},
           &given);
    }
  }
}

void run_cases(const Library& library, int count, char** arguments) {
  const std::unique_ptr<Device> device = open_device(arguments[0]);
  const bool graph = std::strcmp(arguments[1], "graph") == 0;
  for (int i = 2; i < count; ++i) {
    Case given = read_case(arguments[i]);
    live(library, {device.get(), graph, true, false, write_outputs}, &given);
  }
}

double cost_of(const Library& library, const OperatorSpec& spec, int64_t rounds) {
  const Case given = small_case(spec, spec.bindings[0]);
  const PluginPointer plugin = create(library, given, trt::TensorRTPhase::kBUILD);
  trt::IPluginV3OneRuntime& runtime = Faces(*plugin).runtime;
  const std::vector<trt::PluginTensorDesc> all = descriptions_of(given);
  std::vector<const void*> inputs;
  for (const Tensor& input : given.inputs) inputs.push_back(input.bytes.data());
  std::vector<char> memory(4096);
  void* outputs[] = {memory.data(), memory.data(), memory.data()};
  double best = 1e9;
  for (int sample = 0; sample < 20; ++sample) {
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < rounds; ++i) {
      const int32_t code = runtime.enqueue(all.data(), all.data() + inputs.size(), inputs.data(),
                                           outputs, memory.data(), nullptr);
      if (code != 0) throw std::runtime_error("enqueue failed: " + take_log());
    }
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count() / static_cast<double>(rounds));
  }
  return best;
}

/// Hands a plugin a field that is shorter than it says, or forgets one: shows that a build with
/// sanitizers would see the plugin do it.
void break_rule(const Library& library, const std::string& damage) {
  Fields fields;
  fields.add("num_keep", trt::PluginFieldType::kINT32, 1, "123", damage == "overrun" ? 3 : 4);
  trt::IPluginV3* volatile plugin =
      library.creator("TokenGather").createPlugin("", fields.collection(), trt::TensorRTPhase());
  if (damage != "leak") delete plugin;
  plugin = nullptr;
}

int play(int count, char** arguments) {
  if (count > 2 && std::strcmp(arguments[0], "--version") == 0) {
    set_version(std::atoi(arguments[1]));
    arguments += 2;
    count -= 2;
  }
  if (count < 2) throw std::runtime_error(kUsage);
  const Library library(arguments[0]);
  const std::string mode = arguments[1];
  if (mode == "life" && count == 3) {
    run_life(library, arguments[2]);
  } else if (mode == "refuse" && count == 2) {
    refuse(library);
  } else if (mode == "run" && count > 4) {
    run_cases(library, count - 2, arguments + 2);
  } else if (mode == "cost" && count == 3) {
    for (const OperatorSpec& spec : kOperators) {
      std::printf("%s %.1f\n", spec.name, cost_of(library, spec, std::atoll(arguments[2])));
    }
  } else if (mode == "fuzz" && count == 4) {
    const FuzzCount counted =
        fuzz(library, std::atoll(arguments[2]), std::strtoull(arguments[3], nullptr, 10));
    std::printf("tried %lld accepted %lld refused %lld\n", static_cast<long long>(counted.tried),
                static_cast<long long>(counted.accepted), static_cast<long long>(counted.refused));
  } else if (mode == "break" && count == 3) {
    break_rule(library, arguments[2]);
  } else {
    throw std::runtime_error(kUsage);
  }
  return failures() == 0 ? 0 : 1;
}

}  // namespace
}  // namespace vssm::harness

int main(int count, char** arguments) {
  try {
    return vssm::harness::play(count - 1, arguments + 1);
  } catch (const std::exception& error) {
    std::printf("ERROR: %s\n", error.what());
    return 2;
  }
}
