// The subset of CUDA C++ that the kernels use, on the CPU: in a build with VSSM_CUDA_EMULATION,
// cuda/common.cuh takes this file in place of CUDA's headers.
//
// The blocks of a launch run one after the other, and the threads of a block one at a time, each
// until it has to wait for others, in an order drawn from a seed. So a missing barrier, a shuffle
// that not all lanes reach, memory read before it is written show as wrong results or errors.
// What does not show: timing, and accesses that go wrong only where two threads run at once.
#ifndef VSSM_PLUGINS_KERNELS_CUDA_EMULATION_H_
#define VSSM_PLUGINS_KERNELS_CUDA_EMULATION_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "plugins/emulation/half.h"
#include "plugins/kernels/types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

using cudaStream_t = void*;  // a launch has run when it returns

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Of the thread that runs now.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace vssm::emulation {

/// What a lane waits for in its warp; all lanes of a mask must ask for the same.
enum class WarpOperation { kSync, kShuffle, kBallot };

/// Waits until all threads of the block that have not returned are here. `line` is where: two
/// barriers in the source are never one.
void wait_for_block(int line);
/// Gives `value` to the lanes of `mask` and takes that of `source` (kShuffle), or one bit a lane.
/// A lane outside the mask, or one that has returned, gives all bits set.
uint64_t exchange(WarpOperation operation, uint32_t mask, uint64_t value, int source);
/// The launch's dynamic shared memory, poisoned at the start of each block.
void* dynamic_shared_memory();
/// Poisons static shared memory where a block first meets it.
void meet_shared_memory(void* memory, size_t bytes);

/// Lane of the running thread.
inline int lane() {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  return static_cast<int>(thread % 32);
}

template <typename T>
T shuffle(uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move up to eight bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(WarpOperation::kShuffle, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  void (*thread)(void* argument);  // one thread's work
  void* argument;
};

/// Runs a launch from its first block to its last.
Status run(const char* name, const Launch& launch);

/// What the emulated device has; an H100's figures unless vssm_emulation_set_device changed them.
struct Device {
  int sm_count = 132;
  int shared_bytes = 227 << 10;  // that a block may ask for
};
Device device();

}  // namespace vssm::emulation

inline void __syncthreads(int line = __builtin_LINE()) { vssm::emulation::wait_for_block(line); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFU) {
  vssm::emulation::exchange(vssm::emulation::WarpOperation::kSync, mask, 0, 0);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(vssm::emulation::exchange(vssm::emulation::WarpOperation::kBallot,
                                                         mask, predicate != 0 ? 1 : 0, 0));
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate == 0 ? 1 : 0) == 0;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int base = vssm::emulation::lane() & ~(width - 1);
  return vssm::emulation::shuffle(mask, value, base + (source & (width - 1)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = vssm::emulation::lane();
  const int source = lane - static_cast<int>(delta);
  return vssm::emulation::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = vssm::emulation::lane();
  const int source = lane + static_cast<int>(delta);
  return vssm::emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = vssm::emulation::lane();
  const int source = lane ^ lanes;
  return vssm::emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename To, typename From>
To vssm_bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __float_as_uint(float x) { return vssm_bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return vssm_bits_as<float>(x); }
inline int __float_as_int(float x) { return vssm_bits_as<int>(x); }
inline float __int_as_float(int x) { return vssm_bits_as<float>(x); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
/// Threads never run at once: a plain sum is an atomic one.
template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

#endif  // VSSM_PLUGINS_KERNELS_CUDA_EMULATION_H_
