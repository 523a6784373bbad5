// The scan for few images: several threads a channel, directions and chunks of the sequence at
// once, in one launch.
//
// A block stages a tile in shared memory: step sizes once for all states, B and C as float32. Each
// chunk is then scanned from a state of zero; its end, and its decay exp(A sum of spans), give
// every chunk its true first state; a second scan from there gives y. With one chunk the first scan
// falls away. Each direction has its own partial sums (token, channel), which are added in the
// order of the directions when all are done.
#ifndef VSSM_PLUGINS_KERNELS_CUDA_SCAN_LATENCY_CUH_
#define VSSM_PLUGINS_KERNELS_CUDA_SCAN_LATENCY_CUH_

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
      const T* B = image_of<T>(p_.B, block_.image, p_.B_image) + (set + k) * p_.B_direction;
      const T* C = image_of<T>(p_.C, block_.image, p_.C_image) + (set + k) * p_.C_direction;
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
    const T* u = image_of<T>(p_.u, block_.image, p_.u_image) + direction * p_.u_direction;
    const T* delta =
        image_of<T>(p_.delta, block_.image, p_.delta_image) + direction * p_.delta_direction;
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
      const int64_t parameter = int64_t{direction} * p_.bias_direction + channel;
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

constexpr int kLatencyThreads = 512;

template <typename T, int kLanes, int kStates, bool kOneDecay>
class LatencyScan {
 public:
  __device__ __forceinline__ LatencyScan(const ScanParams& p, const LatencyCut& cut, float* shared)
      : p_(p), cut_(cut), block_(p, cut, shared), lane_(block_.thread % kLanes) {
    int rest = block_.thread / kLanes;
    channel_ = rest % cut.channels;
    rest /= cut.channels;
    chunk_ = rest % cut.chunks;
    direction_ = rest / cut.chunks;
  }

  __device__ __forceinline__ void run() {
    for (int set = 0; set < p_.directions; set += cut_.directions) {
      for (int group = 0; group < p_.groups; ++group) scan(set, group);
    }
    __syncthreads();
    finish();
  }

 private:
  static constexpr int kWidth = kLanes * kStates;
  static constexpr int kDecays = kOneDecay ? 1 : kStates;
  using Pair = Pack<float, 2>;  // span, dt u
  using States = Pack<float, kStates>;

  /// The decays of a thread's states over a span.
  struct Decays {
    float v[kDecays];
    __device__ __forceinline__ Decays(float span, const float* A) {
#pragma unroll
      for (int i = 0; i < kDecays; ++i) v[i] = exp2_approx(span * A[i]);
    }
    __device__ __forceinline__ float of(int i) const { return v[kOneDecay ? 0 : i]; }
  };

  /// A set of directions over one group of states, tile by tile.
  __device__ __forceinline__ void scan(int set, int group) {
    enter(set, group);
    const LatencyStage<T, kWidth> stage(p_, cut_, block_);
    int parity = 0;
    for (int start = 0; start < p_.seqlen; start += cut_.steps) {
      __syncthreads();  // the tile before has been read
      if (start == 0 && works_ && chunk_ == 0) *carry(0) = States{};
      stage.steps(set, start, group == 0);
      stage.rows(set, start, group * kWidth);
      __syncthreads();
      scan_tile(min(cut_.steps, p_.seqlen - start), parity);
      parity ^= 1;
    }
  }

  /// A of this thread's states; a thread without work has decays of one, and writes nothing.
  __device__ __forceinline__ void enter(int set, int group) {
    const int channel = block_.first_channel + channel_;
    works_ = direction_ < min(cut_.directions, p_.directions - set) && channel < p_.d_inner;
    slot_ = works_ ? direction_ : 0;
    partial_ = block_.partials + int64_t{set + slot_} * p_.seqlen * cut_.channels + channel_;
    const int first = group * kWidth + lane_ * kStates;
    const float* A = p_.A + (set + slot_) * p_.A_direction + int64_t{channel} * p_.A_channel;
#pragma unroll
    for (int i = 0; i < kDecays; ++i) {
      const int n = kOneDecay ? 0 : first + i;
      A_[i] = works_ && n < p_.A_channel ? A[n] * kLog2E : 0.0F;
    }
  }

  __device__ __forceinline__ States* carry(int parity) const {
    const int row = (parity * cut_.directions + slot_) * cut_.channels + channel_;
    return reinterpret_cast<States*>(block_.shared + block_.at.carry + row * kWidth +
                                     lane_ * kStates);
  }
  __device__ __forceinline__ States* end_of(int chunk) const {
    const int row = (slot_ * cut_.chunks + chunk) * cut_.channels + channel_;
    return reinterpret_cast<States*>(block_.shared + block_.at.ends + row * kWidth +
                                     lane_ * kStates);
  }
  __device__ __forceinline__ float* span_of(int chunk) const {
    const int row = (slot_ * cut_.chunks + chunk) * cut_.channels + channel_;
    return block_.shared + block_.at.spans + row;
  }

  /// The staged steps, `count` of which are; the state at their start is the carry of `parity`.
  __device__ __forceinline__ void scan_tile(int count, int parity) {
    if (cut_.chunks > 1) {
#pragma unroll
      for (int i = 0; i < kStates; ++i) h_[i] = 0.0F;
      const float total = run_chunk<false>(count);
      if (works_) {
        store(end_of(chunk_));
        if (lane_ == 0) *span_of(chunk_) = total;
      }
      __syncthreads();
    }
    const States before = works_ ? *carry(parity) : States{};
#pragma unroll
    for (int i = 0; i < kStates; ++i) h_[i] = before.v[i];
    for (int chunk = 0; chunk < chunk_ && works_; ++chunk) {
      const float span = *span_of(chunk);
      const States end = *end_of(chunk);
      const Decays decay(span, A_);
#pragma unroll
      for (int i = 0; i < kStates; ++i) h_[i] = fmaf(decay.of(i), h_[i], end.v[i]);
    }
    run_chunk<true>(count);
    if (works_ && chunk_ == cut_.chunks - 1) store(carry(parity ^ 1));
  }

