// The part of ONNX Runtime's C ABI that these adapters use, declared from its documentation. The
// ABI is an append-only table of function pointers, so a library built against version 17 runs on
// every later ONNX Runtime. ort_abi_check.cpp compares it with the official header when the build
// is given one (ORT_INCLUDE_DIR).
#ifndef VSSM_PLUGINS_ONNXRUNTIME_ORT_ABI_H_
#define VSSM_PLUGINS_ONNXRUNTIME_ORT_ABI_H_

#include <cstddef>
#include <cstdint>

namespace vssm::ort {

constexpr uint32_t kApiVersion = 17;  // ONNX Runtime 1.17: the first with all that CPU needs
// 1.18: the first that lends a kernel device memory, or an output the memory of an input.
constexpr uint32_t kLendingApiVersion = 18;

// Opaque to us.
struct Status;
struct Value;
struct TensorInfo;
struct TypeInfo;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct SessionOptions;
struct OpDomain;
struct Attribute;
struct Allocator;
struct MemoryInfo;

enum ErrorCode : int32_t { kOk = 0, kFail = 1, kInvalidArgument = 2 };
enum ElementType : int32_t { kAny = 0, kFloat = 1, kInt32 = 6, kFloat16 = 10, kBFloat16 = 16 };
enum Characteristic : int32_t { kRequired = 0 };
enum MemoryType : int32_t { kDefaultMemory = 0 };
enum AttributeType : int32_t { kIntAttribute = 1 };

struct CustomOp;
using Unused = void (*)();

/// OrtApi, by slot. Every function returns null or a Status to release.
struct Api {
  Status* (*CreateStatus)(ErrorCode, const char*) noexcept;  // 0
  ErrorCode (*GetErrorCode)(const Status*) noexcept;
  const char* (*GetErrorMessage)(const Status*) noexcept;
  Unused unused_3[23];
  Status* (*CreateCustomOpDomain)(const char*, OpDomain**) noexcept;  // 26
  Status* (*CustomOpDomain_Add)(OpDomain*, const CustomOp*) noexcept;
  Status* (*AddCustomOpDomain)(SessionOptions*, OpDomain*) noexcept;
  Unused unused_29[22];
  Status* (*GetTensorMutableData)(Value*, void**) noexcept;  // 51
  Unused unused_52[3];
  Status* (*CastTypeInfoToTensorInfo)(const TypeInfo*, const TensorInfo**) noexcept;  // 55
  Unused unused_56[1];
  Status* (*CreateTensorTypeAndShapeInfo)(TensorInfo**) noexcept;  // 57
  Status* (*SetTensorElementType)(TensorInfo*, ElementType) noexcept;
  Status* (*SetDimensions)(TensorInfo*, const int64_t*, size_t) noexcept;
  Status* (*GetTensorElementType)(const TensorInfo*, ElementType*) noexcept;
  Status* (*GetDimensionsCount)(const TensorInfo*, size_t*) noexcept;
  Status* (*GetDimensions)(const TensorInfo*, int64_t*, size_t) noexcept;
  Status* (*GetSymbolicDimensions)(const TensorInfo*, const char**, size_t) noexcept;  // 63
  Unused unused_64[1];
  Status* (*GetTensorTypeAndShape)(const Value*, TensorInfo**) noexcept;  // 65
  Unused unused_66[10];
  Status* (*AllocatorFree)(Allocator*, void*) noexcept;  // 76
  Status* (*AllocatorGetInfo)(const Allocator*, const MemoryInfo**) noexcept;
  Unused unused_78[7];
  Status* (*KernelInfoGetAttribute_float)(const KernelInfo*, const char*, float*) noexcept;  // 85
  Status* (*KernelInfoGetAttribute_int64)(const KernelInfo*, const char*, int64_t*) noexcept;
  Status* (*KernelInfoGetAttribute_string)(const KernelInfo*, const char*, char*, size_t*) noexcept;
  Status* (*KernelContext_GetInputCount)(const KernelContext*, size_t*) noexcept;  // 88
  Status* (*KernelContext_GetOutputCount)(const KernelContext*, size_t*) noexcept;
  Status* (*KernelContext_GetInput)(const KernelContext*, size_t, const Value**) noexcept;
  Status* (*KernelContext_GetOutput)(KernelContext*, size_t, const int64_t*, size_t,
                                     Value**) noexcept;
  Unused unused_92[1];
  void (*ReleaseStatus)(Status*) noexcept;  // 93
  Unused unused_94[4];
  void (*ReleaseTypeInfo)(TypeInfo*) noexcept;                  // 98
  void (*ReleaseTensorTypeAndShapeInfo)(TensorInfo*) noexcept;  // 99
  Unused unused_100[1];
  void (*ReleaseCustomOpDomain)(OpDomain*) noexcept;  // 101
  Unused unused_102[30];
  void (*ReleaseAllocator)(Allocator*) noexcept;  // 132
  Unused unused_133[60];
  Status* (*KernelContext_GetGPUComputeStream)(const KernelContext*, void**) noexcept;  // 193
  Unused unused_194[40];
  Status* (*KernelInfo_GetInputTypeInfo)(const KernelInfo*, size_t, TypeInfo**) noexcept;  // 234
  Unused unused_235[32];
  Status* (*ShapeInferContext_GetInputCount)(const ShapeContext*, size_t*) noexcept;  // 267
  Status* (*ShapeInferContext_GetInputTypeShape)(const ShapeContext*, size_t,
                                                 TensorInfo**) noexcept;
  Status* (*ShapeInferContext_GetAttribute)(const ShapeContext*, const char*,
                                            const Attribute**) noexcept;
  Status* (*ShapeInferContext_SetOutputTypeShape)(const ShapeContext*, size_t,
                                                  const TensorInfo*) noexcept;
  Status* (*SetSymbolicDimensions)(TensorInfo*, const char**, size_t) noexcept;  // 271
  Status* (*ReadOpAttr)(const Attribute*, AttributeType, void*, size_t, size_t*) noexcept;
  Unused unused_273[1];
  Status* (*KernelContext_ParallelFor)(const KernelContext*, void (*)(void*, size_t), size_t,
                                       size_t, void*) noexcept;  // 274
  Unused unused_275[2];
  // From here on: not before kLendingApiVersion.
  Status* (*KernelContext_GetScratchBuffer)(const KernelContext*, const MemoryInfo*, size_t,
                                            void**) noexcept;  // 277
  Status* (*KernelInfoGetAllocator)(const KernelInfo*, MemoryType, Allocator**) noexcept;
};

constexpr size_t slot(size_t offset) { return offset / sizeof(Unused); }
static_assert(slot(offsetof(Api, CreateCustomOpDomain)) == 26);
static_assert(slot(offsetof(Api, GetTensorMutableData)) == 51);
static_assert(slot(offsetof(Api, CastTypeInfoToTensorInfo)) == 55);
static_assert(slot(offsetof(Api, CreateTensorTypeAndShapeInfo)) == 57);
static_assert(slot(offsetof(Api, GetTensorTypeAndShape)) == 65);
static_assert(slot(offsetof(Api, AllocatorFree)) == 76);
static_assert(slot(offsetof(Api, KernelInfoGetAttribute_float)) == 85);
static_assert(slot(offsetof(Api, KernelContext_GetOutput)) == 91);
static_assert(slot(offsetof(Api, ReleaseStatus)) == 93);
static_assert(slot(offsetof(Api, ReleaseTensorTypeAndShapeInfo)) == 99);
static_assert(slot(offsetof(Api, ReleaseCustomOpDomain)) == 101);
static_assert(slot(offsetof(Api, ReleaseAllocator)) == 132);
static_assert(slot(offsetof(Api, KernelContext_GetGPUComputeStream)) == 193);
static_assert(slot(offsetof(Api, KernelInfo_GetInputTypeInfo)) == 234);
static_assert(slot(offsetof(Api, ShapeInferContext_GetInputCount)) == 267);
static_assert(slot(offsetof(Api, KernelContext_ParallelFor)) == 274);
static_assert(slot(offsetof(Api, KernelContext_GetScratchBuffer)) == 277);
static_assert(slot(offsetof(Api, KernelInfoGetAllocator)) == 278);

/// OrtApiBase.
struct ApiBase {
  const Api* (*GetApi)(uint32_t version) noexcept;
  const char* (*GetVersionString)() noexcept;
};

/// OrtCustomOp up to `version`; ONNX Runtime reads no member that is younger.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);  // before 16
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);  // before 16
  void (*KernelDestroy)(void*);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t);
  MemoryType (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  // From here on: not before kLendingApiVersion.
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};

}  // namespace vssm::ort

#endif  // VSSM_PLUGINS_ONNXRUNTIME_ORT_ABI_H_
