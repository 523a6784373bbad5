// ONNX Runtime's C API: the official header where the compiler finds it, else the part that the
// example uses, declared from its documentation under the same names. The API is an append-only
// table of function pointers, so these slots are the same in every release.
#ifndef VSSM_EXAMPLES_CPP_ORT_API_H_
#define VSSM_EXAMPLES_CPP_ORT_API_H_

#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#else

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtEnv;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtMemoryInfo;
struct OrtValue;
struct OrtTypeInfo;
struct OrtTensorTypeAndShapeInfo;

enum OrtLoggingLevel : int32_t { ORT_LOGGING_LEVEL_WARNING = 2 };
enum OrtAllocatorType : int32_t { OrtDeviceAllocator = 0 };
enum OrtMemType : int32_t { OrtMemTypeDefault = 0 };
enum ONNXTensorElementDataType : int32_t { ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1 };

struct OrtApi {
  using Unused = void (*)();
  Unused unused_0[2];
  const char* (*GetErrorMessage)(const OrtStatus*) noexcept;  // 2
  OrtStatus* (*CreateEnv)(OrtLoggingLevel, const char* name, OrtEnv**) noexcept;
  Unused unused_4[3];
  OrtStatus* (*CreateSession)(const OrtEnv*, const char* path, const OrtSessionOptions*,
                              OrtSession**) noexcept;  // 7
  Unused unused_8[1];
  OrtStatus* (*Run)(OrtSession*, const OrtRunOptions*, const char* const* input_names,
                    const OrtValue* const* inputs, size_t num_inputs,
                    const char* const* output_names, size_t num_outputs,
                    OrtValue** outputs) noexcept;  // 9
  OrtStatus* (*CreateSessionOptions)(OrtSessionOptions**) noexcept;
  Unused unused_11[18];
  OrtStatus* (*RegisterCustomOpsLibrary)(OrtSessionOptions*, const char* path,
                                         void** handle) noexcept;  // 29
  Unused unused_30[3];
  OrtStatus* (*SessionGetInputTypeInfo)(const OrtSession*, size_t, OrtTypeInfo**) noexcept;  // 33
  Unused unused_34[15];
  OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void* data, size_t bytes,
                                               const int64_t* shape, size_t rank,
                                               ONNXTensorElementDataType,
                                               OrtValue**) noexcept;  // 49
  Unused unused_50[1];
  OrtStatus* (*GetTensorMutableData)(OrtValue*, void**) noexcept;  // 51
  Unused unused_52[3];
  OrtStatus* (*CastTypeInfoToTensorInfo)(const OrtTypeInfo*,
                                         const OrtTensorTypeAndShapeInfo**) noexcept;  // 55
  Unused unused_56[6];
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t) noexcept;  // 62
  Unused unused_63[1];
  OrtStatus* (*GetTensorShapeElementCount)(const OrtTensorTypeAndShapeInfo*, size_t*) noexcept;
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**) noexcept;  // 65
  Unused unused_66[3];
  OrtStatus* (*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo**) noexcept;  // 69
  Unused unused_70[22];
  void (*ReleaseEnv)(OrtEnv*) noexcept;  // 92
  void (*ReleaseStatus)(OrtStatus*) noexcept;
  void (*ReleaseMemoryInfo)(OrtMemoryInfo*) noexcept;
  void (*ReleaseSession)(OrtSession*) noexcept;
  void (*ReleaseValue)(OrtValue*) noexcept;
  Unused unused_97[1];
  void (*ReleaseTypeInfo)(OrtTypeInfo*) noexcept;  // 98
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*) noexcept;
  void (*ReleaseSessionOptions)(OrtSessionOptions*) noexcept;  // 100
};

static_assert(offsetof(OrtApi, Run) == 9 * sizeof(void*));
static_assert(offsetof(OrtApi, CreateTensorWithDataAsOrtValue) == 49 * sizeof(void*));
static_assert(offsetof(OrtApi, GetTensorTypeAndShape) == 65 * sizeof(void*));
static_assert(offsetof(OrtApi, ReleaseSessionOptions) == 100 * sizeof(void*));

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version) noexcept;
  const char* (*GetVersionString)() noexcept;
};

extern "C" const OrtApiBase* OrtGetApiBase() noexcept;

constexpr uint32_t ORT_API_VERSION = 17;

#endif  // __has_include
#endif  // VSSM_EXAMPLES_CPP_ORT_API_H_
