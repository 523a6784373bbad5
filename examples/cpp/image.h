// What the examples share: a PPM image as the model's input, and the best classes of its output.
#ifndef VSSM_EXAMPLES_CPP_IMAGE_H_
#define VSSM_EXAMPLES_CPP_IMAGE_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace image {

// ImageNet's statistics; model.json has those of another model under "preprocessing".
constexpr float kMean[3] = {0.485F, 0.456F, 0.406F};
constexpr float kStd[3] = {0.229F, 0.224F, 0.225F};

/// (height, width, channels), with three channels RGB.
struct Pixels {
  int64_t height, width, channels;
  std::vector<unsigned char> values;
};

/// The middle of a binary PPM. Nothing is resized: make the shorter side as long as "resize" in
/// model.json, for example with
///   convert photo.jpg -resize 256x256^ photo.ppm
inline Pixels read_ppm(const std::string& path, int64_t height, int64_t width) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int64_t columns = 0;
  int64_t rows = 0;
  int64_t largest = 0;
  file >> kind >> columns >> rows >> largest;
  file.get();
  if (!file || kind != "P6" || largest != 255 || columns > 65536 || rows > 65536) {
    throw std::runtime_error(path + " is no binary PPM of 8 bits; make one with an image tool");
  }
  if (rows < height || columns < width) {
    throw std::runtime_error(path + " is smaller than the model's input; enlarge it");
  }
  std::vector<unsigned char> all(static_cast<size_t>(3 * rows * columns));
  if (!file.read(reinterpret_cast<char*>(all.data()), static_cast<long>(all.size()))) {
    throw std::runtime_error(path + " ends too early; make it again");
  }
  // Half a pixel goes to the even side, as in Python's round(), which the package follows.
  const auto top = static_cast<int64_t>(std::nearbyint(static_cast<double>(rows - height) / 2));
  const auto left = static_cast<int64_t>(std::nearbyint(static_cast<double>(columns - width) / 2));
  Pixels middle{height, width, 3, {}};
  for (int64_t y = top; y < top + height; ++y) {
    const auto row = all.begin() + 3 * (y * columns + left);
    middle.values.insert(middle.values.end(), row, row + 3 * width);
  }
  return middle;
}

/// RGB pixels as the model's input (3, height, width).
inline std::vector<float> normalised(const Pixels& pixels) {
  std::vector<float> out;
  out.reserve(pixels.values.size());
  for (size_t channel = 0; channel < 3; ++channel) {
    for (size_t i = channel; i < pixels.values.size(); i += 3) {
      const float value = pixels.values[i];
      out.push_back((value / 255.0F - kMean[channel]) / kStd[channel]);
    }
  }
  return out;
}

/// As a binary PPM, or with one channel a PGM.
inline void write(const std::string& path, const Pixels& pixels) {
  std::ofstream file(path, std::ios::binary);
  file << (pixels.channels == 3 ? "P6 " : "P5 ") << pixels.width << ' ' << pixels.height
       << " 255\n";
  file.write(reinterpret_cast<const char*>(pixels.values.data()),
             static_cast<long>(pixels.values.size()));
  if (!file.flush()) {
    throw std::runtime_error(path + " cannot be written");
  }
}

/// "class probability" lines, the best first.
inline void print_best(const float* logits, size_t classes, size_t count) {
  std::vector<size_t> order(classes);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [logits](size_t a, size_t b) { return logits[a] > logits[b]; });
  double sum = 0.0;
  for (size_t i = 0; i < classes; ++i) {
    sum += std::exp(static_cast<double>(logits[i] - logits[order[0]]));
  }
  for (size_t i = 0; i < std::min(count, classes); ++i) {
    const double share = std::exp(static_cast<double>(logits[order[i]] - logits[order[0]])) / sum;
    std::printf("%zu %.6f\n", order[i], share);
  }
}

}  // namespace image

#endif  // VSSM_EXAMPLES_CPP_IMAGE_H_
