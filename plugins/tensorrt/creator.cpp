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
union Creators {
  Creators()
      : made{Creator(kOperators[0]), Creator(kOperators[1]), Creator(kOperators[2]),
             Creator(kOperators[3]), Creator(kOperators[4])} {}
  ~Creators() {}

  Creator made[5];
};

}  // namespace

IPluginCreatorInterface* const* creators(int32_t* count) {
  static Creators all;
  static IPluginCreatorInterface* const list[] = {&all.made[0], &all.made[1], &all.made[2],
                                                  &all.made[3], &all.made[4]};
  static_assert(sizeof(list) / sizeof(list[0]) == kOperators.size());
  *count = static_cast<int32_t>(kOperators.size());
  return list;
}

}  // namespace vssm::trt
