// For tests of the adapters: launchers that compute nothing and write what they were given into the
// first output: the stream, the workspace and its size, as three 64-bit numbers.
#include <cstring>

#include "plugins/kernels/selective_scan.h"
#include "plugins/kernels/token_conv.h"
#include "plugins/kernels/token_gather.h"
#include "plugins/kernels/token_scatter.h"

namespace vssm {
namespace {

constexpr int64_t kScanWorkspace = 4000;
constexpr int64_t kGatherWorkspace = 0;

Status answer(const CudaLaunch& launch, void* output) {
  const int64_t numbers[] = {reinterpret_cast<int64_t>(launch.stream),
                             reinterpret_cast<int64_t>(launch.workspace), launch.workspace_bytes};
  std::memcpy(output, numbers, sizeof(numbers));
  if (launch.workspace_bytes > 0) std::memset(launch.workspace, 0, kScanWorkspace);
  return {};
}

}  // namespace

int64_t selective_scan_cuda_workspace(const SelectiveScanShape&, DType, ScanVariant) {
  return kScanWorkspace;
}

Status selective_scan_cuda(const SelectiveScanArgs& args, ScanVariant, const CudaLaunch& launch) {
  if (args.scale < 0) return Status::error(args.name, ": the launch failed, as the test asked");
  return answer(launch, args.y);
}

int64_t token_gather_cuda_workspace(const TokenGatherShape&) { return kGatherWorkspace; }

Status token_gather_cuda(const TokenGatherArgs& args, const CudaLaunch& launch) {
  return answer(launch, args.y[0]);
}

int64_t token_conv_cuda_workspace(const TokenConvShape&) { return 0; }

Status token_conv_cuda(const TokenConvArgs& args, const CudaLaunch& launch) {
  return answer(launch, args.y);
}

int64_t token_scatter_cuda_workspace(const TokenScatterShape&) { return 0; }

Status token_scatter_cuda(const TokenScatterArgs& args, const CudaLaunch& launch) {
  return answer(launch, args.y);
}

}  // namespace vssm
