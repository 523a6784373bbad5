// Small kernels, right ones and wrong ones, with which tests/plugins/cuda/test_emulation.py tries
// the emulation. Each launcher returns an empty text, or what went wrong.
#include "plugins/kernels/cuda/common.cuh"

#define PROBE extern "C" __attribute__((visibility("default"))) const char*

namespace vssm {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFU;

const char* text(const Status& status) {
  static thread_local Status last;
  last = status;
  return last.message();
}

struct Tile {
  int32_t v[256];
};

/// Each thread takes its neighbour's number, twice through the same memory.
template <bool kAfterWrite, bool kBeforeRewrite>
__global__ void rotate_twice(int32_t* out) {
  Tile& tile = shared_memory<Tile>();
  const unsigned i = threadIdx.x, next = (i + 1) % blockDim.x;
  tile.v[i] = static_cast<int32_t>(i);
  if (kAfterWrite) __syncthreads();
  const int32_t taken = tile.v[next];
  if (kBeforeRewrite) __syncthreads();
  tile.v[i] = taken;
  __syncthreads();
  out[i] = tile.v[next];
}

/// The same within a warp.
template <bool kSync>
__global__ void rotate_in_warp(int32_t* out) {
  Tile& tile = shared_memory<Tile>();
  tile.v[threadIdx.x] = static_cast<int32_t>(threadIdx.x);
  if (kSync) __syncwarp();
  out[threadIdx.x] = tile.v[threadIdx.x ^ 1U];
}

__global__ void diverging_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffle_without_a_lane(int32_t* out) {
  if (threadIdx.x == 5) {
    __syncthreads();
  } else {
    out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);
    __syncthreads();
  }
}

/// Some threads return early; the barrier and the vote are for the rest.
__global__ void early_return(int32_t* out) {
  if (threadIdx.x % 3 == 0) return;
  __syncthreads();
  out[threadIdx.x] = __popc(__ballot_sync(kAllLanes, 1));
}

/// Tells each block which ran before it: right only in one order.
__global__ void count_blocks(int32_t* out) { out[1 + blockIdx.x] = atomicAdd(out, 1); }

__global__ void unwritten(float* out) {
  out[0] = reinterpret_cast<float*>(shared_memory<Tile>().v)[0];
  out[1] = dynamic_shared_memory<float>()[3];
  shared_memory<Tile>().v[0] = 0;
  dynamic_shared_memory<float>()[3] = 0.0F;
}

/// Row r of `out` holds what the lanes got from operation r.
__global__ void warp_operations(int32_t* out) {
  const auto lane = static_cast<int32_t>(threadIdx.x);
  const auto put = [&](int32_t row, int32_t value) { out[row * 32 + lane] = value; };
  put(0, __shfl_sync(kAllLanes, lane, 40));
  put(1, __shfl_sync(kAllLanes, lane, 3, 8));
  put(2, __shfl_up_sync(kAllLanes, lane, 3));
  put(3, __shfl_up_sync(kAllLanes, lane, 3, 16));
  put(4, __shfl_down_sync(kAllLanes, lane, 5));
  put(5, __shfl_down_sync(kAllLanes, lane, 5, 16));
  put(6, __shfl_xor_sync(kAllLanes, lane, 7));
  put(7, __shfl_xor_sync(kAllLanes, lane, 16, 16));
  put(8, static_cast<int32_t>(__ballot_sync(kAllLanes, lane % 5 == 0)));
  put(9, __any_sync(kAllLanes, lane == 31) * 2 + __any_sync(kAllLanes, 0));
  put(10, __all_sync(kAllLanes, 1) * 2 + __all_sync(kAllLanes, lane != 0));
  const unsigned half = lane < 16 ? 0xFFFFU : 0xFFFF0000U;
  put(11, static_cast<int32_t>(__ballot_sync(half, 1)));
  put(12, static_cast<int32_t>(__shfl_sync(kAllLanes, 0.5F * static_cast<float>(lane), 9) * 2));
}

__global__ void places(int32_t* out) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * 24 + thread] = static_cast<int32_t>(thread);
}

__global__ void round_halves(const float* in, float* out, int32_t count) {
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += 32) {
    out[i] = to_float(from_float<float16>(in[i]));
    out[count + i] = to_float(from_float<bfloat16>(in[i]));
    out[2 * count + i] = exp2_approx(in[i]);
  }
}

__global__ void astray(int32_t which) {
  if (which == 0) dynamic_shared_memory<int32_t>()[16] = 1;
  if (which == 1) shared_memory<Tile>().v[256 + threadIdx.x] = 1;
  if (which == 2) {
    auto* wide = reinterpret_cast<uint4*>(dynamic_shared_memory<int32_t>() + 1);
    wide->x = 1;
  }
}

template <typename... Parameters, typename... Arguments>
Status one_block(void (*kernel)(Parameters...), unsigned threads, Arguments... arguments) {
  return launch("probe", kernel, {dim3(1), dim3(threads), 64}, nullptr, arguments...);
}

}  // namespace
}  // namespace vssm

using namespace vssm;

PROBE probe_rotate(int32_t after_write, int32_t before_rewrite, int32_t* out) {
  const auto kernel = after_write == 0      ? rotate_twice<false, true>
                      : before_rewrite == 0 ? rotate_twice<true, false>
                                            : rotate_twice<true, true>;
  return text(one_block(kernel, 256, out));
}
PROBE probe_rotate_in_warp(int32_t sync, int32_t* out) {
  return text(one_block(sync != 0 ? rotate_in_warp<true> : rotate_in_warp<false>, 32, out));
}
PROBE probe_diverging_barriers() { return text(one_block(diverging_barriers, 64)); }
PROBE probe_shuffle_without_a_lane(int32_t* out) {
  return text(one_block(shuffle_without_a_lane, 32, out));
}
PROBE probe_early_return(int32_t* out) { return text(one_block(early_return, 32, out)); }
PROBE probe_count_blocks(int32_t* out) {
  return text(launch("probe", count_blocks, {dim3(8), dim3(1)}, nullptr, out));
}
PROBE probe_unwritten(float* out) {
  return text(launch("probe", unwritten, {dim3(2), dim3(1), 64}, nullptr, out));
}
PROBE probe_warp_operations(int32_t* out) { return text(one_block(warp_operations, 32, out)); }
PROBE probe_places(int32_t* out) {
  return text(launch("probe", places, {dim3(2, 3, 2), dim3(2, 3, 4)}, nullptr, out));
}
PROBE probe_halves(const float* in, float* out, int32_t count) {
  return text(one_block(round_halves, 32, in, out, count));
}
PROBE probe_astray(int32_t which) { return text(one_block(astray, 32, which)); }
PROBE probe_launch(int32_t grid_y, int32_t threads, int64_t shared_bytes) {
  const dim3 grid(1, static_cast<unsigned>(grid_y)), block(static_cast<unsigned>(threads));
  return text(
      launch("probe", astray, {grid, block, static_cast<size_t>(shared_bytes)}, nullptr, -1));
}
