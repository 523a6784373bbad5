// The scan for many images where four directions share step sizes, A and C, as PlainMamba's do: one
// thread a channel takes them at once, so that one exp serves four states.
//
// At a step the directions visit four tokens. Where their gaps agree (dense: all 1) they share the
// decays as they are; where not, a gap of 1 to 3 costs products of the shared exp, and a larger one
// its own. Gaps are the same for all channels, so that no warp divides. The sums over directions
// lie in shared memory if a block's tokens fit, else in device memory; either way each is a
// thread's own, added to in the order of the directions.
#ifndef VSSM_PLUGINS_KERNELS_CUDA_SCAN_TOGETHER_CUH_
#define VSSM_PLUGINS_KERNELS_CUDA_SCAN_TOGETHER_CUH_

#include "plugins/kernels/cuda/math.cuh"

namespace vssm {

// Small blocks: what limits their number is the shared memory of the sums, 4 bytes a token and
// channel.
constexpr int kTogetherThreads = 64;

struct TogetherCut {
  static constexpr int kPack = 4;                             // states that a thread stages
  static constexpr int kPacks = kStateGroup / kPack;          // threads that stage a step
  static constexpr int kRow = (kTogether + 1) * kStateGroup;  // B of each direction, then C
  VSSM_HOST_DEVICE static int tile(int threads) { return threads / kPacks; }
  /// Floats of one of the two tiles: rows, then extra places of each direction.
  VSSM_HOST_DEVICE static int tile_floats(int threads) {
    return tile(threads) * (kRow + kTogether);
  }
};

/// Thread i takes pack i % kPacks of step i / kPacks, which is the token, too. What load() has read
/// is put into the tile by store(), so that its latency passes behind a tile's computation.
template <typename T>
class TogetherStage {
 public:
  __device__ __forceinline__ TogetherStage(const ScanParams& p, int64_t image, float* shared)
      : p_(p),
        shared_(shared),
        gap_(p.gap + image * p.gap_image),
        image_(image),
        threads_(static_cast<int>(blockDim.x)),
        thread_(static_cast<int>(threadIdx.x)) {}

  /// Enters a group of states.
  __device__ __forceinline__ void begin(int first) {
    count_ = min(kStateGroup, p_.d_state - first);
    B_ = image_of<T>(p_.B, image_, p_.B_image) + first;
    C_ = image_of<T>(p_.C, image_, p_.C_image) + first;
  }

  __device__ __forceinline__ void load(int start) {
    const int t = start + thread_ / Cut::kPacks;
    const int n = thread_ % Cut::kPacks * kPack;
    const bool here = t < p_.seqlen;
    staged_C_ = here ? load_states<kPack>(C_ + int64_t{t} * p_.C_token, n, count_, p_.wide_C)
                     : no_states<kPack, T>();
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const T* row = B_ + int64_t{t} * p_.B_token + k * p_.B_direction;
      staged_B_[k] = here ? load_states<kPack>(row, n, count_, p_.wide_B) : no_states<kPack, T>();
    }
    // The kPacks threads of a step are as many as the directions: one gap each.
    const int k = thread_ % Cut::kPacks;
    extra_ = here ? extra_places(t, gap_[int64_t{k} * p_.seqlen + t]) : 0.0F;
  }

