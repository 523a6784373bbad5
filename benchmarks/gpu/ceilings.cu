// What the card can do at the most, for gpu_check: libvssm_gpu_bench.so, called through ctypes.
#include <cuda_runtime_api.h>

#include <cstdint>

#define VSSM_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kThreads = 256;
constexpr int kChains = 8;  // independent, so that the unit's latency is hidden

__device__ float exp2_negated(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(-x));
  return y;
}

__global__ void __launch_bounds__(kThreads) ex2_rounds(float* sink, int32_t rounds) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  float x[kChains];
#pragma unroll
  for (int i = 0; i < kChains; ++i) x[i] = static_cast<float>(threadIdx.x + i) * 1e-3F;
  for (int32_t round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < kChains; ++i) x[i] = exp2_negated(x[i]);  // tends to 0.641: never special
  }
  float sum = 0.0F;
#pragma unroll
  for (int i = 0; i < kChains; ++i) sum += x[i];
  sink[thread] = sum;
}

__global__ void nothing() {}

int launched() { return static_cast<int>(cudaGetLastError()); }

}  // namespace

/// Evaluations of exp2 in a thread's round, and threads of a block, for who counts them.
VSSM_EXPORT int32_t vssm_gpu_ex2_per_block() { return kThreads * kChains; }
VSSM_EXPORT int32_t vssm_gpu_threads() { return kThreads; }

/// blocks * rounds * vssm_gpu_ex2_per_block() evaluations of ex2.approx.ftz.f32 on `stream`; `sink`
/// is device memory of blocks * vssm_gpu_threads() floats. Returns a cudaError_t.
VSSM_EXPORT int vssm_gpu_ex2(void* stream, float* sink, int32_t blocks, int32_t rounds) {
  ex2_rounds<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(sink, rounds);
  return launched();
}

/// An empty kernel on `stream`. Returns a cudaError_t.
VSSM_EXPORT int vssm_gpu_nothing(void* stream) {
  nothing<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>();
  return launched();
}
