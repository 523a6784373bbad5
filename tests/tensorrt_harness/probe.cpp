// A plugin library with our names and fields whose creators write down what they are given, in the
// file that VSSM_PROBE_FILE names, and make no plugin: shows what NVIDIA's parser passes for a
// node.
#include <cstdio>
#include <cstdlib>

#include "plugins/tensorrt/creator.h"
#include "plugins/tensorrt/plugin.h"

#define VSSM_EXPORT extern "C" __attribute__((visibility("default")))

namespace vssm::trt {
namespace {

void write_field(std::FILE* file, const PluginField& field) {
  std::fprintf(file, "\t%s=", field.name);
  if (field.type == PluginFieldType::kINT32 && field.length == 1) {
    std::fprintf(file, "int32:%d", *static_cast<const int32_t*>(field.data));
  } else if (field.type == PluginFieldType::kFLOAT32 && field.length == 1) {
    std::fprintf(file, "float32:%.9g", *static_cast<const float*>(field.data));
  } else {
    std::fprintf(file, "type %d, length %d", static_cast<int>(field.type), field.length);
  }
}

class Probe final : public IPluginCreatorV3One {
 public:
  explicit Probe(const OperatorSpec& spec) : real_(spec) {}
  IPluginV3* createPlugin(const AsciiChar* name, const PluginFieldCollection* fields,
                          TensorRTPhase) noexcept override {
    const char* const path = std::getenv("VSSM_PROBE_FILE");
    std::FILE* const file = path == nullptr ? nullptr : std::fopen(path, "a");
    if (file == nullptr) return nullptr;
    std::fprintf(file, "%s\t%s", getPluginName(), name);
    for (int32_t i = 0; i < fields->nbFields; ++i) write_field(file, fields->fields[i]);
    std::fprintf(file, "\n");
    std::fclose(file);
    return nullptr;
  }
  const PluginFieldCollection* getFieldNames() noexcept override { return real_.getFieldNames(); }
  const AsciiChar* getPluginName() const noexcept override { return real_.getPluginName(); }
  const AsciiChar* getPluginVersion() const noexcept override { return real_.getPluginVersion(); }
  const AsciiChar* getPluginNamespace() const noexcept override { return kDomain; }

 private:
  Creator real_;
};

}  // namespace
}  // namespace vssm::trt

VSSM_EXPORT void setLoggerFinder(void*) {}

VSSM_EXPORT vssm::trt::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  using vssm::trt::Probe;
  // Never deleted: the registry holds pointers to them, and may use them while a process ends.
  static vssm::trt::IPluginCreatorInterface* list[vssm::kOperators.size()] = {};
  for (size_t i = 0; i < vssm::kOperators.size(); ++i) {
    if (list[i] == nullptr) list[i] = new Probe(vssm::kOperators[i]);
  }
  count = static_cast<int32_t>(vssm::kOperators.size());
  return list;
}
