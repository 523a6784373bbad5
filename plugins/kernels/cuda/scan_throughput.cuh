// The scan for many images: one thread a channel, its states in registers.
//
// A block takes up to kThroughputThreads channels of one image, one direction after the other, so
// that every sum over directions is a thread's own and needs no atomics. The rows of B and C are
// converted once for the block and read from shared memory as broadcasts; u, delta, z and the sums
// are loaded kSteps ahead, while the steps before them are computed.
//
// A step of 16 states issues about 160 instructions a warp on sm_90 (92 for the states: two
// products, the exp and two fused additions each, and the loads of B and C); its 17 to 19 exps and
// reciprocals keep the special-function unit busy for 136 to 152 cycles. Counted with nvdisasm, not
// measured.
#ifndef VSSM_PLUGINS_KERNELS_CUDA_SCAN_THROUGHPUT_CUH_
#define VSSM_PLUGINS_KERNELS_CUDA_SCAN_THROUGHPUT_CUH_

#include "plugins/kernels/cuda/math.cuh"

namespace vssm {

constexpr int kThroughputThreads = 128;

/// Sizes of a kernel for kStates states at once: 1, kStateGroup or kOneDecayGroup.
template <int kStates>
struct ThroughputCut {
  static constexpr int kPack = kStates == 1 ? 1 : 4;  // states that a thread stages
  static constexpr int kPacks = kStates / kPack;      // threads that stage a step
  static constexpr int kSteps =
      kStates == 1 ? 8 : 4;                 // loaded ahead: one state leaves less to hide
  static constexpr int kRow = 2 * kStates;  // B, then C
  /// Steps of a tile: each thread stages one pack of B and one of C.
  VSSM_HOST_DEVICE static int tile(int threads) { return threads / kPacks; }
  /// Floats of one of the two tiles: rows of B and C, and extra places.
  VSSM_HOST_DEVICE static int tile_floats(int threads) { return tile(threads) * (kRow + 1); }
};

/// One channel's thread. `kOneDecay`: all its states share one decay.
template <typename T, int kStates, bool kOneDecay>
class ThroughputScan {
 public:
  __device__ __forceinline__ ThroughputScan(const ScanParams& p, float* shared)
      : p_(p),
        shared_(shared),
        image_(blockIdx.x / p.blocks_per_image),
        threads_(static_cast<int>(blockDim.x)),
        thread_(static_cast<int>(threadIdx.x)) {
    const int channel = static_cast<int>(blockIdx.x % p.blocks_per_image) * threads_ + thread_;
    // A thread past the last channel computes the last one again, and writes nothing.
    writes_ = channel < p.d_inner;
    channel_ = writes_ ? channel : p.d_inner - 1;
    const int64_t row = image_ * p.seqlen * p.d_inner + channel_;
    y_ = settled(static_cast<T*>(p.y) + row);
    z_ = settled(static_cast<const T*>(p.z) + row);
    sums_ = settled(p.sums + row);
    u_stride_ = p.u_token * kSize;
    delta_stride_ = p.delta_token * kSize;
    y_stride_ = p.d_inner * kSize;
    sums_stride_ = p.d_inner * static_cast<int32_t>(sizeof(float));
  }

  /// The first pass writes the sums, the others add, the last one gates and writes y.
  __device__ __forceinline__ void run() {
    const int passes = p_.directions * p_.groups;
    for (int pass = 0; pass < passes; ++pass) {
      begin(pass / p_.groups, pass % p_.groups);
      scan(pass == 0, pass + 1 == passes);
    }
  }

 private:
  using Cut = ThroughputCut<kStates>;
  static constexpr int kPack = Cut::kPack;
  static constexpr int kSteps = Cut::kSteps;
  static constexpr int32_t kSize = static_cast<int32_t>(sizeof(T));

  /// Enters a direction and a group of states: pointers, A, and states of zero.
  __device__ __forceinline__ void begin(int direction, int group) {
    const int first = group * kStates;
    count_ = min(kStates, p_.d_state - first);
    u_ = settled(image_of<T>(p_.u, image_, p_.u_image) + direction * p_.u_direction + channel_);
    delta_ = settled(image_of<T>(p_.delta, image_, p_.delta_image) +
                     direction * p_.delta_direction + channel_);
    B_ = image_of<T>(p_.B, image_, p_.B_image) + direction * p_.B_direction + first;
    C_ = image_of<T>(p_.C, image_, p_.C_image) + direction * p_.C_direction + first;
    const int64_t steps = int64_t{direction} * p_.seqlen;
    order_ = settled(p_.order + image_ * p_.order_image + steps);
    gap_ = p_.gap + image_ * p_.gap_image + steps;
    const int64_t parameter = int64_t{direction} * p_.bias_direction + channel_;
    bias_ = p_.delta_bias[parameter];
    delta0_ = p_.delta0 == nullptr ? 0.0F : p_.delta0[parameter];
    skip_ = group == 0 ? p_.D[int64_t{direction} * p_.D_direction + channel_] : 0.0F;
    load_A(p_.A + direction * p_.A_direction + int64_t{channel_} * p_.A_channel, first);
#pragma unroll
    for (int n = 0; n < kStates; ++n) h_[n] = 0.0F;
  }

