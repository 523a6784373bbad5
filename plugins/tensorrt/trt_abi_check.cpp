// Built only with TENSORRT_ROOT: a program that compares our declarations with the SDK's. Layouts
// and values are compared while it compiles, the order of virtual functions when it runs.
#include <NvInferRuntime.h>

#include <cstdio>
#include <cstring>

#include "plugins/tensorrt/host_abi.h"
#include "plugins/tensorrt/trt_abi.h"

namespace {

namespace ours = vssm::trt;
namespace theirs = nvinfer1;

#define VSSM_SAME_SIZE(type) static_assert(sizeof(ours::type) == sizeof(theirs::type), #type)
#define VSSM_SAME_MEMBER(type, member) \
  static_assert(offsetof(ours::type, member) == offsetof(theirs::type, member), #member)
#define VSSM_SAME_VALUE(value) \
  static_assert(static_cast<int>(ours::value) == static_cast<int>(theirs::value), #value)

VSSM_SAME_SIZE(Dims);
VSSM_SAME_SIZE(PluginTensorDesc);
VSSM_SAME_SIZE(DynamicPluginTensorDesc);
VSSM_SAME_SIZE(PluginField);
VSSM_SAME_SIZE(PluginFieldCollection);
VSSM_SAME_SIZE(InterfaceInfo);
VSSM_SAME_SIZE(DimsExprs);
VSSM_SAME_SIZE(IDimensionExpr);
VSSM_SAME_SIZE(IExprBuilder);
VSSM_SAME_SIZE(IPluginV3);
VSSM_SAME_SIZE(IPluginCreatorV3One);
VSSM_SAME_MEMBER(Dims, d);
VSSM_SAME_MEMBER(DimsExprs, d);
VSSM_SAME_MEMBER(PluginTensorDesc, type);
VSSM_SAME_MEMBER(PluginTensorDesc, format);
VSSM_SAME_MEMBER(DynamicPluginTensorDesc, min);
VSSM_SAME_MEMBER(DynamicPluginTensorDesc, max);
VSSM_SAME_MEMBER(DynamicPluginTensorDesc, opt);
VSSM_SAME_MEMBER(PluginField, name);
VSSM_SAME_MEMBER(PluginField, data);
VSSM_SAME_MEMBER(PluginField, type);
VSSM_SAME_MEMBER(PluginField, length);
VSSM_SAME_MEMBER(PluginFieldCollection, fields);
VSSM_SAME_VALUE(DataType::kFLOAT);
VSSM_SAME_VALUE(DataType::kHALF);
VSSM_SAME_VALUE(DataType::kINT8);
VSSM_SAME_VALUE(DataType::kINT32);
VSSM_SAME_VALUE(DataType::kBOOL);
VSSM_SAME_VALUE(DataType::kUINT8);
VSSM_SAME_VALUE(DataType::kFP8);
VSSM_SAME_VALUE(DataType::kBF16);
VSSM_SAME_VALUE(DataType::kINT64);
VSSM_SAME_VALUE(TensorFormat::kLINEAR);
VSSM_SAME_VALUE(TensorFormat::kCHW2);
VSSM_SAME_VALUE(TensorFormat::kHWC8);
VSSM_SAME_VALUE(TensorFormat::kCHW32);
VSSM_SAME_VALUE(PluginFieldType::kFLOAT16);
VSSM_SAME_VALUE(PluginFieldType::kFLOAT32);
VSSM_SAME_VALUE(PluginFieldType::kFLOAT64);
VSSM_SAME_VALUE(PluginFieldType::kINT8);
VSSM_SAME_VALUE(PluginFieldType::kINT16);
VSSM_SAME_VALUE(PluginFieldType::kINT32);
VSSM_SAME_VALUE(PluginFieldType::kCHAR);
VSSM_SAME_VALUE(PluginFieldType::kDIMS);
VSSM_SAME_VALUE(PluginFieldType::kUNKNOWN);
VSSM_SAME_VALUE(TensorRTPhase::kBUILD);
VSSM_SAME_VALUE(TensorRTPhase::kRUNTIME);
VSSM_SAME_VALUE(PluginCapabilityType::kCORE);
VSSM_SAME_VALUE(PluginCapabilityType::kBUILD);
VSSM_SAME_VALUE(PluginCapabilityType::kRUNTIME);
VSSM_SAME_VALUE(DimensionOperation::kSUM);
VSSM_SAME_VALUE(DimensionOperation::kSUB);
static_assert(static_cast<int>(ours::Severity::kERROR) ==
              static_cast<int>(theirs::ILogger::Severity::kERROR));

/// Where a virtual function stands: GCC and Clang keep it in the member pointer, plus one.
template <typename Function>
size_t slot(Function function) {
  size_t words[2];
  static_assert(sizeof(function) == sizeof(words));
  std::memcpy(words, &function, sizeof(words));
  return words[0] / sizeof(void*);
}

int g_wrong = 0;
int g_compared = 0;

void same(size_t our_slot, size_t their_slot, const char* name) {
  ++g_compared;
  if (our_slot == their_slot) return;
  ++g_wrong;
  std::printf("%s: slot %zu, but the SDK has %zu\n", name, our_slot, their_slot);
}

#define VSSM_SAME_SLOT(type, function) \
  same(slot(&ours::type::function), slot(&theirs::type::function), #type "::" #function)
#define VSSM_SAME_SLOT_V(type, function) \
  same(slot(&ours::type::function), slot(&theirs::apiv::type::function), #type "::" #function)

void compare_plugin() {
  VSSM_SAME_SLOT(IVersionedInterface, getAPILanguage);
  VSSM_SAME_SLOT(IVersionedInterface, getInterfaceInfo);
  VSSM_SAME_SLOT(IPluginV3, getCapabilityInterface);
  VSSM_SAME_SLOT(IPluginV3, clone);
  VSSM_SAME_SLOT(IPluginV3OneCore, getPluginName);
  VSSM_SAME_SLOT(IPluginV3OneCore, getPluginVersion);
  VSSM_SAME_SLOT(IPluginV3OneCore, getPluginNamespace);
  VSSM_SAME_SLOT(IPluginV3OneBuild, configurePlugin);
  VSSM_SAME_SLOT(IPluginV3OneBuild, getOutputDataTypes);
  VSSM_SAME_SLOT(IPluginV3OneBuild, getOutputShapes);
  VSSM_SAME_SLOT(IPluginV3OneBuild, supportsFormatCombination);
  VSSM_SAME_SLOT(IPluginV3OneBuild, getNbOutputs);
  VSSM_SAME_SLOT(IPluginV3OneBuild, getWorkspaceSize);
  VSSM_SAME_SLOT(IPluginV3OneBuild, getValidTactics);
  VSSM_SAME_SLOT(IPluginV3OneBuild, getNbTactics);
  VSSM_SAME_SLOT(IPluginV3OneBuild, getTimingCacheID);
  VSSM_SAME_SLOT(IPluginV3OneBuild, getFormatCombinationLimit);
  VSSM_SAME_SLOT(IPluginV3OneBuild, getMetadataString);
  VSSM_SAME_SLOT(IPluginV3OneRuntime, setTactic);
  VSSM_SAME_SLOT(IPluginV3OneRuntime, onShapeChange);
  VSSM_SAME_SLOT(IPluginV3OneRuntime, enqueue);
  VSSM_SAME_SLOT(IPluginV3OneRuntime, attachToContext);
  VSSM_SAME_SLOT(IPluginV3OneRuntime, getFieldsToSerialize);
}

void compare_host() {
  VSSM_SAME_SLOT(IPluginCreatorV3One, createPlugin);
  VSSM_SAME_SLOT(IPluginCreatorV3One, getFieldNames);
  VSSM_SAME_SLOT(IPluginCreatorV3One, getPluginName);
  VSSM_SAME_SLOT(IPluginCreatorV3One, getPluginVersion);
  VSSM_SAME_SLOT(IPluginCreatorV3One, getPluginNamespace);
  VSSM_SAME_SLOT_V(VDimensionExpr, isConstant);
  VSSM_SAME_SLOT_V(VDimensionExpr, getConstantValue);
  VSSM_SAME_SLOT_V(VDimensionExpr, isSizeTensor);
  VSSM_SAME_SLOT_V(VExprBuilder, constant);
  VSSM_SAME_SLOT_V(VExprBuilder, operation);
  VSSM_SAME_SLOT_V(VExprBuilder, declareSizeTensor);
  using Register =
      bool (theirs::IPluginRegistry::*)(theirs::IPluginCreatorInterface&, const char*) noexcept;
#if NV_TENSORRT_MAJOR == 10
  using Registry = ours::Registry10;
  using Logger = ours::Logger10;
  using LoggerFinder = ours::LoggerFinder10;
#else
  using Registry = ours::Registry11;
  using Logger = ours::Logger11;
  using LoggerFinder = ours::LoggerFinder11;
#endif
  same(slot(&Registry::registerCreator), slot<Register>(&theirs::IPluginRegistry::registerCreator),
       "registerCreator");
  same(slot(&Logger::log), slot(&theirs::ILogger::log), "log");
  same(slot(&LoggerFinder::findLogger), slot(&theirs::ILoggerFinder::findLogger), "findLogger");
}

}  // namespace

int main() {
  compare_plugin();
  compare_host();
  std::printf("TensorRT %d.%d.%d headers: %d of %d slots differ\n", NV_TENSORRT_MAJOR,
              NV_TENSORRT_MINOR, NV_TENSORRT_PATCH, g_wrong, g_compared);
  return g_wrong == 0 ? 0 : 1;
}
