// Memory, streams and graphs of the device that enqueue works on: the host itself for kernels that
// are stubbed or emulated, or an NVIDIA GPU through its driver, which is looked for at run time.
#ifndef VSSM_TESTS_TENSORRT_HARNESS_MEMORY_H_
#define VSSM_TESTS_TENSORRT_HARNESS_MEMORY_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "plugins/tensorrt/trt_abi.h"

namespace vssm::harness {

class Device {
 public:
  virtual ~Device() = default;
  /// 256-byte aligned; freed with the device.
  virtual void* allocate(size_t bytes) = 0;
  virtual void write(void* to, const void* from, size_t bytes) = 0;
  virtual void read(void* to, const void* from, size_t bytes) = 0;
  virtual trt::cudaStream_t stream() = 0;
  /// Runs `work` on the stream and waits; `graph`: captures it, then replays it twice.
  virtual void run(const std::function<void()>& work, bool graph) = 0;
};

/// "host" or "cuda". Throws where there is no GPU.
std::unique_ptr<Device> open_device(const std::string& kind);

}  // namespace vssm::harness

#endif  // VSSM_TESTS_TENSORRT_HARNESS_MEMORY_H_
