// Classifies an image with ONNX Runtime and the vssm operators, on the CPU:
//   ort_classify model.onnx libvssm_onnxruntime.so photo.ppm
// With "-" in place of the library the file's own fallback bodies run.
#include <cstdio>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "image.h"
#include "ort_api.h"

namespace {

const OrtApi* ort = nullptr;

/// An error of ONNX Runtime, as an exception.
void check(OrtStatus* status) {
  if (status != nullptr) {
    const std::string message = ort->GetErrorMessage(status);
    ort->ReleaseStatus(status);
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

/// Sizes of the first input: (batch, 3, height, width), the batch -1.
std::vector<int64_t> input_shape(const OrtSession* session) {
  const auto type = make<OrtTypeInfo>(
      [&](OrtTypeInfo** out) { return ort->SessionGetInputTypeInfo(session, 0, out); },
      [](OrtTypeInfo* p) { ort->ReleaseTypeInfo(p); });
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;  // owned by `type`
  check(ort->CastTypeInfoToTensorInfo(type.get(), &tensor));
  std::vector<int64_t> shape(4);
  check(ort->GetDimensions(tensor, shape.data(), shape.size()));
  return shape;
}

size_t element_count(const OrtValue* value) {
  const auto info = make<OrtTensorTypeAndShapeInfo>(
      [&](OrtTensorTypeAndShapeInfo** out) { return ort->GetTensorTypeAndShape(value, out); },
      [](OrtTensorTypeAndShapeInfo* p) { ort->ReleaseTensorTypeAndShapeInfo(p); });
  size_t count = 0;
  check(ort->GetTensorShapeElementCount(info.get(), &count));
  return count;
}

void classify(const std::string& model, const std::string& library, const std::string& photo) {
  const auto env = make<OrtEnv>(
      [](OrtEnv** out) { return ort->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "vssm", out); },
      [](OrtEnv* p) { ort->ReleaseEnv(p); });
  const auto options = make<OrtSessionOptions>(
      [](OrtSessionOptions** out) { return ort->CreateSessionOptions(out); },
      [](OrtSessionOptions* p) { ort->ReleaseSessionOptions(p); });
  if (library != "-") {
    void* handle = nullptr;  // stays open until the program ends: sessions call into it
    check(ort->RegisterCustomOpsLibrary(options.get(), library.c_str(), &handle));
  }
  const auto session = make<OrtSession>(
      [&](OrtSession** out) {
        return ort->CreateSession(env.get(), model.c_str(), options.get(), out);
      },
      [](OrtSession* p) { ort->ReleaseSession(p); });

  std::vector<int64_t> shape = input_shape(session.get());
  std::vector<float> pixels = image::read_ppm(photo, shape[2], shape[3]);
  shape[0] = 1;
  const auto memory = make<OrtMemoryInfo>(
      [](OrtMemoryInfo** out) {
        return ort->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, out);
      },
      [](OrtMemoryInfo* p) { ort->ReleaseMemoryInfo(p); });
  const auto input = make<OrtValue>(
      [&](OrtValue** out) {
        return ort->CreateTensorWithDataAsOrtValue(
            memory.get(), pixels.data(), pixels.size() * sizeof(float), shape.data(), shape.size(),
            ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, out);
      },
      [](OrtValue* p) { ort->ReleaseValue(p); });

  const char* const input_name = "images";
  const char* const output_name = "logits";
  const OrtValue* const inputs[] = {input.get()};
  const auto logits = make<OrtValue>(
      [&](OrtValue** out) {
        return ort->Run(session.get(), nullptr, &input_name, inputs, 1, &output_name, 1, out);
      },
      [](OrtValue* p) { ort->ReleaseValue(p); });
  void* data = nullptr;
  check(ort->GetTensorMutableData(logits.get(), &data));
  image::print_best(static_cast<const float*>(data), element_count(logits.get()), 5);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::fprintf(stderr, "usage: %s model.onnx libvssm_onnxruntime.so photo.ppm\n", arguments[0]);
    return 2;
  }
  ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (ort == nullptr) {
    std::fprintf(stderr, "error: this ONNX Runtime is older than API %u\n", ORT_API_VERSION);
    return 2;
  }
  try {
    classify(arguments[1], arguments[2], arguments[3]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
  return 0;
}
