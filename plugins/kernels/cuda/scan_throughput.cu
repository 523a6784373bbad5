// Launches the throughput scan.
#include "plugins/kernels/cuda/scan_launch.cuh"
#include "plugins/kernels/cuda/scan_throughput.cuh"

namespace vssm {
namespace {

template <typename T, int kStates, bool kOneDecay>
Status launch_states(ScanLaunch scan) {
  ScanParams& p = scan.params;
  const int32_t threads = channel_threads(p.d_inner, kThroughputThreads);
  p.blocks_per_image = static_cast<int32_t>((int64_t{p.d_inner} + threads - 1) / threads);
  p.groups = (p.d_state + kStates - 1) / kStates;
  // A float32 y holds the sums itself.
  p.sums = static_cast<float*>(scan.dtype == DType::kFloat32 ? p.y : scan.workspace);
  dim3 grid;
  const Status status = count_blocks(scan, p.blocks_per_image, &grid);
  if (!status.ok()) return status;
  const size_t shared = 2 * sizeof(float) * ThroughputCut<kStates>::tile_floats(threads);
  return launch(scan.name, selective_scan_throughput<T, kStates, kOneDecay>,
                {grid, dim3(static_cast<unsigned>(threads)), shared}, scan.stream, p);
}

}  // namespace

int64_t throughput_workspace(const SelectiveScanShape& shape, DType dtype) {
  const bool one_pass = shape.directions == 1 && shape.d_state <= kStateGroup;
  if (dtype == DType::kFloat32 || one_pass) return 0;
  return shape.batch * shape.seqlen * shape.d_inner * int64_t{sizeof(float)};
}

Status launch_throughput(const ScanLaunch& scan) {
  return with_float_type(scan.name, scan.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (scan.params.one_decay) return launch_states<T, kOneDecayGroup, true>(scan);
    return scan.params.d_state == 1 ? launch_states<T, 1, false>(scan)
                                    : launch_states<T, kStateGroup, false>(scan);
  });
}

}  // namespace vssm
