// The backward pass of one unit of work (one image, one group of blocks of channels, all
// directions), as a template over an instruction set; lanes.h says how it is kept apart from
// the other sets.
#ifndef VSSM_PLUGINS_KERNELS_CPU_SCAN_BACKWARD_IMPL_H_
#define VSSM_PLUGINS_KERNELS_CPU_SCAN_BACKWARD_IMPL_H_

#include <cstdint>

#include "plugins/kernels/cpu/scan_backward_block.h"

namespace vssm {

template <class Isa, int kStates>
class BackwardUnit {
 public:
  VSSM_INLINE BackwardUnit(const BackwardPlan& plan, int64_t image, int64_t group, float* scratch)
      : plan_(plan),
        scan_(plan.scan),
        image_(image),
        group_(group),
        first_(group * plan.blocks_per_group),
        scratch_(scratch),
        size_(plan.scan.d_state * kChannels) {
    const int64_t rest = plan.blocks - first_;
    count_ = rest < plan.blocks_per_group ? rest : plan.blocks_per_group;
  }

  VSSM_INLINE void run() {
    const int64_t chunks = (scan_.seqlen + plan_.chunk - 1) / plan_.chunk;
    for (int64_t k = 0; k < scan_.directions; ++k) {
      for (int64_t i = 0; i < count_; ++i) sweep(k, i, chunks);
      clear(scratch_ + plan_.carry, count_ * size_);
      clear(scratch_ + plan_.sums_of_A, count_ * size_);
      clear(scratch_ + plan_.sums, count_ * kSums * kChannels);
      for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) run_chunk(k, chunk);
      for (int64_t i = 0; i < count_; ++i) finish(k, i);
    }
    if (plan_.dz != nullptr) finish_gate();
  }

 private:
  using Block = BackwardBlock<Isa, kStates>;
  using L = Lanes<Isa>;
  static constexpr int64_t kSums = 3;

  static VSSM_INLINE void clear(float* target, int64_t count) {
    for (int64_t i = 0; i < count; i += kChannels) L::store(target + i, L::splat(0.0F));
  }

  VSSM_INLINE void copy(const float* source, float* target) const {
    for (int64_t i = 0; i < size_; i += kChannels) L::store(target + i, L::load(source + i));
  }

  VSSM_INLINE float* start(int64_t chunk, int64_t i) const {
    return scratch_ + plan_.starts + (chunk * plan_.blocks_per_group + i) * size_;
  }

