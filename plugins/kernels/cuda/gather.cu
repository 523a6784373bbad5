// TokenGather on a GPU, in one kernel. Every block finds the threshold of its image by itself, from
// keys that its threads hold in registers, and then copies its share of the kept rows: copying
// wants the whole chip, and the blocks need not wait for each other.
#include "plugins/kernels/cuda/gather.h"
#include "plugins/kernels/cuda/rows.cuh"
#include "plugins/kernels/token_gather.h"

namespace vssm {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFU;
constexpr int kMaxWarps = 32;

/// Each warp's counts, twice: the warps read one while the fastest write the other, so that one
/// barrier a round is enough.
struct Counts {
  int32_t of_warp[2][kMaxWarps];
  int32_t above[kMaxWarps], equal[kMaxWarps];
};

/// The keys of an image, 32 neighbouring slots a warp at a time: kKeys of a lane in registers, or
/// any number, read again from the scores, where kKeys is 0.
template <int kKeys>
class Keys {
 public:
  __device__ Keys(const GatherTask& task, int64_t image)
      : seqlen_(task.seqlen),
        protected_(task.protected_position),
        score_(task.score + image * task.seqlen),
        position_(task.position + image * task.position_stride) {
    const int32_t warps = static_cast<int32_t>(blockDim.x / 32);
    per_lane_ = kKeys > 0 ? kKeys : (seqlen_ - 1) / (32 * warps) + 1;
    first_ = static_cast<int64_t>(threadIdx.x / 32) * per_lane_ * 32 + threadIdx.x % 32;
#pragma unroll
    for (int32_t k = 0; k < kKeys; ++k) held_[k] = read(slot(k));
  }

  __device__ int32_t per_lane() const { return kKeys > 0 ? kKeys : per_lane_; }
  /// May be past the end; its key is then 0.
  __device__ int64_t slot(int32_t k) const { return first_ + int64_t{k} * 32; }
  __device__ uint32_t key(int32_t k) const {
    if constexpr (kKeys > 0) {
      return held_[k];
    } else {
      return read(slot(k));
    }
  }
  __device__ int32_t position(int64_t slot) const { return position_[slot]; }

 private:
  __device__ uint32_t read(int64_t slot) const {
    if (slot >= seqlen_) return 0;
    const bool is_protected = protected_ >= 0 && position_[slot] == protected_;
    return key_of(__float_as_uint(score_[slot]), is_protected);
  }

  int32_t seqlen_, per_lane_;
  int64_t protected_, first_;
  const float* score_;
  const int32_t* position_;
  uint32_t held_[kKeys > 0 ? kKeys : 1];
};

/// The num_keep-th largest key of the block's image. Padding, of key 0, never counts: a candidate
/// is at least 1.
template <int kKeys>
__device__ uint32_t find_threshold(const Keys<kKeys>& keys, int32_t num_keep, Counts& counts) {
  const unsigned warps = blockDim.x / 32;
  ThresholdSearch search(num_keep);
  for (int round = 0; !search.done(); ++round) {
    int32_t count = 0;
#pragma unroll
    for (int32_t k = 0; k < keys.per_lane(); ++k) {
      count += __popc(__ballot_sync(kAllLanes, keys.key(k) >= search.candidate()));
    }
    int32_t* of_warp = counts.of_warp[round % 2];
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = count;
    __syncthreads();
    count = 0;
    for (unsigned warp = 0; warp < warps; ++warp) count += of_warp[warp];
    search.take(count);
  }
  return search.threshold();
}

/// Lists the slots of rows [first, first + rows) of the image's output, and writes their positions.
template <int kKeys>
__device__ void list_rows(const Keys<kKeys>& keys, uint32_t threshold, const GatherTask& task,
                          int32_t first, int32_t rows, int32_t* kept_position, int32_t* slots,
                          Counts& counts) {
  int32_t above = 0, equal = 0;
#pragma unroll
  for (int32_t k = 0; k < keys.per_lane(); ++k) {
    above += __popc(__ballot_sync(kAllLanes, keys.key(k) > threshold));
    equal += __popc(__ballot_sync(kAllLanes, keys.key(k) == threshold));
  }
  const unsigned own = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) {
    counts.above[own] = above;
    counts.equal[own] = equal;
  }
  __syncthreads();
  int32_t missing = task.num_keep;  // of the equal ones, the lowest slots so many
  above = equal = 0;                // from here on: in lower slots
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
    missing -= counts.above[warp];
    if (warp >= own) continue;
    above += counts.above[warp];
    equal += counts.equal[warp];
  }
  const unsigned lower_lanes = (1U << (threadIdx.x % 32)) - 1;
#pragma unroll
  for (int32_t k = 0; k < keys.per_lane(); ++k) {
    const bool is_above = keys.key(k) > threshold, is_equal = keys.key(k) == threshold;
    const unsigned all_above = __ballot_sync(kAllLanes, is_above);
    const unsigned all_equal = __ballot_sync(kAllLanes, is_equal);
    const int32_t equal_before = equal + __popc(all_equal & lower_lanes);
    const int32_t row =
        above + __popc(all_above & lower_lanes) + min(equal_before, missing) - first;
    const bool kept = is_above || (is_equal && equal_before < missing);
    if (kept && row >= 0 && row < rows && keys.slot(k) < task.seqlen) {
      slots[row] = static_cast<int32_t>(keys.slot(k));
      kept_position[row] = keys.position(keys.slot(k));
    }
    above += __popc(all_above);
    equal += __popc(all_equal);
  }
}

