// Classifies an image with ONNX Runtime and the vssm operators, on the CPU:
//   ort_classify model.onnx libvssm_onnxruntime.so photo.ppm
// With "-" in place of the library the file's own fallback bodies run.
#include "image.h"
#include "ort_model.h"

int main(int count, char** arguments) {
  const char* const usage = "model.onnx libvssm_onnxruntime.so photo.ppm";
  return ort::run_example(count == 4, arguments[0], usage, [&] {
    const ort::Model model(arguments[1], arguments[2]);
    const std::vector<int64_t> shape = model.input_shape();
    const image::Pixels photo = image::read_ppm(arguments[3], shape[2], shape[3]);
    const auto logits = model.run<float>(image::normalised(photo), "logits");
    image::print_best(logits.data(), logits.size(), 5);
  });
}