  __device__ __forceinline__ void load_A(const float* A, int first) {
    if constexpr (kOneDecay) {
      A_[0] = A[0] * kLog2E;
    } else {
#pragma unroll
      for (int n = 0; n < kStates; n += kPack) {
        const Pack<float, kPack> row = load_states<kPack>(A + first, n, count_, p_.wide_A);
#pragma unroll
        for (int i = 0; i < kPack; ++i) A_[n + i] = row.v[i] * kLog2E;
      }
    }
  }

  __device__ __forceinline__ void scan(bool first, bool last) {
    first_ = first;
    last_ = last;
    gates_ = last && p_.z != nullptr;
    staged_token_ = token_to_stage(0);
    stage_load(0);
    load_tokens(0);
    load(0);
    stage_store();
    __syncthreads();
    const int tile = Cut::tile(threads_);
    for (int start = 0; start < p_.seqlen; start += tile) {
      const bool more = start + tile < p_.seqlen;
      if (more) stage_load(start + tile);
      const int end = min(start + tile, p_.seqlen);
      for (int t = start; t < end; t += kSteps) group(t, t - start, end - t);
      // The other tile was last read before the barrier that every thread has passed since.
      buffer_ ^= 1;
      if (!more) break;
      stage_store();
      __syncthreads();
    }
  }

  // Staging: thread i takes pack i % kPacks of step i / kPacks.

  __device__ __forceinline__ int32_t token_to_stage(int start) const {
    const int t = start + thread_ / Cut::kPacks;
    return t < p_.seqlen ? order_[t] : -1;
  }

  __device__ __forceinline__ void stage_load(int start) {
    const int t = start + thread_ / Cut::kPacks;
    const int n = thread_ % Cut::kPacks * kPack;
    const int32_t token = p_.by_step ? t : staged_token_;
    staged_B_ = staged_C_ = no_states<kPack, T>();
    staged_extra_ = 0.0F;
    if (t < p_.seqlen) staged_extra_ = extra_places(t, gap_[t]);
    if (is_token(token, p_.seqlen)) {
      staged_B_ = load_states<kPack>(B_ + int64_t{token} * p_.B_token, n, count_, p_.wide_B);
      staged_C_ = load_states<kPack>(C_ + int64_t{token} * p_.C_token, n, count_, p_.wide_C);
    }
    staged_token_ = token_to_stage(start + Cut::tile(threads_));  // of the next tile
  }

  __device__ __forceinline__ void stage_store() {
    const int step = thread_ / Cut::kPacks;
    float* row = tile() + step * Cut::kRow + thread_ % Cut::kPacks * kPack;
    *reinterpret_cast<Pack<float, kPack>*>(row) = to_floats(staged_B_);
    *reinterpret_cast<Pack<float, kPack>*>(row + kStates) = to_floats(staged_C_);
    if (thread_ % Cut::kPacks == 0) extras()[step] = staged_extra_;
  }

  __device__ __forceinline__ float* tile() const {
    return shared_ + buffer_ * Cut::tile_floats(threads_);
  }
  __device__ __forceinline__ float* extras() const {
    return tile() + Cut::tile(threads_) * Cut::kRow;
  }

  // Loads ahead.

