#include "tests/tensorrt_harness/life.h"

#include <cstring>
#include <stdexcept>

#include "plugins/tensorrt/node.h"

namespace vssm::harness {
namespace {

constexpr size_t kGuard = 256;
constexpr char kPoison = '\xFF';  // NaN in every float type, -1 as an int

/// The build phase: what is asked before an engine exists.
class Build {
 public:
  Build(const Case& given, trt::IPluginV3& plugin)
      : given_(given), spec_(*given.spec), build_(Faces(plugin).build) {}

  void run() {
    types();
    shapes(true);
    shapes(false);
    formats();
    configure();
    tactics();
    expect(build_.getTimingCacheID() != nullptr && build_.getTimingCacheID()[0] != '\0',
           "there is a timing cache id");
    expect(build_.getFormatCombinationLimit() >= spec_.binding_count, "all formats are tried");
    expect(take_log().empty(), "building logs nothing");
  }

 private:
  void types() {
    std::vector<trt::DataType> outputs(given_.outputs.size(), trt::DataType::kBOOL);
    const std::vector<trt::DataType> inputs = input_types_of(given_);
    expect(build_.getNbOutputs() == spec_.output_count, "getNbOutputs");
    expect(build_.getOutputDataTypes(outputs.data(), spec_.output_count, inputs.data(),
                                     spec_.input_count) == 0,
           "getOutputDataTypes");
    for (size_t i = 0; i < outputs.size(); ++i) {
      expect(outputs[i] == trt::data_type(given_.outputs[i].dtype), "the type of an output");
    }
  }

  void shapes(bool dynamic) {
    Builder builder;
    std::vector<trt::DimsExprs> outputs(given_.outputs.size());
    const std::vector<trt::DimsExprs> inputs = expressions_of(given_, dynamic, &builder);
    expect(build_.getOutputShapes(inputs.data(), spec_.input_count, nullptr, 0, outputs.data(),
                                  spec_.output_count, builder) == 0,
           "getOutputShapes");
    for (size_t i = 0; i < outputs.size(); ++i) {
      const Tensor& output = given_.outputs[i];
      expect(outputs[i].nbDims == static_cast<int32_t>(output.dims.size()), "rank of an output");
      for (int axis = 0; axis < outputs[i].nbDims; ++axis) {
        const std::string_view name = trt::axis_of(spec_.outputs[i], axis);
        const int64_t unknown = id_of(name);
        const bool is_known = !dynamic || unknown == 0;
        const auto& found = *static_cast<const Expression*>(outputs[i].d[axis]);
        expect(found.isConstant() == is_known, "an output's size is known when its inputs' are");
        expect(found.value() == (is_known ? output.dims[static_cast<size_t>(axis)] : unknown),
               "an output's size");
      }
    }
  }

  void formats() {
    const std::vector<std::vector<trt::DataType>> accepted = accepted_types(build_, given_);
    expect(accepted.size() == static_cast<size_t>(spec_.binding_count),
           "as many types are taken as the table has");
    for (int b = 0; b < spec_.binding_count; ++b) {
      std::vector<trt::DataType> expected;
      const TypeBinding& binding = spec_.bindings[static_cast<size_t>(b)];
      const auto add = [&](const OperandSpec& operand) {
        expected.push_back(trt::data_type(resolve(operand.type, binding)));
      };
      for (size_t i = 0; i < given_.inputs.size(); ++i) add(spec_.inputs[i]);
      for (size_t i = 0; i < given_.outputs.size(); ++i) add(spec_.outputs[i]);
      bool is_there = false;
      for (const auto& types : accepted) is_there |= types == expected;
      expect(is_there, "every binding of the table is taken");
    }
  }

  void configure() {
    const std::vector<trt::DynamicPluginTensorDesc> profile = profile_of(given_);
    expect(build_.configurePlugin(profile.data(), spec_.input_count,
                                  profile.data() + spec_.input_count, spec_.output_count) == 0,
           "configurePlugin");
  }

