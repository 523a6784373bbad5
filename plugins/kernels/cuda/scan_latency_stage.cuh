// The staging of the latency scan: from device memory to a tile in shared memory.
#ifndef VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_CUDA_LATENCY_STAGE_CUH_
#define VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_CUDA_LATENCY_STAGE_CUH_

#include "plugins/kernels/cuda/math.cuh"
#include "plugins/kernels/cuda/scan_latency.h"

namespace vssm {

/// What the threads of a block have in common.
struct LatencyBlock {
  __device__ __forceinline__ LatencyBlock(const ScanParams& p, const LatencyCut& cut, float* shared)
      : shared(shared),
        at(latency_layout(cut)),
        image(blockIdx.x / p.blocks_per_image),
        first_channel(static_cast<int>(blockIdx.x % p.blocks_per_image) * cut.channels),
        threads(static_cast<int>(blockDim.x)),
        thread(static_cast<int>(threadIdx.x)) {
    const int64_t size = int64_t{p.directions} * p.seqlen * cut.channels;
    partials = p.sums == nullptr ? shared + at.partials : p.sums + blockIdx.x * size;
  }

  __device__ __forceinline__ int32_t* tokens() const {
    return reinterpret_cast<int32_t*>(shared + at.tokens);
  }

  float* const shared;
  const LatencyLayout at;
  const int64_t image;
  const int first_channel, threads, thread;
  float* partials;  // (directions, seqlen, channels)
};

/// Each step and channel once, with all threads, kBatch at a time so that their loads overlap.
/// Steps behind the last one change no state and name no token.
template <typename T, int kWidth>
class LatencyStage {
 public:
  __device__ __forceinline__ LatencyStage(const ScanParams& p, const LatencyCut& cut,
                                          const LatencyBlock& block)
      : p_(p), cut_(cut), block_(block) {}

  __device__ __forceinline__ void steps(int set, int start, bool skip) const {
    const int count = cut_.steps * cut_.channels;
    const int directions = min(cut_.directions, p_.directions - set);
    for (int k = 0; k < directions; ++k) {
      for (int i = block_.thread; i < count; i += kBatch * block_.threads) {
        batch(set + k, k, start, i, skip);
      }
    }
  }

  __device__ __forceinline__ void rows(int set, int start, int first) const {
    constexpr int kPack = kWidth == 1 ? 1 : 4;
    constexpr int kPacks = kWidth / kPack;
    const int directions = min(cut_.directions, p_.directions - set);
    for (int k = 0; k < directions; ++k) {
      const int32_t* order =
          p_.order + block_.image * p_.order_image + int64_t{set + k} * p_.seqlen;
      const T* B = image_of<T>(p_.B, p_, block_.image, p_.B_token) + (set + k) * p_.B_direction;
      const T* C = image_of<T>(p_.C, p_, block_.image, p_.C_token) + (set + k) * p_.C_direction;
      float* target = block_.shared + block_.at.rows + k * cut_.steps * 2 * kWidth;
#pragma unroll 2
      for (int i = block_.thread; i < cut_.steps * kPacks; i += block_.threads) {
        const int t = start + i / kPacks;
        const int n = i % kPacks * kPack;
        const int32_t params = t >= p_.seqlen ? -1 : p_.by_step ? t : order[t];
        Pack<T, kPack> b = no_states<kPack, T>(), c = b;
        if (is_token(params, p_.seqlen)) {
          b = load_states<kPack>(B + int64_t{params} * p_.B_token, first + n, p_.d_state,
                                 p_.wide_B);
          c = load_states<kPack>(C + int64_t{params} * p_.C_token, first + n, p_.d_state,
                                 p_.wide_C);
        }
        float* row = target + i / kPacks * 2 * kWidth + n;
        *reinterpret_cast<Pack<float, kPack>*>(row) = to_floats(b);
        *reinterpret_cast<Pack<float, kPack>*>(row + kWidth) = to_floats(c);
      }
    }
  }

 private:
  __device__ __forceinline__ void batch(int direction, int slot, int start, int item,
                                        bool skip) const {
    const int64_t steps = int64_t{direction} * p_.seqlen;
    const int32_t* order = p_.order + block_.image * p_.order_image + steps;
    const int32_t* gap = p_.gap + block_.image * p_.gap_image + steps;
    const T* u = image_of<T>(p_.u, p_, block_.image, p_.u_token) + direction * p_.u_direction;
    const T* delta =
        image_of<T>(p_.delta, p_, block_.image, p_.delta_token) + direction * p_.delta_direction;
    int32_t token[kBatch];
    float extra[kBatch], x[kBatch], dt[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int t = start + step_of(item + j * block_.threads);
      const bool here = t < p_.seqlen && channel_of(item + j * block_.threads) < p_.d_inner;
      token[j] = here ? order[t] : -1;
      extra[j] = here ? extra_places(t, gap[t]) : 0.0F;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int t = start + step_of(item + j * block_.threads);
      const int channel = channel_of(item + j * block_.threads);
      const bool here = t < p_.seqlen && channel < p_.d_inner;
      const int32_t params = p_.by_step && here ? t : token[j];
      x[j] = is_token(token[j], p_.seqlen) ? to_float(u[int64_t{token[j]} * p_.u_token + channel])
                                           : 0.0F;
      dt[j] = is_token(params, p_.seqlen)
                  ? to_float(delta[int64_t{params} * p_.delta_token + channel])
                  : 0.0F;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = item + j * block_.threads;
      if (i >= cut_.steps * cut_.channels) break;
      const bool here = start + step_of(i) < p_.seqlen && channel_of(i) < p_.d_inner;
      store_step(direction, slot, i, here, token[j], extra[j], x[j], dt[j], skip);
    }
  }

  __device__ __forceinline__ void store_step(int direction, int slot, int item, bool here,
                                             int32_t token, float extra, float u, float delta,
                                             bool skip) const {
    const int channel = channel_of(item);
    const bool named = here && is_token(token, p_.seqlen);
    Pair pair = {};
    if (here) {
      const int64_t parameter = int64_t{direction} * p_.delta_direction + channel;
      float dt = delta + p_.delta_bias[parameter];
      if (p_.softplus) dt = softplus(dt);
      pair.v[0] = fmaf(extra, p_.delta0 != nullptr ? p_.delta0[parameter] : dt, dt);
      pair.v[1] = dt * u;
    }
    const int local = item & (cut_.channels - 1);
    auto* pairs = reinterpret_cast<Pair*>(block_.shared + block_.at.pairs);
    pairs[slot * cut_.steps * cut_.channels + item] = pair;
    if (local == 0) block_.tokens()[slot * cut_.steps + step_of(item)] = named ? token : -1;
    if (!named || !skip) return;
    const float D = p_.D[direction * int64_t{p_.D_direction} + channel];
    block_.partials[(int64_t{direction} * p_.seqlen + token) * cut_.channels + local] = D * u;
  }

  __device__ __forceinline__ int step_of(int item) const {
    return item >> (__ffs(cut_.channels) - 1);
  }
  __device__ __forceinline__ int channel_of(int item) const {
    return block_.first_channel + (item & (cut_.channels - 1));
  }

  static constexpr int kBatch = 4;
  using Pair = Pack<float, 2>;  // span, dt u

  const ScanParams& p_;
  const LatencyCut& cut_;
  const LatencyBlock& block_;
};

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_CUDA_LATENCY_STAGE_CUH_