  __device__ __forceinline__ void load_tokens(int t) {
    const int32_t* order = order_ + t;
    if (t + kSteps <= p_.seqlen) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) next_token_[j] = order[j];
    } else {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) next_token_[j] = t + j < p_.seqlen ? order[j] : -1;
    }
  }

  /// The steps from t, whose tokens are here; then the tokens of the steps behind them.
  __device__ __forceinline__ void load(int t) {
    const T zero = from_float<T>(0.0F);
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int32_t token = next_token_[j];
      const bool here = is_token(token, p_.seqlen);
      token_[j] = here ? token : -1;
      u_raw_[j] = here ? *row_at(u_, token, u_stride_) : zero;
      const int32_t params = p_.by_step ? t + j : token;
      const bool known = is_token(params, p_.seqlen);
      delta_raw_[j] = known ? *row_at(delta_, params, delta_stride_) : zero;
      sum_[j] = 0.0F;
      if (here && !first_) sum_[j] = *row_at(sums_, token, sums_stride_);
      if (here && gates_) z_raw_[j] = *row_at(z_, token, y_stride_);
    }
    load_tokens(t + kSteps);
  }

  /// The steps from t on, `left` at most; `row` is the first one's place in the tile. What was
  /// loaded is used up before the next loads, so that they need no other registers.
  __device__ __forceinline__ void group(int t, int row, int left) {
    const float* extra = extras() + row;
    float dt[kSteps], span[kSteps], inject[kSteps], y[kSteps], gate[kSteps];
    int32_t token[kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      dt[j] = to_float(delta_raw_[j]) + bias_;
      gate[j] = p_.scale;
      token[j] = token_[j];
    }
    if (p_.softplus) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) dt[j] = softplus(dt[j]);
    }
    if (gates_) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) gate[j] *= silu(to_float(z_raw_[j]));
    }
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float u = to_float(u_raw_[j]);
      // Behind the last step there are rows of the tile without meaning: they are not used.
      span[j] = fmaf(extra[j], p_.delta0 != nullptr ? delta0_ : dt[j], dt[j]);
      inject[j] = dt[j] * u;
      y[j] = fmaf(skip_, u, sum_[j]);
    }
    load(t + kSteps);
    const float* states = tile() + row * Cut::kRow;
    if (left >= kSteps) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        finish(token[j], gate[j], step(states + j * Cut::kRow, span[j], inject[j], y[j]));
      }
    } else {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        if (j >= left) break;
        finish(token[j], gate[j], step(states + j * Cut::kRow, span[j], inject[j], y[j]));
      }
    }
  }

  /// h = exp2(span A) h + inject B; returns y + C h.
  __device__ __forceinline__ float step(const float* row, float span, float inject, float y) {
    float odd = 0.0F;  // a second sum shortens the chain of additions
    const float shared = kOneDecay ? exp2_approx(span * A_[0]) : 0.0F;
#pragma unroll
    for (int n = 0; n < kStates; n += kPack) {
      const auto B = *reinterpret_cast<const Pack<float, kPack>*>(row + n);
      const auto C = *reinterpret_cast<const Pack<float, kPack>*>(row + kStates + n);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const float decay = kOneDecay ? shared : exp2_approx(span * A_[kOneDecay ? 0 : n + i]);
        h_[n + i] = fmaf(decay, h_[n + i], inject * B.v[i]);
        float& sum = i % 2 == 0 ? y : odd;
        sum = fmaf(C.v[i], h_[n + i], sum);
      }
    }
    return kStates == 1 ? y : y + odd;
  }

  __device__ __forceinline__ void finish(int32_t token, float gate, float y) {
    if (token < 0 || !writes_) return;
    if (last_) {
      *row_at(y_, token, y_stride_) = from_float<T>(y * gate);
    } else {
      *row_at(sums_, token, sums_stride_) = y;
    }
  }

  const ScanParams& p_;
  float* const shared_;
  const int64_t image_;
  const int threads_, thread_;
  int channel_, count_ = 0, buffer_ = 0;
  bool writes_, first_ = false, last_ = false, gates_ = false;
  const T *u_ = nullptr, *delta_ = nullptr, *B_ = nullptr, *C_ = nullptr, *z_;
  const int32_t *order_ = nullptr, *gap_ = nullptr;
  T* y_;
  float* sums_;
  int32_t u_stride_, delta_stride_, y_stride_, sums_stride_;  // bytes
  float bias_ = 0.0F, delta0_ = 0.0F, skip_ = 0.0F, staged_extra_ = 0.0F;
  int32_t staged_token_ = -1;
  Pack<T, kPack> staged_B_, staged_C_;
  int32_t next_token_[kSteps];
  // Of the steps ahead, as they lie in memory.
  T u_raw_[kSteps], delta_raw_[kSteps], z_raw_[kSteps];
  float sum_[kSteps];
  int32_t token_[kSteps];
  float A_[kOneDecay ? 1 : kStates], h_[kStates];
};

// Three blocks a multiprocessor leave a thread 168 registers, enough for h, A and the loads ahead
// without spills; each of 12 warps has 16 independent exps in flight. One state waits for memory,
// not for warps.
template <typename T, int kStates, bool kOneDecay>
__global__ void __launch_bounds__(kThroughputThreads, kStates == 1 ? 2 : 3)
    selective_scan_throughput(const __grid_constant__ ScanParams p) {
  ThroughputScan<T, kStates, kOneDecay>(p, dynamic_shared_memory<float>()).run();
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CUDA_SCAN_THROUGHPUT_CUH_
