#include "tests/tensorrt_harness/memory.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace vssm::harness {
namespace {

class Host final : public Device {
 public:
  ~Host() override {
    for (void* const block : blocks_) std::free(block);
  }
  void* allocate(size_t bytes) override {
    blocks_.push_back(std::aligned_alloc(256, (bytes + 511) / 256 * 256));
    return blocks_.back();
  }
  void write(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void read(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  trt::cudaStream_t stream() override { return nullptr; }
  void run(const std::function<void()>& work, bool graph) override {
    if (graph) throw std::runtime_error("graphs need a GPU");
    work();
  }

 private:
  std::vector<void*> blocks_;
};

/// The CUDA driver's C functions, found by name; each returns 0 or an error.
class Driver {
 public:
  Driver() : library_(dlopen("libcuda.so.1", RTLD_NOW)) {
    if (library_ == nullptr) throw std::runtime_error("no NVIDIA driver (libcuda.so.1)");
  }
  template <typename... Arguments>
  void operator()(const char* name, Arguments... arguments) const {
    auto* const call = reinterpret_cast<int (*)(Arguments...)>(dlsym(library_, name));
    if (call == nullptr) throw std::runtime_error(std::string("the driver has no ") + name);
    const int error = call(arguments...);
    if (error != 0) {
      throw std::runtime_error(std::string(name) + " failed: " + std::to_string(error));
    }
  }

 private:
  void* library_;
};

class Gpu final : public Device {
 public:
  Gpu() {
    driver_("cuInit", 0U);
    int device = 0;
    void* context = nullptr;
    driver_("cuDeviceGet", &device, 0);
    driver_("cuDevicePrimaryCtxRetain", &context, device);
    driver_("cuCtxSetCurrent", context);
    driver_("cuStreamCreate", &stream_, 1U);  // does not wait for the default stream
  }
  ~Gpu() override {
    for (const uint64_t block : blocks_) driver_("cuMemFree_v2", block);
    driver_("cuStreamDestroy_v2", stream_);
  }
  void* allocate(size_t bytes) override {
    uint64_t block = 0;
    driver_("cuMemAlloc_v2", &block, bytes == 0 ? size_t{1} : bytes);
    blocks_.push_back(block);
    return reinterpret_cast<void*>(block);
  }
  void write(void* to, const void* from, size_t bytes) override {
    if (bytes > 0) driver_("cuMemcpyHtoD_v2", reinterpret_cast<uint64_t>(to), from, bytes);
  }
  void read(void* to, const void* from, size_t bytes) override {
    if (bytes > 0) driver_("cuMemcpyDtoH_v2", to, reinterpret_cast<uint64_t>(from), bytes);
  }
  trt::cudaStream_t stream() override { return static_cast<trt::cudaStream_t>(stream_); }
  void run(const std::function<void()>& work, bool graph) override {
    driver_("cuCtxSynchronize");  // copies from the host may still be under way
    if (graph) {
      replay(work);
    } else {
      work();
    }
    driver_("cuStreamSynchronize", stream_);
  }

 private:
  void replay(const std::function<void()>& work) {
    void* captured = nullptr;
    void* ready = nullptr;
    driver_("cuStreamBeginCapture_v2", stream_, 0);  // global: a forbidden call of any thread fails
    work();
    driver_("cuStreamEndCapture", stream_, &captured);
    driver_("cuGraphInstantiateWithFlags", &ready, captured, uint64_t{0});
    for (int i = 0; i < 2; ++i) driver_("cuGraphLaunch", ready, stream_);
    driver_("cuStreamSynchronize", stream_);
    driver_("cuGraphExecDestroy", ready);
    driver_("cuGraphDestroy", captured);
  }

  Driver driver_;
  void* stream_ = nullptr;
  std::vector<uint64_t> blocks_;
};

}  // namespace

std::unique_ptr<Device> open_device(const std::string& kind) {
  if (kind == "cuda") return std::make_unique<Gpu>();
  if (kind == "host") return std::make_unique<Host>();
  throw std::runtime_error("device=" + kind + " is neither host nor cuda");
}

}  // namespace vssm::harness
