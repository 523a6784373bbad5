// TokenScatter on a GPU, in one kernel. A block takes some places of one image, finds out which
// rows of x they show by reading all positions of the image, and copies each row once, from x or
// from base: nothing is written twice, so blocks need not wait for each other.
#include "plugins/kernels/cuda/rows.cuh"
#include "plugins/kernels/token_scatter.h"

namespace vssm {
namespace {

constexpr int kThreads = 256;
constexpr int32_t kBase = -1;

struct ScatterTask {
  const char* base;
  const char* x;
  char* y;
  const int32_t* position;
  int64_t position_stride;  // from image to image; 0 where they share
  int32_t full_seqlen, seqlen;
  int32_t row_bytes, unit;
  int32_t chunks;  // blocks that share an image
  int32_t rows;    // places of each
};

__global__ void __launch_bounds__(kThreads, kThreadsOfSm / kThreads)
    scatter_kernel(const __grid_constant__ ScatterTask task) {
  auto* sources = dynamic_shared_memory<int32_t>();
  const int64_t image = blockIdx.x / static_cast<unsigned>(task.chunks);
  const int32_t first =
      static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(task.chunks)) * task.rows;
  const int32_t rows = min(task.rows, task.full_seqlen - first);
  for (auto row = static_cast<int32_t>(threadIdx.x); row < rows; row += kThreads) {
    sources[row] = kBase;
  }
  __syncthreads();
  const int32_t* position = task.position + image * task.position_stride;
  for (unsigned token = threadIdx.x; token < static_cast<unsigned>(task.seqlen);
       token += kThreads) {
    // Without a sign what lies before the block's places, or is negative, is beyond them too.
    const unsigned row = static_cast<unsigned>(position[token]) - static_cast<unsigned>(first);
    if (row < static_cast<unsigned>(rows)) sources[row] = static_cast<int32_t>(token);
  }
  __syncthreads();
  const int64_t offset = (image * task.full_seqlen + first) * task.row_bytes;
  const char* base = task.base + offset;
  const char* x = task.x + image * task.seqlen * task.row_bytes;
  const auto source = [&](int32_t row) {
    const int32_t token = sources[row];
    return token == kBase ? base + int64_t{row} * task.row_bytes
                          : x + int64_t{token} * task.row_bytes;
  };
  copy_rows(source, task.y + offset, task.row_bytes, task.unit, rows);
}

}  // namespace

int64_t token_scatter_cuda_workspace(const TokenScatterShape&) { return 0; }

Status token_scatter_cuda(const TokenScatterArgs& args, const CudaLaunch& launch_to) {
  TokenScatterShape shape;
  Status status = check(args, &shape);
  if (!status.ok() || shape.batch == 0) return status;
  DeviceLimits limits;
  status = device_limits(args.name, &limits);
  if (!status.ok()) return status;
  const int64_t row_bytes = shape.width * size_of(args.base.dtype);
  if (row_bytes > kMaxRowBytes) {
    return Status::error(args.name, ": a row of ", row_bytes, " bytes is more than ", kMaxRowBytes,
                         "; scatter narrower tensors");
  }
  ScatterTask task = {};
  task.base = static_cast<const char*>(args.base.data);
  task.x = static_cast<const char*>(args.x.data);
  task.y = static_cast<char*>(args.y);
  task.position = static_cast<const int32_t*>(args.position.data);
  task.position_stride = args.position.dims[0] == 1 ? 0 : shape.seqlen;
  task.full_seqlen = static_cast<int32_t>(shape.full_seqlen);
  task.seqlen = static_cast<int32_t>(shape.seqlen);
  task.row_bytes = static_cast<int32_t>(row_bytes);
  task.unit = plan_unit({task.base, task.x, task.y}, row_bytes);
  const int64_t resident = int64_t{limits.sm_count} * (kThreadsOfSm / kThreads);
  task.rows = plan_rows(shape.batch, task.full_seqlen, row_bytes, resident);
  task.chunks = (task.full_seqlen - 1) / task.rows + 1;
  if (shape.batch > INT32_MAX / task.chunks) {
    return Status::error(args.name, ": batch=", shape.batch, " is more than ",
                         INT32_MAX / task.chunks, ", what one launch takes; split the batch");
  }
  const dim3 grid(static_cast<unsigned>(shape.batch * task.chunks));
  const size_t shared = static_cast<size_t>(task.rows) * sizeof(int32_t);
  return launch(args.name, scatter_kernel, {grid, dim3(kThreads), shared}, stream_of(launch_to),
                task);
}

}  // namespace vssm