  __device__ __forceinline__ void store(States* place) const {
    States h;
#pragma unroll
    for (int i = 0; i < kStates; ++i) h.v[i] = h_[i];
    *place = h;
  }

  /// This thread's chunk from h_, which becomes the state behind it. Adds y to the partial sums,
  /// or returns the sum of the spans.
  template <bool kOutput>
  __device__ __forceinline__ float run_chunk(int count) {
    const int channels = cut_.channels;
    const int first = slot_ * cut_.steps + chunk_ % cut_.chunks * cut_.chunk;
    const int left = works_ ? count - chunk_ * cut_.chunk : 0;
    const auto* pair = reinterpret_cast<const Pair*>(block_.shared + block_.at.pairs) +
                       first * channels + channel_;
    const float* row = block_.shared + block_.at.rows + first * 2 * kWidth + lane_ * kStates;
    const int32_t* token = block_.tokens() + first;
    float total = 0.0F;
    for (int t = 0; t < cut_.chunk; t += kLatencySteps) {
      // All lanes of a warp go on together: the sums below need them all.
      if (!__any_sync(0xFFFFFFFFU, t < left)) break;
      float y[kLatencySteps];
#pragma unroll
      for (int j = 0; j < kLatencySteps; ++j) {
        const Pair step = *pair;
        y[j] = advance<kOutput>(step, row);
        if (!kOutput) total += step.v[0];
        pair += channels;
        row += 2 * kWidth;
      }
      if (kOutput) add(y, token + t);
    }
    return total;
  }

  /// h = exp2(span A) h + dt u B; returns C h over this thread's states.
  template <bool kOutput>
  __device__ __forceinline__ float advance(const Pair& step, const float* row) {
    const States B = *reinterpret_cast<const States*>(row);
    const Decays decay(step.v[0], A_);
    float y = 0.0F;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      h_[i] = fmaf(decay.of(i), h_[i], step.v[1] * B.v[i]);
    }
    if (kOutput) {
      const States C = *reinterpret_cast<const States*>(row + kWidth);
#pragma unroll
      for (int i = 0; i < kStates; ++i) y = fmaf(C.v[i], h_[i], y);
    }
    return y;
  }

  /// Sums y of kLatencySteps steps over the lanes. With four lanes each ends with the sum of one
  /// step: three shuffles for four sums.
  __device__ __forceinline__ void add(const float* y, const int32_t* token) {
    static_assert(kLanes == 1 || kLanes == kLatencySteps, "each lane adds one step, or all");
    if constexpr (kLanes == 1) {
#pragma unroll
      for (int j = 0; j < kLatencySteps; ++j) add_to(token[j], y[j]);
    } else {
      const bool high = (lane_ & 2) != 0, odd = (lane_ & 1) != 0;
      const float first =
          (high ? y[2] : y[0]) + __shfl_xor_sync(0xFFFFFFFFU, high ? y[0] : y[2], 2);
      const float second =
          (high ? y[3] : y[1]) + __shfl_xor_sync(0xFFFFFFFFU, high ? y[1] : y[3], 2);
      const float sum =
          (odd ? second : first) + __shfl_xor_sync(0xFFFFFFFFU, odd ? first : second, 1);
      add_to(token[lane_], sum);
    }
  }

  __device__ __forceinline__ void add_to(int32_t token, float y) {
    if (works_ && token >= 0) partial_[int64_t{token} * cut_.channels] += y;
  }

  /// From the partial sums to y.
  __device__ __forceinline__ void finish() const {
    const int64_t stride = int64_t{p_.seqlen} * cut_.channels;
    const int64_t first = block_.image * p_.seqlen * p_.d_inner;
    for (int64_t i = block_.thread; i < stride; i += block_.threads) {
      const int channel = block_.first_channel + static_cast<int>(i & (cut_.channels - 1));
      if (channel >= p_.d_inner) continue;
      const int64_t at = first + (i >> (__ffs(cut_.channels) - 1)) * p_.d_inner + channel;
      float y = 0.0F;
      for (int k = 0; k < p_.directions; ++k) y += block_.partials[k * stride + i];
      y *= p_.scale;
      if (p_.z != nullptr) y *= silu(to_float(static_cast<const T*>(p_.z)[at]));
      static_cast<T*>(p_.y)[at] = from_float<T>(y);
    }
  }

  const ScanParams& p_;
  const LatencyCut& cut_;
  const LatencyBlock block_;
  const int lane_;
  int channel_, chunk_, direction_, slot_ = 0;  // slot_: direction_ where it has work
  bool works_ = false;
  float* partial_ = nullptr;  // of this thread's direction and channel
  float A_[kDecays], h_[kStates];
};

// One block a multiprocessor is all that is asked for: at 64 registers a thread the compiler
// spills.
template <typename T, int kLanes, int kStates, bool kOneDecay>
__global__ void __launch_bounds__(kLatencyThreads, 1)
    selective_scan_latency(const __grid_constant__ ScanParams p,
                           const __grid_constant__ LatencyCut cut) {
  LatencyScan<T, kLanes, kStates, kOneDecay>(p, cut, dynamic_shared_memory<float>()).run();
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CUDA_SCAN_LATENCY_CUH_