template <int kThreads, int kKeys>
__global__ void __launch_bounds__(kThreads, kThreadsOfSm / kThreads)
    gather_kernel(const __grid_constant__ GatherTask task) {
  auto& counts = shared_memory<Counts>();
  auto* slots = dynamic_shared_memory<int32_t>();
  const int64_t image = blockIdx.x / static_cast<unsigned>(task.chunks);
  const int32_t first =
      static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(task.chunks)) * task.rows;
  const int32_t rows = min(task.rows, task.num_keep - first);
  const int64_t first_y = image * task.num_keep + first;
  {
    const Keys<kKeys> keys(task, image);
    const uint32_t threshold = find_threshold(keys, task.num_keep, counts);
    list_rows(keys, threshold, task, first, rows, task.kept_position + first_y, slots, counts);
  }
  __syncthreads();
  for (int32_t i = 0; i < task.count; ++i) {
    const RowCopy& copy = task.copies[i];
    const char* x = copy.x + image * task.seqlen * copy.row_bytes;
    const auto source = [&](int32_t row) { return x + int64_t{slots[row]} * copy.row_bytes; };
    copy_rows(source, copy.y + first_y * copy.row_bytes, copy.row_bytes, copy.unit, rows);
  }
}

int64_t row_bytes_of(const TokenGatherArgs& args, const TokenGatherShape& shape, int i) {
  return i < args.count ? shape.width[i] * size_of(args.x[i].dtype) : 0;
}

GatherTask make_task(const TokenGatherArgs& args, const TokenGatherShape& shape) {
  GatherTask task = {};
  task.score = static_cast<const float*>(args.score.data);
  task.position = static_cast<const int32_t*>(args.position.data);
  task.position_stride = args.position.dims[0] == 1 ? 0 : shape.seqlen;
  task.protected_position = args.protected_position;
  task.kept_position = args.kept_position;
  task.seqlen = static_cast<int32_t>(shape.seqlen);
  task.num_keep = static_cast<int32_t>(args.num_keep);
  task.count = args.count;
  for (int i = 0; i < args.count; ++i) {
    const int64_t row_bytes = row_bytes_of(args, shape, i);
    task.copies[i] = {static_cast<const char*>(args.x[i].data), static_cast<char*>(args.y[i]),
                      static_cast<int32_t>(row_bytes),
                      plan_unit({args.x[i].data, args.y[i]}, row_bytes)};
  }
  return task;
}

template <int kThreads, int kKeys>
Status launch_gather(const TokenGatherArgs& args, const TokenGatherShape& shape,
                     const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t resident = int64_t{limits.sm_count} * (kThreadsOfSm / kThreads);
  const int64_t row_bytes = row_bytes_of(args, shape, 0) + row_bytes_of(args, shape, 1);
  if (row_bytes > kMaxRowBytes) {
    return Status::error(args.name, ": a row of ", row_bytes, " bytes is more than ", kMaxRowBytes,
                         "; gather narrower tensors");
  }
  GatherTask task = make_task(args, shape);
  task.rows = plan_rows(shape.batch, task.num_keep, row_bytes, resident);
  task.chunks = (task.num_keep + task.rows - 1) / task.rows;
  if (shape.batch > INT32_MAX / task.chunks) {
    return Status::error(args.name, ": batch=", shape.batch, " is more than ",
                         INT32_MAX / task.chunks, ", what one launch takes; split the batch");
  }
  const dim3 grid(static_cast<unsigned>(shape.batch * task.chunks));
  const size_t shared = static_cast<size_t>(task.rows) * sizeof(int32_t);
  return launch(args.name, gather_kernel<kThreads, kKeys>, {grid, dim3(kThreads), shared}, stream,
                task);
}

}  // namespace

int64_t token_gather_cuda_workspace(const TokenGatherShape&) { return 0; }

Status token_gather_cuda(const TokenGatherArgs& args, const CudaLaunch& launch) {
  TokenGatherShape shape;
  Status status = check(args, &shape);
  if (!status.ok() || shape.batch == 0) return status;
  DeviceLimits limits;
  status = device_limits(args.name, &limits);
  if (!status.ok()) return status;
  const cudaStream_t stream = stream_of(launch);
  // The keys of most models fit one a thread; longer sequences take more threads, then the scores.
  if (shape.seqlen <= 256) return launch_gather<256, 1>(args, shape, limits, stream);
  if (shape.seqlen <= 1024) return launch_gather<256, 4>(args, shape, limits, stream);
  if (shape.seqlen <= 16384) return launch_gather<1024, 16>(args, shape, limits, stream);
  return launch_gather<1024, 0>(args, shape, limits, stream);
}

}  // namespace vssm