  __device__ __forceinline__ void store() {
    static_assert(Cut::kPacks == kTogether, "each thread of a step stages one gap");
    const int step = thread_ / Cut::kPacks;
    float* row = tile() + step * Cut::kRow + thread_ % Cut::kPacks * kPack;
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      *reinterpret_cast<Pack<float, kPack>*>(row + k * kStateGroup) = to_floats(staged_B_[k]);
    }
    *reinterpret_cast<Pack<float, kPack>*>(row + kTogether * kStateGroup) = to_floats(staged_C_);
    extras()[thread_] = extra_;
  }

  /// The other tile becomes the current one: it was last read before the barrier that every thread
  /// has passed since.
  __device__ __forceinline__ void turn() { buffer_ ^= 1; }

  /// Of the current tile: (steps, kRow), and (steps, kTogether).
  __device__ __forceinline__ float* tile() const {
    return shared_ + buffer_ * Cut::tile_floats(threads_);
  }
  __device__ __forceinline__ float* extras() const {
    return tile() + Cut::tile(threads_) * Cut::kRow;
  }

 private:
  using Cut = TogetherCut;
  static constexpr int kPack = Cut::kPack;

  const ScanParams& p_;
  float* const shared_;
  const int32_t* const gap_;
  const int64_t image_;
  const int threads_, thread_;
  int count_ = 0, buffer_ = 0;
  const T *B_ = nullptr, *C_ = nullptr;
  Pack<T, kPack> staged_B_[kTogether], staged_C_;
  float extra_ = 0.0F;
};

template <typename T>
class TogetherScan {
 public:
  __device__ __forceinline__ TogetherScan(const ScanParams& p, float* shared)
      : p_(p),
        image_(blockIdx.x / p.blocks_per_image),
        threads_(static_cast<int>(blockDim.x)),
        stage_(p, image_, shared) {
    const int thread = static_cast<int>(threadIdx.x);
    const int channel = static_cast<int>(blockIdx.x % p.blocks_per_image) * threads_ + thread;
    // A thread past the last channel computes the last one again, and writes nothing outside.
    writes_ = channel < p.d_inner;
    channel_ = writes_ ? channel : p.d_inner - 1;
    const int64_t row = image_ * p.seqlen * p.d_inner + channel_;
    y_ = settled(static_cast<T*>(p.y) + row);
    if (p.z != nullptr) z_ = static_cast<const T*>(p.z) + row;
    const bool in_shared = p.sums == nullptr;
    sums_ = in_shared ? shared + 2 * TogetherCut::tile_floats(threads_) + thread : p.sums + row;
    sums_stride_ = (in_shared ? threads_ : p.d_inner) * static_cast<int32_t>(sizeof(float));
    u_stride_ = p.u_token * kSize;
    delta_stride_ = p.delta_token * kSize;
    adds_ = in_shared || writes_;
    order_ = settled(p.order + image_ * p.order_image);
    delta_ = settled(image_of<T>(p.delta, image_, p.delta_image) + channel_);
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const T* u = image_of<T>(p.u, image_, p.u_image) + k * p.u_direction;
      u_[k] = settled(u + channel_);
    }
    bias_ = p.delta_bias[channel_];
    delta0_ = p.delta0 == nullptr ? 0.0F : p.delta0[channel_];
  }

  __device__ __forceinline__ void run() {
    for (int t = 0; t < p_.seqlen && adds_; ++t) *row_at(sums_, t, sums_stride_) = 0.0F;
    for (int group = 0; group < p_.groups; ++group) {
      begin(group);
      scan();
    }
    if (writes_) convert();
  }

 private:
  using Cut = TogetherCut;
  static constexpr int kPack = Cut::kPack;
  static constexpr int32_t kSize = static_cast<int32_t>(sizeof(T));

  /// What a step needs from memory.
  struct Loaded {
    T u[kTogether], delta;
    int32_t token[kTogether];
  };

  /// What the directions do at a step.
  struct Now {
    float inject[kTogether], y[kTogether], before[kTogether];
    int32_t token[kTogether];
  };

  __device__ __forceinline__ void begin(int group) {
    const int first = group * kStateGroup;
    const int count = min(kStateGroup, p_.d_state - first);
    stage_.begin(first);
    const float* A = p_.A + int64_t{channel_} * p_.A_channel + first;
#pragma unroll
    for (int n = 0; n < kStateGroup; n += kPack) {
      const Pack<float, kPack> row = load_states<kPack>(A, n, count, p_.wide_A);
#pragma unroll
      for (int i = 0; i < kPack; ++i) A_[n + i] = row.v[i] * kLog2E;
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      skip_[k] = group == 0 ? p_.D[k * int64_t{p_.D_direction} + channel_] : 0.0F;
#pragma unroll
      for (int n = 0; n < kStateGroup; ++n) h_[k][n] = 0.0F;
    }
  }

  __device__ __forceinline__ void scan() {
    stage_.load(0);
    load_tokens(0);
    near_ = load(0);
    far_ = load(1);
    stage_.store();
    __syncthreads();
    const int tile = Cut::tile(threads_);
    for (int start = 0; start < p_.seqlen; start += tile) {
      const bool more = start + tile < p_.seqlen;
      if (more) stage_.load(start + tile);
      const int end = min(start + tile, p_.seqlen);
      for (int t = start; t < end; ++t) step(t, t - start);
      stage_.turn();
      if (!more) break;
      stage_.store();
      __syncthreads();
    }
  }

  // Loads ahead: two steps, and their tokens a step before them.

  __device__ __forceinline__ void load_tokens(int t) {
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      next_token_[k] = t < p_.seqlen ? order_[int64_t{k} * p_.seqlen + t] : -1;
    }
  }

  __device__ __forceinline__ Loaded load(int t) {
    Loaded loaded;
    const T zero = from_float<T>(0.0F);
    loaded.delta = t < p_.seqlen ? *row_at(delta_, t, delta_stride_) : zero;
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int32_t token = next_token_[k];
      const bool here = is_token(token, p_.seqlen);
      loaded.token[k] = here ? token : -1;
      loaded.u[k] = here ? *row_at(u_[k], token, u_stride_) : zero;
    }
    load_tokens(t + 1);
    return loaded;
  }

  __device__ __forceinline__ void step(int t, int row) {
    float dt = to_float(near_.delta) + bias_;
    if (p_.softplus) dt = softplus(dt);
    Now now;
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const float u = to_float(near_.u[k]);
      now.inject[k] = dt * u;
      now.y[k] = skip_[k] * u;
      now.token[k] = near_.token[k];
    }
    near_ = far_;
    far_ = load(t + 2);
    const float per_place = p_.delta0 != nullptr ? delta0_ : dt;
    const auto extra =
        *reinterpret_cast<const Pack<float, kTogether>*>(stage_.extras() + row * kTogether);
    const float* states = stage_.tile() + row * Cut::kRow;
    const bool agree =
        extra.v[0] == extra.v[1] && extra.v[0] == extra.v[2] && extra.v[0] == extra.v[3];
    const float span = agree ? fmaf(extra.v[0], per_place, dt) : dt;
    float shared[kStateGroup];
