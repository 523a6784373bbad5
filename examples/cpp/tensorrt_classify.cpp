// Classifies an image with a TensorRT engine that has the vssm plugins:
//   tensorrt_classify model.plan libvssm_tensorrt.so photo.ppm
// Engine, GPU, TensorRT and library belong together (`vssm engine`, trtexec --dynamicPlugins), and
// engines and libraries are code: run only your own.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "image.h"

namespace {

class Logger : public nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) {
      std::fprintf(stderr, "TensorRT: %s\n", message);
    }
  }
};

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(cudaGetErrorString(status));
  }
}

template <typename T>
T* required(T* pointer, const char* what) {
  if (pointer == nullptr) {
    throw std::runtime_error(std::string(what) + " failed; TensorRT's reason is above");
  }
  return pointer;
}

/// One input or output on the GPU, for a batch of one.
struct Tensor {
  std::string name;
  nvinfer1::Dims shape{};
  size_t count = 1;
  void* device = nullptr;
};

size_t element_size(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
    case nvinfer1::DataType::kINT32:
      return 4;
    case nvinfer1::DataType::kINT64:
      return 8;
    default:
      throw std::runtime_error("the engine has a tensor of a type that vssm does not export");
  }
}

class Classifier {
 public:
  Classifier(const std::string& plan, const std::string& library) {
    required(getPluginRegistry()->loadLibrary(library.c_str()), "loading the plugin library");
    std::ifstream file(plan, std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    runtime_.reset(required(nvinfer1::createInferRuntime(logger_), "createInferRuntime"));
    engine_.reset(required(runtime_->deserializeCudaEngine(bytes.data(), bytes.size()), "loading"));
    context_.reset(required(engine_->createExecutionContext(), "createExecutionContext"));
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    for (int i = 0; i < engine_->getNbIOTensors(); ++i) {
      add_tensor(engine_->getIOTensorName(i));
    }
  }

  ~Classifier() {
    for (const Tensor& tensor : tensors_) cudaFree(tensor.device);
    cudaStreamDestroy(stream_);
  }
  Classifier(const Classifier&) = delete;

  std::vector<float> run(const std::string& photo) {
    const Tensor& images = find("images");
    const Tensor& logits = find("logits");
    const auto pixels =
        image::normalised(image::read_ppm(photo, images.shape.d[2], images.shape.d[3]));
    std::vector<float> out(logits.count);
    check(cudaMemcpyAsync(images.device, pixels.data(), pixels.size() * sizeof(float),
                          cudaMemcpyHostToDevice, stream_));
    if (!context_->enqueueV3(stream_)) {
      throw std::runtime_error("enqueueV3 failed; TensorRT's reason is above");
    }
    check(cudaMemcpyAsync(out.data(), logits.device, out.size() * sizeof(float),
                          cudaMemcpyDeviceToHost, stream_));
    check(cudaStreamSynchronize(stream_));
    return out;
  }

 private:
  void add_tensor(const char* name) {
    Tensor tensor{name, engine_->getTensorShape(name)};
    tensor.shape.d[0] = 1;
    const bool taken = engine_->getTensorIOMode(name) != nvinfer1::TensorIOMode::kINPUT ||
                       context_->setInputShape(name, tensor.shape);
    for (int axis = 0; axis < tensor.shape.nbDims; ++axis) {
      tensor.count *= static_cast<size_t>(tensor.shape.d[axis]);
    }
    check(
        cudaMalloc(&tensor.device, tensor.count * element_size(engine_->getTensorDataType(name))));
    tensors_.push_back(tensor);
    if (!taken || !context_->setTensorAddress(name, tensor.device)) {
      throw std::runtime_error(tensor.name + " is refused; TensorRT's reason is above");
    }
  }

  const Tensor& find(const std::string& name) const {
    for (const Tensor& tensor : tensors_) {
      if (tensor.name == name) {
        return tensor;
      }
    }
    throw std::runtime_error("the engine has no " + name + "; build it from a vssm export");
  }
  Logger logger_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  cudaStream_t stream_ = nullptr;
  std::vector<Tensor> tensors_;
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::fprintf(stderr, "usage: %s model.plan libvssm_tensorrt.so photo.ppm\n", arguments[0]);
    return 2;
  }
  try {
    const auto logits = Classifier(arguments[1], arguments[2]).run(arguments[3]);
    image::print_best(logits.data(), logits.size(), 5);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
  return 0;
}
