// One IPluginV3 for every operator of the table: shapes, types and names come from its row.
#ifndef VSSM_PLUGINS_TENSORRT_PLUGIN_H_
#define VSSM_PLUGINS_TENSORRT_PLUGIN_H_

#include <array>

#include "plugins/tensorrt/kernel.h"
#include "plugins/tensorrt/node.h"
#include "plugins/tensorrt/trt_abi.h"

namespace vssm::trt {

constexpr const char* kPluginVersion = "1";

/// Holds nothing but the node: every call checks what it is given and keeps nothing of it.
class Plugin final : public IPluginV3,
                     public IPluginV3OneCore,
                     public IPluginV3OneBuild,
                     public IPluginV3OneRuntime {
 public:
  /// `node` has passed its checks. `name`: the layer's, for messages; it is copied.
  Plugin(const Node& node, const char* name);
  Plugin(const Plugin& other) : Plugin(other.node_, other.name_) { tactic_ = other.tactic_; }
  Plugin& operator=(const Plugin&) = delete;

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override;
  IPluginV3* clone() noexcept override;

  const AsciiChar* getPluginName() const noexcept override { return node_.spec->name; }
  const AsciiChar* getPluginVersion() const noexcept override { return kPluginVersion; }
  const AsciiChar* getPluginNamespace() const noexcept override { return kDomain; }

  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t nbInputs,
                          const DynamicPluginTensorDesc* out, int32_t nbOutputs) noexcept override;
  int32_t getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, const DataType* inputTypes,
                             int32_t nbInputs) const noexcept override;
  int32_t getOutputShapes(const DimsExprs* inputs, int32_t nbInputs, const DimsExprs* shapeInputs,
                          int32_t nbShapeInputs, DimsExprs* outputs, int32_t nbOutputs,
                          IExprBuilder& exprBuilder) noexcept override;
  bool supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* inOut,
                                 int32_t nbInputs, int32_t nbOutputs) noexcept override;
  int32_t getNbOutputs() const noexcept override { return node_.spec->output_count; }
  size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t nbInputs,
                          const DynamicPluginTensorDesc* outputs,
                          int32_t nbOutputs) const noexcept override;
  int32_t getValidTactics(int32_t* tactics, int32_t nbTactics) noexcept override;
  int32_t getNbTactics() noexcept override { return kernel_of(*node_.spec).tactic_count; }
  const char* getTimingCacheID() noexcept override { return timing_id_; }
  const char* getMetadataString() noexcept override { return timing_id_; }

  int32_t setTactic(int32_t tactic) noexcept override;
  int32_t onShapeChange(const PluginTensorDesc* in, int32_t nbInputs, const PluginTensorDesc* out,
                        int32_t nbOutputs) noexcept override;
  int32_t enqueue(const PluginTensorDesc* inputDesc, const PluginTensorDesc* outputDesc,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  IPluginV3* attachToContext(IPluginResourceContext* context) noexcept override;
  const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

 private:
  Status check_counts(int32_t inputs, int32_t outputs) const;
  Status check_static(const DimsExprs* inputs) const;
  const IDimensionExpr* output_axis(std::string_view axis, const DimsExprs* inputs,
                                    IExprBuilder& builder) const;
  Status largest_workspace(const DynamicPluginTensorDesc* inputs, int64_t* bytes) const;
  Status run(const PluginTensorDesc* descriptions, const void* const* inputs, void* const* outputs,
             CudaLaunch launch) const;

  Node node_;
  int32_t tactic_ = 0;
  std::array<PluginField, kMaxAttributes> fields_;
  PluginFieldCollection collection_;
  char timing_id_[160];
  char name_[128];
};

}  // namespace vssm::trt

#endif  // VSSM_PLUGINS_TENSORRT_PLUGIN_H_