#pragma unroll
    for (int n = 0; n < kStateGroup; ++n) shared[n] = exp2_approx(span * A_[n]);
    if (agree) {
      load_sums(&now);
      advance<0, kTogether>(shared, states, &now);
    } else {
      advance_apart<0>(extra, dt, per_place, shared, states, &now);
      load_sums(&now);  // late: two sets of decays leave no registers for sums
    }
    store_sums(now);
  }

  /// One direction after the other, each with its own decays.
  template <int k>
  __device__ __forceinline__ void advance_apart(const Pack<float, kTogether>& extra, float dt,
                                                float per_place, const float* shared,
                                                const float* states, Now* now) {
    float own[kStateGroup];
    decays_of(extra.v[k], dt, per_place, shared, own);
    advance<k, k + 1>(own, states, now);
    if constexpr (k + 1 < kTogether) {
      advance_apart<k + 1>(extra, dt, per_place, shared, states, now);
    }
  }

  /// The decays over 1 + extra places, where `shared` has those over one.
  __device__ __forceinline__ void decays_of(float extra, float dt, float per_place,
                                            const float* shared, float* own) const {
    const bool powers = p_.delta0 == nullptr;
    if (extra == 0.0F) {
#pragma unroll
      for (int n = 0; n < kStateGroup; ++n) own[n] = shared[n];
    } else if (powers && extra == 1.0F) {
#pragma unroll
      for (int n = 0; n < kStateGroup; ++n) own[n] = shared[n] * shared[n];
    } else if (powers && extra == 2.0F) {
#pragma unroll
      for (int n = 0; n < kStateGroup; ++n) own[n] = shared[n] * shared[n] * shared[n];
    } else {
      const float span = fmaf(extra, per_place, dt);
#pragma unroll
      for (int n = 0; n < kStateGroup; ++n) own[n] = exp2_approx(span * A_[n]);
    }
  }

  /// A step of directions kFrom to kTo - 1: h = decay h + inject B;  y += C h.
  template <int kFrom, int kTo>
  __device__ __forceinline__ void advance(const float* decay, const float* states, Now* now) {
    const float* C = states + kTogether * kStateGroup;
#pragma unroll
    for (int n = 0; n < kStateGroup; n += kPack) {
      const auto c = *reinterpret_cast<const Pack<float, kPack>*>(C + n);
#pragma unroll
      for (int k = kFrom; k < kTo; ++k) {
        const float* B = states + k * kStateGroup;
        const auto b = *reinterpret_cast<const Pack<float, kPack>*>(B + n);
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          h_[k][n + i] = fmaf(decay[n + i], h_[k][n + i], now->inject[k] * b.v[i]);
          now->y[k] = fmaf(c.v[i], h_[k][n + i], now->y[k]);
        }
      }
    }
  }

  /// The sums before this step.
  __device__ __forceinline__ void load_sums(Now* now) const {
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      now->before[k] = 0.0F;
      if (now->token[k] >= 0) now->before[k] = *row_at(sums_, now->token[k], sums_stride_);
    }
  }

  /// Directions may meet at a token: the later one's sum has the earlier one's y in it, too.
  __device__ __forceinline__ void store_sums(const Now& now) const {
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      float sum = now.before[k];
#pragma unroll
      for (int j = 0; j < k; ++j) {
        if (now.token[j] == now.token[k]) sum += now.y[j];
      }
      sum += now.y[k];
      if (now.token[k] >= 0 && adds_) *row_at(sums_, now.token[k], sums_stride_) = sum;
    }
  }

  /// From the sums to y: scales, gates, stores in its type.
  __device__ __forceinline__ void convert() const {
#pragma unroll 4
    for (int t = 0; t < p_.seqlen; ++t) {
      float y = *row_at(sums_, t, sums_stride_) * p_.scale;
      if (z_ != nullptr) y *= silu(to_float(z_[int64_t{t} * p_.d_inner]));
      y_[int64_t{t} * p_.d_inner] = from_float<T>(y);
    }
  }

  const ScanParams& p_;
  const int64_t image_;
  const int threads_;
  TogetherStage<T> stage_;
  int channel_;
  bool writes_, adds_;
  int32_t u_stride_, delta_stride_, sums_stride_;  // bytes
  const T *u_[kTogether], *delta_, *z_ = nullptr;
  const int32_t* order_;
  T* y_;
  float* sums_;
  float bias_, delta0_;
  int32_t next_token_[kTogether];
  Loaded near_, far_;
  float skip_[kTogether], A_[kStateGroup], h_[kTogether][kStateGroup];
};

// Four sets of states leave few registers: with four blocks a multiprocessor a thread has up to 255
// and spills none; the sums of 196 tokens leave room for three in an H100's 228 KB, six warps for
// four schedulers. Blocks of 32 threads would be seven of one warp: by reckoning, not measured.
template <typename T>
__global__ void __launch_bounds__(kTogetherThreads, 4)
    selective_scan_together(const __grid_constant__ ScanParams p) {
  TogetherScan<T>(p, dynamic_shared_memory<float>()).run();
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CUDA_SCAN_TOGETHER_CUH_
