// The creators of all operators.
#ifndef VSSM_PLUGINS_TENSORRT_CREATOR_H_
#define VSSM_PLUGINS_TENSORRT_CREATOR_H_

#include <array>

#include "plugins/tensorrt/node.h"
#include "plugins/tensorrt/trt_abi.h"

namespace vssm::trt {

class Creator final : public IPluginCreatorV3One {
 public:
  explicit Creator(const OperatorSpec& spec);
  Creator(const Creator&) = delete;
  Creator& operator=(const Creator&) = delete;

  /// Null, after logging what is wrong, when the fields break a rule.
  IPluginV3* createPlugin(const AsciiChar* name, const PluginFieldCollection* fields,
                          TensorRTPhase phase) noexcept override;
  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const AsciiChar* getPluginName() const noexcept override { return spec_->name; }
  const AsciiChar* getPluginVersion() const noexcept override;
  const AsciiChar* getPluginNamespace() const noexcept override { return kDomain; }

 private:
  const OperatorSpec* spec_;
  std::array<PluginField, kMaxAttributes> fields_;
  PluginFieldCollection collection_;
};

/// One for each row of the table; they live as long as the library.
IPluginCreatorInterface* const* creators(int32_t* count);

}  // namespace vssm::trt

#endif  // VSSM_PLUGINS_TENSORRT_CREATOR_H_
