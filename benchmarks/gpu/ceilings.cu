// What the card can do at the most, for gpu_check: libvssm_gpu_bench.so, called through ctypes.
#include <cstdint>

#include "plugins/kernels/cuda/common.cuh"

#define VSSM_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kThreads = 256;
constexpr int kChains = 8;  // independent, so that the unit's latency is hidden

__global__ void __launch_bounds__(kThreads) ex2_rounds(float* sink, int32_t rounds) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  float x[kChains];
#pragma unroll
  for (int i = 0; i < kChains; ++i) x[i] = static_cast<float>(threadIdx.x + i) * 1e-3F;
  for (int32_t round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < kChains; ++i) x[i] = vssm::exp2_approx(-x[i]);  // tends to 0.641
  }
  float sum = 0.0F;
#pragma unroll
  for (int i = 0; i < kChains; ++i) sum += x[i];
  sink[thread] = sum;
}

__global__ void nothing() {}

template <typename... Parameters, typename... Arguments>
int enqueue(void* stream, void (*kernel)(Parameters...), int32_t blocks, int32_t threads,
            const Arguments&... arguments) {
  const vssm::LaunchShape shape{dim3(blocks), dim3(threads)};
  const auto to = static_cast<cudaStream_t>(stream);
  return vssm::launch("gpu_check", kernel, shape, to, arguments...).ok() ? 0 : 1;
}

}  // namespace

/// Evaluations of exp2 in a thread's round, and threads of a block, for who counts them.
VSSM_EXPORT int32_t vssm_gpu_ex2_per_block() { return kThreads * kChains; }
VSSM_EXPORT int32_t vssm_gpu_threads() { return kThreads; }

/// blocks * rounds * vssm_gpu_ex2_per_block() evaluations of ex2.approx.ftz.f32 on `stream`; `sink`
/// is device memory of blocks * vssm_gpu_threads() floats. Returns 0, or 1 where the launch failed.
VSSM_EXPORT int vssm_gpu_ex2(void* stream, float* sink, int32_t blocks, int32_t rounds) {
  return enqueue(stream, ex2_rounds, blocks, kThreads, sink, rounds);
}

/// An empty kernel on `stream`; returns likewise.
VSSM_EXPORT int vssm_gpu_nothing(void* stream) { return enqueue(stream, nothing, 1, 32); }
