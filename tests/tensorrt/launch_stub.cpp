// Launchers that check and do nothing, so that the adapters run where there is no CUDA: for the
// harness's checks, for what an enqueue costs the host, and for sanitizers.
#include "plugins/kernels/selective_scan.h"
#include "plugins/kernels/token_gather.h"

namespace vssm {

/// A figure that grows with the shape and differs between variants, as the contract allows.
int64_t selective_scan_cuda_workspace(const SelectiveScanShape& shape, DType, ScanVariant variant) {
  return variant == ScanVariant::kLatency ? 4 * shape.batch * shape.seqlen : 0;
}

Status selective_scan_cuda(const SelectiveScanArgs& args, ScanVariant variant,
                           const CudaLaunch& launch) {
  SelectiveScanShape shape;
  const Status status = check(args, &shape);
  if (!status.ok()) return status;
  if (launch.workspace_bytes != selective_scan_cuda_workspace(shape, args.u.dtype, variant)) {
    return Status::error(args.name, ": workspace_bytes=", launch.workspace_bytes,
                         " is not asked for");
  }
  return {};
}

int64_t token_gather_cuda_workspace(const TokenGatherShape& shape) { return 8 * shape.seqlen; }

Status token_gather_cuda(const TokenGatherArgs& args, const CudaLaunch& launch) {
  TokenGatherShape shape;
  const Status status = check(args, &shape);
  if (!status.ok()) return status;
  if (launch.workspace_bytes != token_gather_cuda_workspace(shape)) {
    return Status::error(args.name, ": workspace_bytes=", launch.workspace_bytes,
                         " is not asked for");
  }
  return {};
}

}  // namespace vssm
