// Says what each pixel of an image is, with ONNX Runtime and the vssm operators, on the CPU:
//   ort_segment model.onnx libvssm_onnxruntime.so photo.ppm labels.pgm overlay.ppm [palette.txt]
// The model is a segmenter of `vssm export --outputs labels`. Of the photo it sees the middle, as
// large as its input; labels.pgm has the class of every pixel there, overlay.ppm its colour half
// over the photo. palette.txt, which a bundle has, says which: "red green blue name" on the line of
// each class. Without it the colours are PASCAL VOC's.
#include <array>

#include "image.h"
#include "ort_model.h"

namespace {

using Colour = std::array<unsigned char, 3>;
constexpr int32_t kMostClasses = 256;  // that a map of 8 bits can tell apart

/// The bits of the class spread out over the channels.
Colour voc_colour(int32_t label) {
  Colour found{};
  for (int32_t bit = 0; bit < 24; ++bit) {
    const int32_t value = (label >> bit & 1) << (7 - bit / 3);
    found[static_cast<size_t>(bit % 3)] |= static_cast<unsigned char>(value);
  }
  return found;
}

std::vector<Colour> palette(const char* path) {
  std::vector<Colour> found;
  if (path == nullptr) {
    for (int32_t label = 0; label < kMostClasses; ++label) found.push_back(voc_colour(label));
    return found;
  }
  std::ifstream file(path);
  int red = 0;
  int green = 0;
  int blue = 0;
  for (std::string name; file >> red >> green >> blue && std::getline(file, name);) {
    found.push_back({static_cast<unsigned char>(red), static_cast<unsigned char>(green),
                     static_cast<unsigned char>(blue)});
  }
  if (!file.eof() || found.empty()) {
    throw std::runtime_error(std::string(path) + " is no palette; give the one of a bundle");
  }
  return found;
}

void segment(char** arguments) {
  const std::vector<Colour> colours = palette(arguments[6]);
  const ort::Model model(arguments[1], arguments[2]);
  const std::vector<int64_t> shape = model.input_shape();
  image::Pixels photo = image::read_ppm(arguments[3], shape[2], shape[3]);
  const auto labels = model.run<int32_t>(image::normalised(photo), "labels");
  image::Pixels map{photo.height, photo.width, 1, {}};
  for (size_t pixel = 0; pixel < labels.size(); ++pixel) {
    const auto label = static_cast<size_t>(labels[pixel]);
    if (label >= colours.size() || label >= kMostClasses) {
      throw std::runtime_error("class " + std::to_string(label) + " has no colour; give another " +
                               "palette, of the model's bundle");
    }
    map.values.push_back(static_cast<unsigned char>(label));
    for (size_t channel = 0; channel < 3; ++channel) {
      unsigned char& value = photo.values[3 * pixel + channel];
      value = static_cast<unsigned char>((value + colours[label][channel]) / 2);
    }
  }
  image::write(arguments[4], map);
  image::write(arguments[5], photo);
}

}  // namespace

int main(int count, char** arguments) {
  const char* const usage =
      "model.onnx libvssm_onnxruntime.so photo.ppm labels.pgm overlay.ppm [palette.txt]";
  // Behind the last argument there is a null pointer.
  return ort::run_example(count == 6 || count == 7, arguments[0], usage,
                          [&] { segment(arguments); });
}
