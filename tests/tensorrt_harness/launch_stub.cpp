// Launchers that check and write which they are and what they write to, byte by byte, so that the
// adapters run where there is no CUDA: for the harness's checks, for what an enqueue costs the
// host, and for sanitizers. Mark 64 + variant is a scan's, 80 + index another's.
#include <cstring>

#include "plugins/kernels/selective_scan.h"
#include "plugins/kernels/token_conv.h"
#include "plugins/kernels/token_gather.h"
#include "plugins/kernels/token_scatter.h"

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
  const int64_t count = shape.batch * shape.seqlen * shape.d_inner;
  std::memset(args.y, 64 + static_cast<int>(variant),
              static_cast<size_t>(count * size_of(args.u.dtype)));
  return {};
}

int64_t token_conv_cuda_workspace(const TokenConvShape& shape) { return 8 * shape.batch; }

Status token_conv_cuda(const TokenConvArgs& args, const CudaLaunch& launch) {
  TokenConvShape shape;
  const Status status = check(args, &shape);
  if (!status.ok()) return status;
  if (launch.workspace_bytes != token_conv_cuda_workspace(shape)) {
    return Status::error(args.name, ": workspace_bytes=", launch.workspace_bytes,
                         " is not asked for");
  }
  const int64_t count = shape.batch * shape.directions * shape.seqlen * shape.d_inner;
  std::memset(args.y, 80, static_cast<size_t>(count * size_of(args.x.dtype)));
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
  const int64_t rows = shape.batch * args.num_keep;
  std::memset(args.kept_position, 80, static_cast<size_t>(rows) * sizeof(int32_t));
  for (int i = 0; i < args.count; ++i) {
    const int64_t bytes = rows * shape.width[i] * size_of(args.x[i].dtype);
    std::memset(args.y[i], 81 + i, static_cast<size_t>(bytes));
  }
  return {};
}

int64_t token_scatter_cuda_workspace(const TokenScatterShape& shape) { return 8 * shape.batch; }

Status token_scatter_cuda(const TokenScatterArgs& args, const CudaLaunch& launch) {
  TokenScatterShape shape;
  const Status status = check(args, &shape);
  if (!status.ok()) return status;
  if (launch.workspace_bytes != token_scatter_cuda_workspace(shape)) {
    return Status::error(args.name, ": workspace_bytes=", launch.workspace_bytes,
                         " is not asked for");
  }
  const int64_t count = shape.batch * shape.full_seqlen * shape.width;
  std::memset(args.y, 80, static_cast<size_t>(count * size_of(args.base.dtype)));
  return {};
}

}  // namespace vssm
