#include "plugins/onnxruntime/cuda_host.h"

#include "plugins/onnxruntime/ort_host.h"

namespace vssm::ort {

DeviceAllocator::~DeviceAllocator() {
  if (allocator_ != nullptr) api().ReleaseAllocator(allocator_);
}

vssm::Status DeviceAllocator::open(const KernelInfo* info) {
  return from_ort(api().KernelInfoGetAllocator(info, kDefaultMemory, &allocator_),
                  "KernelInfoGetAllocator");
}

CudaWork::~CudaWork() {
  if (launch_.workspace == nullptr) return;
  ort::Status* status = api().AllocatorFree(allocator_, launch_.workspace);
  if (status != nullptr) api().ReleaseStatus(status);
}

vssm::Status CudaWork::begin(const KernelContext* context, int64_t workspace_bytes) {
  vssm::Status status =
      from_ort(api().KernelContext_GetGPUComputeStream(context, &launch_.stream), "GetStream");
  if (!status.ok() || workspace_bytes == 0) return status;
  const MemoryInfo* memory = nullptr;
  status = from_ort(api().AllocatorGetInfo(allocator_, &memory), "AllocatorGetInfo");
  if (!status.ok()) return status;
  status = from_ort(api().KernelContext_GetScratchBuffer(
                        context, memory, static_cast<size_t>(workspace_bytes), &launch_.workspace),
                    "GetScratchBuffer");
  launch_.workspace_bytes = workspace_bytes;
  if (status.ok() && launch_.workspace == nullptr) {
    return vssm::Status::error("onnxruntime GetScratchBuffer: workspace=", workspace_bytes,
                               " bytes could not be had; run a smaller batch");
  }
  return status;
}

}  // namespace vssm::ort
