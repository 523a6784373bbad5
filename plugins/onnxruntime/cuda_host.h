// What the adapters ask of ONNX Runtime's CUDA provider: its stream, and device memory. No header
// of CUDA: the stream and the memory are pointers that the launchers know what to do with.
#ifndef VSSM_PLUGINS_ONNXRUNTIME_CUDA_HOST_H_
#define VSSM_PLUGINS_ONNXRUNTIME_CUDA_HOST_H_

#include "plugins/kernels/types.h"
#include "plugins/onnxruntime/ort_abi.h"

namespace vssm::ort {

/// The device allocator of the provider that a node runs on, for as long as the node lives.
class DeviceAllocator {
 public:
  DeviceAllocator() = default;
  ~DeviceAllocator();
  DeviceAllocator(const DeviceAllocator&) = delete;
  DeviceAllocator& operator=(const DeviceAllocator&) = delete;

  vssm::Status open(const KernelInfo* info);
  [[nodiscard]] Allocator* get() const { return allocator_; }

 private:
  Allocator* allocator_ = nullptr;
};

/// Stream and workspace of one run. The workspace goes back to ONNX Runtime's pool when this ends,
/// while the kernel still uses it: the pool hands it on in the order of the stream.
class CudaWork {
 public:
  explicit CudaWork(const DeviceAllocator& allocator) : allocator_(allocator.get()) {}
  ~CudaWork();
  CudaWork(const CudaWork&) = delete;
  CudaWork& operator=(const CudaWork&) = delete;

  vssm::Status begin(const KernelContext* context, int64_t workspace_bytes);
  [[nodiscard]] const CudaLaunch& launch() const { return launch_; }

 private:
  Allocator* allocator_;
  CudaLaunch launch_;
};

}  // namespace vssm::ort

#endif  // VSSM_PLUGINS_ONNXRUNTIME_CUDA_HOST_H_
