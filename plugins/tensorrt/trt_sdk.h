// The names of trt_abi.h as TensorRT's own headers declare them (TENSORRT_ROOT).
#ifndef VSSM_PLUGINS_TENSORRT_TRT_SDK_H_
#define VSSM_PLUGINS_TENSORRT_TRT_SDK_H_

// House rule: every header compiles alone, also where there is no SDK.
#ifdef VSSM_TENSORRT_SDK
#include <NvInferRuntime.h>

namespace vssm::trt {

using ::cudaStream_t;
using nvinfer1::APILanguage;
using nvinfer1::AsciiChar;
using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IDimensionExpr;
using nvinfer1::IExprBuilder;
using nvinfer1::InterfaceInfo;
using nvinfer1::IPluginCapability;
using nvinfer1::IPluginCreatorInterface;
using nvinfer1::IPluginCreatorV3One;
using nvinfer1::IPluginResourceContext;
using nvinfer1::IPluginV3;
using nvinfer1::IPluginV3OneBuild;
using nvinfer1::IPluginV3OneCore;
using nvinfer1::IPluginV3OneRuntime;
using nvinfer1::IVersionedInterface;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;
using nvinfer1::apiv::VDimensionExpr;
using nvinfer1::apiv::VExprBuilder;

}  // namespace vssm::trt
#endif  // VSSM_TENSORRT_SDK

#endif  // VSSM_PLUGINS_TENSORRT_TRT_SDK_H_