  /// Leaves the states before each chunk. What comes behind the last start counts for a y only.
  VSSM_NOINLINE void sweep(int64_t k, int64_t i, int64_t chunks) {
    Block block(plan_, image_, k, first_ + i);
    float* h = scratch_ + plan_.states;
    clear(h, size_);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      copy(h, start(chunk, i));
      if (chunk + 1 == chunks && plan_.dz == nullptr) return;
      block.sweep(chunk * plan_.chunk, steps_of(chunk), h);
    }
  }

  VSSM_INLINE int64_t steps_of(int64_t chunk) const {
    const int64_t rest = scan_.seqlen - chunk * plan_.chunk;
    return rest < plan_.chunk ? rest : plan_.chunk;
  }

  VSSM_NOINLINE void run_chunk(int64_t k, int64_t index) {
    BackwardChunk chunk;
    chunk.first = index * plan_.chunk;
    chunk.count = steps_of(index);
    chunk.decays = scratch_ + plan_.decays;
    chunk.states = scratch_ + plan_.states;
    chunk.lanes_of_B = scratch_ + plan_.lanes_of_B;
    chunk.lanes_of_C = scratch_ + plan_.lanes_of_C;
    clear(chunk.lanes_of_B, chunk.count * size_);
    clear(chunk.lanes_of_C, chunk.count * size_);
    for (int64_t i = 0; i < count_; ++i) {
      chunk.carry = scratch_ + plan_.carry + i * size_;
      chunk.sums_of_A = scratch_ + plan_.sums_of_A + i * size_;
      chunk.sums = scratch_ + plan_.sums + i * kSums * kChannels;
      copy(start(index, i), chunk.states);
      Block(plan_, image_, k, first_ + i).run(chunk);
    }
    add_lanes(k, chunk, chunk.lanes_of_B, row(plan_.dB, group_), scan_.B_steps);
    add_lanes(k, chunk, chunk.lanes_of_C, row(plan_.dC, group_), scan_.C_steps);
  }

  static VSSM_INLINE float* row(const BackwardPlan::Rows& rows, int64_t index) {
    return index == 0 ? rows.first : rows.rest + (index - 1) * rows.size;
  }

  /// The lanes of each state, added up, to the token whose B or C it was.
  VSSM_INLINE void add_lanes(int64_t k, const BackwardChunk& chunk, const float* lanes,
                             float* target, const ScanPlan::Steps& steps) const {
    const bool add = steps.direction == 0 && k > 0;
    const int64_t N = scan_.d_state;
    const int32_t* order = scan_.order + image_ * scan_.order_stride + k * scan_.seqlen;
    for (int64_t i = 0; i < chunk.count; ++i) {
      const int64_t s = scan_.params_by_step ? chunk.first + i : order[chunk.first + i];
      float* place = target + image_ * steps.image + k * steps.direction + s * steps.token;
      for (int64_t n = 0; n < N; ++n) {
        const float sum = add_up(lanes + i * size_ + n * kChannels);
        place[n] = add ? place[n] + sum : sum;
      }
    }
  }

  /// The same order for every instruction set.
  static VSSM_INLINE float add_up(const float* lanes) {
    float sums[4];
    for (int i = 0; i < 4; ++i)
      sums[i] = (lanes[i] + lanes[4 + i]) + (lanes[8 + i] + lanes[12 + i]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  /// A direction's gradients of A, D, delta_bias and delta0.
  VSSM_NOINLINE void finish(int64_t k, int64_t i) {
    const int64_t channel = (first_ + i) * kChannels;
    const int64_t rest = scan_.d_inner - channel;
    const int64_t width = rest < kChannels ? rest : kChannels;
    const float* A = scratch_ + plan_.sums_of_A + i * size_;
    const int64_t N = scan_.d_state, decays = scan_.decays, ka = scan_.Ka == 1 ? 0 : k;
    float* target = row(plan_.dA, image_) + (ka * scan_.d_inner + channel) * decays;
    const bool add = scan_.Ka == 1 && k > 0;
    for (int64_t c = 0; c < width; ++c) {
      for (int64_t n = 0; n < N; ++n) {
        const float sum = A[n * kChannels + c];
        // States that share a decay add to one gradient.
        float& place = target[c * decays + (decays == 1 ? 0 : n)];
        place = add || (decays == 1 && n > 0) ? place + sum : sum;
      }
    }
    const float* sums = scratch_ + plan_.sums + i * kSums * kChannels;
    finish_sum(k, sums, row(plan_.dD, image_) + channel, scan_.Ks, width);
    finish_sum(k, sums + kChannels, row(plan_.ddelta_bias, image_) + channel, scan_.Kd, width);
    if (plan_.ddelta0.first == nullptr) return;
    finish_sum(k, sums + 2 * kChannels, row(plan_.ddelta0, image_) + channel, scan_.Kd, width);
  }

  VSSM_INLINE void finish_sum(int64_t k, const float* sums, float* target, int64_t K,
                              int64_t width) const {
    float* place = target + (K == 1 ? 0 : k) * scan_.d_inner;
    for (int64_t c = 0; c < width; ++c) place[c] = K == 1 && k > 0 ? place[c] + sums[c] : sums[c];
  }

  /// From y before the gate, in dz, to the gradient of z.
  VSSM_NOINLINE void finish_gate() {
    const typename FunctionsOf<Isa>::Type functions;
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t channel = (first_ + i) * kChannels;
      const typename Isa::Part part(scan_.d_inner - channel);
      for (int64_t q = 0; q < scan_.seqlen; ++q) {
        const int64_t at = (image_ * scan_.seqlen + q) * scan_.d_inner + channel;
        const auto z =
            L::template load_part<DType::kFloat32>(static_cast<const float*>(scan_.z) + at, part);
        const auto dy = L::template load_part<DType::kFloat32>(plan_.dy + at, part);
        auto dz = L::template load_part<DType::kFloat32>(plan_.dz + at, part);
        for (int v = 0; v < L::kVectors; ++v) {
          dz.v[v] = dy.v[v] * dz.v[v] * Sigmoid<Isa>::slope(functions, z.v[v]);
        }
        L::template store_part<DType::kFloat32>(plan_.dz + at, part, dz);
      }
    }
  }

  const BackwardPlan& plan_;
  const ScanPlan& scan_;
  const int64_t image_, group_, first_;
  float* const scratch_;
  const int64_t size_;  // floats of one step's states
  int64_t count_;       // of blocks
};

template <class Isa>
void backward_unit(const BackwardPlan& plan, int64_t image, int64_t group, float* scratch) {
  const typename Isa::FlushDenormals flush;
  if (plan.scan.d_state == 1) return BackwardUnit<Isa, 1>(plan, image, group, scratch).run();
  if (plan.scan.d_state == 16) return BackwardUnit<Isa, 16>(plan, image, group, scratch).run();
  BackwardUnit<Isa, 0>(plan, image, group, scratch).run();
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CPU_SCAN_BACKWARD_IMPL_H_
