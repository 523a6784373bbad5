#include "plugins/tensorrt/creator.h"

#include <new>

#include "plugins/tensorrt/host.h"
#include "plugins/tensorrt/plugin.h"

namespace vssm::trt {

Creator::Creator(const OperatorSpec& spec) : spec_(&spec) {
  collection_.nbFields = spec.attribute_count;
  collection_.fields = fields_.data();
  for (size_t i = 0; i < static_cast<size_t>(spec.attribute_count); ++i) {
    fields_[i].name = spec.attributes[i].name;
    fields_[i].type = field_type(spec.attributes[i]);
    fields_[i].length = 1;
  }
}

const AsciiChar* Creator::getPluginVersion() const noexcept { return kPluginVersion; }

IPluginV3* Creator::createPlugin(const AsciiChar* name, const PluginFieldCollection* fields,
                                 TensorRTPhase phase) noexcept {
  Node node;
  Status status = read_fields(*spec_, fields, phase, &node);
  if (status.ok()) status = kernel_of(*spec_).check_attributes(node, -1);
  if (!status.ok()) {
    log_error(name, status);
    return nullptr;
  }
  auto* const plugin = new (std::nothrow) Plugin(node, name);
  if (plugin == nullptr) log_error(name, Status::error(spec_->name, ": no memory for a plugin"));
  return plugin;
}

namespace {

/// Never destroyed: the registry holds pointers to them, and may use them while a process ends.
class Creators {
 public:
  Creators() {
    for (size_t i = 0; i < kOperators.size(); ++i) {
      list[i] = new (&made[i]) Creator(kOperators[i]);
    }
  }
  ~Creators() {}

  IPluginCreatorInterface* list[kOperators.size()];

 private:
  union {
    Creator made[kOperators.size()];
  };
};

}  // namespace

IPluginCreatorInterface* const* creators(int32_t* count) {
  static Creators all;
  *count = static_cast<int32_t>(kOperators.size());
  return all.list;
}

}  // namespace vssm::trt
