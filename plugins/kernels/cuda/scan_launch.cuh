// The launchers of the three scan kernels, one source file each, and what they are called with.
#ifndef VSSM_PLUGINS_KERNELS_CUDA_SCAN_LAUNCH_CUH_
#define VSSM_PLUGINS_KERNELS_CUDA_SCAN_LAUNCH_CUH_

#include "plugins/kernels/cuda/common.cuh"
#include "plugins/kernels/cuda/scan_params.h"

namespace vssm {

/// A scan on its way to a kernel.
struct ScanLaunch {
  const char* name;  // the operator's
  DType dtype;
  int64_t batch;
  ScanParams params;
  void* workspace;  // as large as scan_sums_bytes of the kernel says
  DeviceLimits limits;
  cudaStream_t stream;
};

/// Bytes of workspace of each kernel, whatever the device.
int64_t throughput_workspace(const SelectiveScanShape& shape, DType dtype);
int64_t latency_workspace(const SelectiveScanShape& shape);

/// One thread a channel, direction after direction.
Status launch_throughput(const ScanLaunch& scan);
/// One thread a channel, its four directions at once: `fits_together` of the params.
Status launch_together(const ScanLaunch& scan);
/// Several threads a channel, the sequence in chunks.
Status launch_latency(const ScanLaunch& scan);

/// Blocks of a launch of `blocks_per_image` each, or the reason why they are too many.
Status count_blocks(const ScanLaunch& scan, int64_t blocks_per_image, dim3* grid);

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CUDA_SCAN_LAUNCH_CUH_
