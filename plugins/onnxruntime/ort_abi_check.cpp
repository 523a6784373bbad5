// Compiled only with ORT_INCLUDE_DIR: our ABI against the official header's, offset by offset.
#include <onnxruntime_c_api.h>

#include "plugins/onnxruntime/ort_abi.h"

#define VSSM_SAME_API(member) \
  static_assert(offsetof(vssm::ort::Api, member) == offsetof(OrtApi, member), #member)
#define VSSM_SAME_OP(member) \
  static_assert(offsetof(vssm::ort::CustomOp, member) == offsetof(OrtCustomOp, member), #member)

#define VSSM_SAME_VALUE(ours, theirs) \
  static_assert(static_cast<int>(ours) == static_cast<int>(theirs), #theirs)

static_assert(ORT_API_VERSION >= vssm::ort::kLendingApiVersion, "this header is older than API 18");
VSSM_SAME_API(CreateStatus);
VSSM_SAME_API(GetErrorCode);
VSSM_SAME_API(GetErrorMessage);
VSSM_SAME_API(CreateCustomOpDomain);
VSSM_SAME_API(CustomOpDomain_Add);
VSSM_SAME_API(AddCustomOpDomain);
VSSM_SAME_API(GetTensorMutableData);
VSSM_SAME_API(CastTypeInfoToTensorInfo);
VSSM_SAME_API(CreateTensorTypeAndShapeInfo);
VSSM_SAME_API(SetTensorElementType);
VSSM_SAME_API(SetDimensions);
VSSM_SAME_API(GetTensorElementType);
VSSM_SAME_API(GetDimensionsCount);
VSSM_SAME_API(GetDimensions);
VSSM_SAME_API(GetSymbolicDimensions);
VSSM_SAME_API(GetTensorTypeAndShape);
VSSM_SAME_API(AllocatorFree);
VSSM_SAME_API(AllocatorGetInfo);
VSSM_SAME_API(KernelInfoGetAttribute_float);
VSSM_SAME_API(KernelInfoGetAttribute_int64);
VSSM_SAME_API(KernelInfoGetAttribute_string);
VSSM_SAME_API(KernelContext_GetInputCount);
VSSM_SAME_API(KernelContext_GetOutputCount);
VSSM_SAME_API(KernelContext_GetInput);
VSSM_SAME_API(KernelContext_GetOutput);
VSSM_SAME_API(ReleaseStatus);
VSSM_SAME_API(ReleaseTypeInfo);
VSSM_SAME_API(ReleaseTensorTypeAndShapeInfo);
VSSM_SAME_API(ReleaseCustomOpDomain);
VSSM_SAME_API(ReleaseAllocator);
VSSM_SAME_API(KernelContext_GetGPUComputeStream);
VSSM_SAME_API(KernelInfo_GetInputTypeInfo);
VSSM_SAME_API(ShapeInferContext_GetInputCount);
VSSM_SAME_API(ShapeInferContext_GetInputTypeShape);
VSSM_SAME_API(ShapeInferContext_GetAttribute);
VSSM_SAME_API(ShapeInferContext_SetOutputTypeShape);
VSSM_SAME_API(SetSymbolicDimensions);
VSSM_SAME_API(ReadOpAttr);
VSSM_SAME_API(KernelContext_ParallelFor);
VSSM_SAME_API(KernelContext_GetScratchBuffer);
VSSM_SAME_API(KernelInfoGetAllocator);
VSSM_SAME_OP(version);
VSSM_SAME_OP(CreateKernel);
VSSM_SAME_OP(GetName);
VSSM_SAME_OP(GetExecutionProviderType);
VSSM_SAME_OP(GetInputType);
VSSM_SAME_OP(GetInputTypeCount);
VSSM_SAME_OP(GetOutputType);
VSSM_SAME_OP(GetOutputTypeCount);
VSSM_SAME_OP(KernelCompute);
VSSM_SAME_OP(KernelDestroy);
VSSM_SAME_OP(GetInputCharacteristic);
VSSM_SAME_OP(GetOutputCharacteristic);
VSSM_SAME_OP(GetInputMemoryType);
VSSM_SAME_OP(GetVariadicInputMinArity);
VSSM_SAME_OP(GetVariadicInputHomogeneity);
VSSM_SAME_OP(GetVariadicOutputMinArity);
VSSM_SAME_OP(GetVariadicOutputHomogeneity);
VSSM_SAME_OP(CreateKernelV2);
VSSM_SAME_OP(KernelComputeV2);
VSSM_SAME_OP(InferOutputShapeFn);
VSSM_SAME_OP(GetStartVersion);
VSSM_SAME_OP(GetEndVersion);
VSSM_SAME_OP(GetMayInplace);
VSSM_SAME_OP(ReleaseMayInplace);
VSSM_SAME_OP(GetAliasMap);
VSSM_SAME_OP(ReleaseAliasMap);
VSSM_SAME_VALUE(vssm::ort::kFloat, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
VSSM_SAME_VALUE(vssm::ort::kInt32, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
VSSM_SAME_VALUE(vssm::ort::kFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
VSSM_SAME_VALUE(vssm::ort::kBFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
VSSM_SAME_VALUE(vssm::ort::kIntAttribute, ORT_OP_ATTR_INT);
VSSM_SAME_VALUE(vssm::ort::kRequired, INPUT_OUTPUT_REQUIRED);
VSSM_SAME_VALUE(vssm::ort::kInvalidArgument, ORT_INVALID_ARGUMENT);
VSSM_SAME_VALUE(vssm::ort::kDefaultMemory, OrtMemTypeDefault);