  void tactics() {
    std::vector<int32_t> tactics(static_cast<size_t>(build_.getNbTactics()), -1);
    expect(build_.getValidTactics(tactics.data(), static_cast<int32_t>(tactics.size())) == 0,
           "getValidTactics");
    for (size_t i = 0; i < tactics.size(); ++i) {
      expect(tactics[i] > 0, "tactics are positive: 0 is TensorRT's");
      for (size_t j = 0; j < i; ++j) expect(tactics[i] != tactics[j], "tactics are distinct");
    }
  }

  const Case& given_;
  const OperatorSpec& spec_;
  trt::IPluginV3OneBuild& build_;
};

struct Buffers {
  std::vector<const void*> inputs;
  std::vector<void*> outputs;  // behind a guard, before another
  void* workspace = nullptr;
};

void poison_outputs(const Case& given, const Buffers& buffers, Device* device) {
  for (size_t i = 0; i < given.outputs.size(); ++i) {
    const auto size = static_cast<size_t>(given.outputs[i].size());
    const std::vector<char> poison(size + 2 * kGuard, kPoison);
    device->write(static_cast<char*>(buffers.outputs[i]) - kGuard, poison.data(), poison.size());
  }
}

Buffers place(const Case& given, size_t workspace, Device* device) {
  Buffers buffers;
  for (const Tensor& input : given.inputs) {
    void* const at = device->allocate(input.bytes.size());
    device->write(at, input.bytes.data(), input.bytes.size());
    buffers.inputs.push_back(at);
  }
  for (const Tensor& output : given.outputs) {
    auto* const at =
        static_cast<char*>(device->allocate(static_cast<size_t>(output.size()) + 2 * kGuard));
    buffers.outputs.push_back(at + kGuard);
  }
  poison_outputs(given, buffers, device);
  // TensorRT gives none where none is asked for; its end is guarded too.
  if (workspace == 0) return buffers;
  const std::vector<char> poison(workspace + kGuard, kPoison);
  buffers.workspace = device->allocate(poison.size());
  device->write(buffers.workspace, poison.data(), poison.size());
  return buffers;
}

void take_outputs(const Buffers& buffers, Device* device, Case* given) {
  for (size_t i = 0; i < given->outputs.size(); ++i) {
    Tensor& output = given->outputs[i];
    const auto size = static_cast<size_t>(output.size());
    std::vector<char> all(size + 2 * kGuard);
    device->read(all.data(), static_cast<char*>(buffers.outputs[i]) - kGuard, all.size());
    for (size_t j = 0; j < kGuard; ++j) {
      if (all[j] == kPoison && all[size + kGuard + j] == kPoison) continue;
      expect(false, output.name + " is written outside its memory");
      break;
    }
    output.bytes.assign(all.begin() + kGuard, all.begin() + static_cast<int64_t>(kGuard + size));
  }
}

void check_workspace_guard(const Buffers& buffers, size_t workspace, Device* device) {
  if (workspace == 0) return;
  std::vector<char> guard(kGuard);
  device->read(guard.data(), static_cast<char*>(buffers.workspace) + workspace, kGuard);
  for (const char byte : guard) {
    if (byte == kPoison) continue;
    expect(false, "more workspace is used than was asked for");
    return;
  }
}

/// What launch_stub.cpp writes.
void check_marks(const Case& given, int32_t tactic) {
  const bool is_scan = given.spec->family == Family::kSelectiveScan;
  for (size_t i = 0; i < given.outputs.size(); ++i) {
    const int mark = is_scan ? 64 + tactic : 80 + static_cast<int>(i);
    for (const char byte : given.outputs[i].bytes) {
      if (byte == mark) continue;
      expect(false, given.outputs[i].name + " was not written by its launcher and tactic");
      break;
    }
  }
}

/// The runtime phase with one tactic, on a copy that is attached to a context.
void execute(trt::IPluginV3& engine_plugin, int32_t tactic, size_t workspace, const Life& life,
             Case* given) {
  Faces engine_faces(engine_plugin);
  expect(engine_faces.runtime.setTactic(tactic) == 0, "setTactic");
  const PluginPointer attached(engine_faces.runtime.attachToContext(nullptr));
  if (attached == nullptr) throw std::runtime_error("attachToContext gave no plugin");
  trt::IPluginV3OneRuntime& runtime = Faces(*attached).runtime;
  const std::vector<trt::PluginTensorDesc> all = descriptions_of(*given);
  const trt::PluginTensorDesc* const outputs = all.data() + given->inputs.size();
  expect(runtime.onShapeChange(all.data(), given->spec->input_count, outputs,
                               given->spec->output_count) == 0,
         "onShapeChange");
  const Buffers buffers = place(*given, workspace, life.device);
  int32_t code = 0;
  const auto work = [&] {
    code = runtime.enqueue(all.data(), outputs, buffers.inputs.data(), buffers.outputs.data(),
                           buffers.workspace, life.device->stream());
  };
  if (life.graph) {  // TensorRT runs once before a capture
    life.device->run(work, false);
    poison_outputs(*given, buffers, life.device);
  }
  life.device->run(work, life.graph);
  const std::string log = take_log();
  if (life.can_run) {
    expect(code == 0, "enqueue: " + log);
    take_outputs(buffers, life.device, given);
    check_workspace_guard(buffers, workspace, life.device);
    if (life.marks) check_marks(*given, tactic);
    if (life.done) life.done(*given, tactic);
  } else {
    expect(code != 0, "enqueue says that it cannot run");
    expect(log.find(given->spec->name) != std::string::npos, "and logs why: " + log);
  }
}

}  // namespace

PluginPointer create(const Library& library, const Case& given, trt::TensorRTPhase phase) {
  Fields fields = given.fields();
  return PluginPointer(
      library.creator(given.spec->name).createPlugin("a_node", fields.collection(), phase));
}

void live(const Library& library, const Life& life, Case* given) {
  PluginPointer built = create(library, *given, trt::TensorRTPhase::kBUILD);
  if (built == nullptr) throw std::runtime_error("createPlugin: " + take_log());
  PluginPointer copy(built->clone());
  Build(*given, *built).run();
  Build(*given, *copy).run();

  Faces faces(*copy);
  expect(std::strcmp(faces.core.getPluginName(), given->spec->name) == 0, "the plugin's name");
  expect(std::strcmp(faces.core.getPluginNamespace(), kDomain) == 0, "the plugin's namespace");
  expect(std::strcmp(faces.core.getPluginVersion(), "1") == 0, "the plugin's version");
  expect(std::strcmp(faces.build.getTimingCacheID(), Faces(*built).build.getTimingCacheID()) == 0,
         "a copy has the same timings");
  const std::vector<trt::DynamicPluginTensorDesc> profile = profile_of(*given);
  const size_t workspace = faces.build.getWorkspaceSize(profile.data(), given->spec->input_count,
                                                        profile.data() + given->spec->input_count,
                                                        given->spec->output_count);
  std::vector<int32_t> tactics(static_cast<size_t>(faces.build.getNbTactics()) + 1, 0);
  expect(faces.build.getValidTactics(tactics.data() + 1,
                                     static_cast<int32_t>(tactics.size()) - 1) == 0,
         "getValidTactics");
  Case neighbour = *given;  // alive beside it: what is serialised is each plugin's own
  neighbour.attributes["scale"] = 1234;
  neighbour.attributes["protected_position"] = 1234;
  neighbour.attributes["activation"] = 1;
  const PluginPointer other = create(library, neighbour, trt::TensorRTPhase::kBUILD);
  const std::string timings = faces.build.getTimingCacheID();
  if (other == nullptr) throw std::runtime_error("createPlugin of a neighbour: " + take_log());
  const bool differs = timings != Faces(*other).build.getTimingCacheID();
  expect(differs == (given->spec->attribute_count > 0), "another node, other attributes");
  const trt::PluginFieldCollection* const kept = faces.runtime.getFieldsToSerialize();
  expect(kept->nbFields == given->spec->attribute_count, "every attribute is serialised");
  Fields serialised = Fields::copy(*kept);
  built.reset();
  copy.reset();

  PluginPointer engine(
      library.creator(given->spec->name)
          .createPlugin("a_node", serialised.collection(), trt::TensorRTPhase::kRUNTIME));
  if (engine == nullptr) throw std::runtime_error("createPlugin of an engine: " + take_log());
  expect(timings == Faces(*engine).build.getTimingCacheID(), "an engine keeps every attribute");
  for (const int32_t tactic : tactics) execute(*engine, tactic, workspace, life, given);
}

}  // namespace vssm::harness
