// What the ONNX Runtime examples share: a model with the vssm operators on the CPU, and main().
#ifndef VSSM_EXAMPLES_CPP_ORT_MODEL_H_
#define VSSM_EXAMPLES_CPP_ORT_MODEL_H_

#include <cstdio>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_api.h"

namespace ort {

inline const OrtApi* api() {
  static const OrtApi* const found = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (found == nullptr) {
    throw std::runtime_error("this ONNX Runtime is older than API " +
                             std::to_string(ORT_API_VERSION));
  }
  return found;
}

/// An error of ONNX Runtime, as an exception.
inline void check(OrtStatus* status) {
  if (status != nullptr) {
    const std::string message = api()->GetErrorMessage(status);
    api()->ReleaseStatus(status);
    throw std::runtime_error(message);
  }
}

/// Owns what ONNX Runtime made.
template <typename T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

/// What `create(&object)` made, to be freed by `release`.
template <typename T, typename Create>
Owned<T> make(Create create, void (*release)(T*)) {
  T* object = nullptr;
  check(create(&object));
  return {object, release};
}

/// One model.onnx of `vssm export`.
class Model {
 public:
  /// With "-" in place of the library the file's own fallback bodies run.
  Model(const std::string& path, const std::string& library)
      : env_(make<OrtEnv>(
            [](OrtEnv** out) { return api()->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "vssm", out); },
            [](OrtEnv* p) { api()->ReleaseEnv(p); })),
        session_(open(env_.get(), path, library)) {}

  /// (batch, 3, height, width) of the first input, the batch -1.
  std::vector<int64_t> input_shape() const {
    const auto type = make<OrtTypeInfo>(
        [&](OrtTypeInfo** out) { return api()->SessionGetInputTypeInfo(session_.get(), 0, out); },
        [](OrtTypeInfo* p) { api()->ReleaseTypeInfo(p); });
    const OrtTensorTypeAndShapeInfo* tensor = nullptr;  // owned by `type`
    check(api()->CastTypeInfoToTensorInfo(type.get(), &tensor));
    std::vector<int64_t> shape(4);
    check(api()->GetDimensions(tensor, shape.data(), shape.size()));
    return shape;
  }

  /// The numbers of one output for one image (3, height, width); T is the output's type.
  template <typename T>
  std::vector<T> run(std::vector<float> pixels, const char* output_name) const {
    std::vector<int64_t> shape = input_shape();
    shape[0] = 1;
    const auto memory = make<OrtMemoryInfo>(
        [](OrtMemoryInfo** out) {
          return api()->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, out);
        },
        [](OrtMemoryInfo* p) { api()->ReleaseMemoryInfo(p); });
    const auto input = make<OrtValue>(
        [&](OrtValue** out) {
          return api()->CreateTensorWithDataAsOrtValue(
              memory.get(), pixels.data(), pixels.size() * sizeof(float), shape.data(),
              shape.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, out);
        },
        release_value);
    const char* const input_name = "images";
    const OrtValue* const inputs[] = {input.get()};
    const auto output = make<OrtValue>(
        [&](OrtValue** out) {
          return api()->Run(session_.get(), nullptr, &input_name, inputs, 1, &output_name, 1, out);
        },
        release_value);
    void* data = nullptr;
    check(api()->GetTensorMutableData(output.get(), &data));
    const auto* const first = static_cast<const T*>(data);
    return {first, first + element_count(output.get())};
  }

 private:
  static Owned<OrtSession> open(const OrtEnv* env, const std::string& path,
                                const std::string& library) {
    const auto options = make<OrtSessionOptions>(
        [](OrtSessionOptions** out) { return api()->CreateSessionOptions(out); },
        [](OrtSessionOptions* p) { api()->ReleaseSessionOptions(p); });
    if (library != "-") {
      void* handle = nullptr;  // stays open until the program ends: sessions call into it
      check(api()->RegisterCustomOpsLibrary(options.get(), library.c_str(), &handle));
    }
    return make<OrtSession>(
        [&](OrtSession** out) {
          return api()->CreateSession(env, path.c_str(), options.get(), out);
        },
        [](OrtSession* p) { api()->ReleaseSession(p); });
  }

  static void release_value(OrtValue* value) { api()->ReleaseValue(value); }

  static size_t element_count(const OrtValue* value) {
    const auto info = make<OrtTensorTypeAndShapeInfo>(
        [&](OrtTensorTypeAndShapeInfo** out) { return api()->GetTensorTypeAndShape(value, out); },
        [](OrtTensorTypeAndShapeInfo* p) { api()->ReleaseTensorTypeAndShapeInfo(p); });
    size_t count = 0;
    check(api()->GetTensorShapeElementCount(info.get(), &count));
    return count;
  }

  Owned<OrtEnv> env_;
  Owned<OrtSession> session_;
};

/// Runs an example: exit code 2 for a wrong call and for an error, which is printed.
template <typename Example>
int run_example(bool called_right, const char* program, const char* usage, Example example) {
  if (!called_right) {
    std::fprintf(stderr, "usage: %s %s\n", program, usage);
    return 2;
  }
  try {
    example();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
  return 0;
}

}  // namespace ort

#endif  // VSSM_EXAMPLES_CPP_ORT_MODEL_H_
