// The staging of the scan of four directions: rows of B and C, and gaps, in two tiles that take
// turns.
#ifndef VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_CUDA_TOGETHER_STAGE_CUH_
#define VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_CUDA_TOGETHER_STAGE_CUH_

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
    B_ = image_of<T>(p_.B, p_, image_, p_.B_token) + first;
    C_ = image_of<T>(p_.C, p_, image_, p_.C_token) + first;
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

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_CUDA_TOGETHER_STAGE_CUH_
