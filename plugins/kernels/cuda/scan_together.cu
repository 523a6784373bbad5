// Launches the scan of four directions at once.
#include "plugins/kernels/cuda/scan_launch.cuh"
#include "plugins/kernels/cuda/scan_together.cuh"

namespace vssm {

Status launch_together(const ScanLaunch& given) {
  ScanLaunch scan = given;
  ScanParams& p = scan.params;
  const int32_t threads = channel_threads(p.d_inner, kTogetherThreads);
  p.blocks_per_image = static_cast<int32_t>((int64_t{p.d_inner} + threads - 1) / threads);
  p.groups = (p.d_state + kStateGroup - 1) / kStateGroup;
  dim3 grid;
  const Status status = count_blocks(scan, p.blocks_per_image, &grid);
  if (!status.ok()) return status;
  int64_t shared = 2 * int64_t{sizeof(float)} * TogetherCut::tile_floats(threads);
  const int64_t sums = int64_t{p.seqlen} * threads * int64_t{sizeof(float)};
  if (shared + sums <= scan.limits.shared_bytes) {
    shared += sums;
  } else {
    p.sums = static_cast<float*>(scan.dtype == DType::kFloat32 ? p.y : scan.workspace);
  }
  return with_float_type(scan.name, scan.dtype, [&](auto tag) {
    return launch(scan.name, selective_scan_together<typename decltype(tag)::Type>,
                  {grid, dim3(static_cast<unsigned>(threads)), static_cast<size_t>(shared)},
                  scan.stream, p);
  });
}

}  // namespace vssm
