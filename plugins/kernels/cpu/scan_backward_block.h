// The backward pass of one direction over one block of kChannels channels, a chunk of steps at a
// time, as a template over an instruction set; lanes.h says how it is kept apart from the
// other sets.
#ifndef VSSM_PLUGINS_KERNELS_CPU_SCAN_BACKWARD_BLOCK_H_
#define VSSM_PLUGINS_KERNELS_CPU_SCAN_BACKWARD_BLOCK_H_

#include <cstdint>

#include "plugins/kernels/cpu/scan_direction.h"

namespace vssm {

/// Where a chunk's states lie. Rows of kChannels floats, d_state of them a step.
struct BackwardChunk {
  int64_t first, count;  // its steps
  float* carry;          // the gradient by the state behind the chunk, then by that before it
  float* sums_of_A;      // the gradient of A so far
  float* sums;           // those of D, delta_bias and delta0 so far, a row each
  float* decays;         // of each step
  float* states;         // before each step, and after the last one
  float *lanes_of_B, *lanes_of_C;  // the gradients of B and C, one lane for each channel modulo 16
};

template <class Isa, int kStates>
class BackwardBlock {
 public:
  using L = Lanes<Isa>;
  using Row = typename L::Row;
  using Vec = typename Isa::Vec;
  static constexpr int kVectors = L::kVectors;
  static constexpr int64_t kMaxChunk = 64;
  static constexpr int64_t kAhead = 16;

  VSSM_INLINE BackwardBlock(const BackwardPlan& plan, int64_t image, int64_t k, int64_t block)
      : plan_(plan), scan_(plan.scan), part_(plan.scan.d_inner - block * kChannels) {
    const ScanPlan& s = scan_;
    const int64_t channel = block * kChannels;
    const int64_t token = image * s.seqlen;
    const int64_t kd = s.Kd == 1 ? 0 : k;
    const auto first = [image, k](const ScanPlan::Steps& steps) {
      return image * steps.image + k * steps.direction;
    };
    u_at_ = first(s.u_steps) + channel;
    delta_at_ = first(s.delta_steps) + channel;
    y_at_ = token * s.d_inner + channel;
    add_u_ = s.Ku == 1 && k > 0;
    add_delta_ = s.Kd == 1 && k > 0;
    add_y_ = k > 0;
    B_ = s.B + first(s.B_steps);
    C_ = s.C + first(s.C_steps);
    order_ = s.order + image * s.order_stride + k * s.seqlen;
    gap_ = s.gap + image * s.gap_stride + k * s.seqlen;
    bias_ = load(s.delta_bias + kd * s.d_inner + channel);
    skip_ = load(s.D + (s.Ks == 1 ? 0 : k) * s.d_inner + channel);
    delta0_ = s.delta0 == nullptr ? L::splat(0.0F) : load(s.delta0 + kd * s.d_inner + channel);
    tile_.fill(s.A + ((s.Ka == 1 ? 0 : k) * s.d_inner + channel) * s.decays, s.decays, states(),
               part_.width);
  }

  /// The states go from those before the steps to those after them. A gated scan's y goes to dz.
  VSSM_INLINE void sweep(int64_t first, int64_t count, float* h) {
    const bool fast = scan_.delta_softplus ? prepare<true, false>(first, count)
                                           : prepare<false, false>(first, count);
    for (int64_t i = 0; i < count; ++i) {
      if (plan_.dz == nullptr) {
        fast ? advance<true>(steps_[i], h, h, nullptr) : advance<false>(steps_[i], h, h, nullptr);
        continue;
      }
      Row y = L::splat(0.0F);
      fast ? advance<true, true>(steps_[i], h, h, nullptr, &y)
           : advance<false, true>(steps_[i], h, h, nullptr, &y);
      add_to_y(steps_[i], y);
    }
  }

  /// The gradients of a chunk; `chunk.states` begins with the states before its first step.
  VSSM_INLINE void run(const BackwardChunk& chunk) {
    const bool fast = scan_.delta_softplus ? prepare<true, true>(chunk.first, chunk.count)
                                           : prepare<false, true>(chunk.first, chunk.count);
    const int64_t size = states() * kChannels;
    for (int64_t i = 0; i < chunk.count; ++i) {
      float *h = chunk.states + i * size, *decays = chunk.decays + i * size;
      fast ? advance<true>(steps_[i], h, h + size, decays)
           : advance<false>(steps_[i], h, h + size, decays);
    }
    retreat(chunk);
  }

 private:
  /// What a step needs apart from the states; `q` and `s` as in selective_scan.h.
  struct Step {
    Row span, dt, x, g, slope;  // slope: of dt over delta
    int64_t q, s;
    float gap;
  };

  VSSM_INLINE int64_t states() const { return kStates == 0 ? scan_.d_state : kStates; }

  VSSM_INLINE Row load(const float* source) const {
    return L::template load_part<DType::kFloat32>(source, part_);
  }

  VSSM_INLINE void store(float* target, bool add, Row row) const {
    if (add) {
      const Row before = load(target);
      for (int v = 0; v < kVectors; ++v) row.v[v] = row.v[v] + before.v[v];
    }
    L::template store_part<DType::kFloat32>(target, part_, row);
  }

  /// Fills steps_. Returns whether Decay::fast holds for all of them. Not inlined, so that its
  /// constants do not compete with the states for registers.
  template <bool kSoftplus, bool kGradients>
  VSSM_NOINLINE bool prepare(int64_t first, int64_t count) {
    const typename FunctionsOf<Isa>::Type functions;
    const ScanPlan& scan = scan_;
    const Vec one = Isa::set1(1.0F);
    Row worst = L::splat(0.0F);
    for (int64_t i = 0; i < count; ++i) {
      Step& step = steps_[i];
      const int64_t t = first + i;
      prefetch<kGradients>(t + kAhead);
      step.q = order_[t];
      step.s = scan.params_by_step ? t : step.q;
      step.gap = static_cast<float>(t == 0 ? 1 : gap_[t]);
      step.x = load(static_cast<const float*>(scan.u) + u_at_ + step.q * scan.u_steps.token);
      const Row delta =
          load(static_cast<const float*>(scan.delta) + delta_at_ + step.s * scan.delta_steps.token);
      for (int v = 0; v < kVectors; ++v) {
        const Vec x = delta.v[v] + bias_.v[v];
        const Vec dt = kSoftplus ? functions.softplus(x) : x;
        const Vec gap = Isa::set1(step.gap);
        step.dt.v[v] = dt;
        step.span.v[v] = scan.delta0 != nullptr ? Isa::fma(gap - one, delta0_.v[v], dt) : dt * gap;
        worst.v[v] = Isa::max_bits(worst.v[v], step.span.v[v]);
        if constexpr (kGradients)
          step.slope.v[v] = kSoftplus ? Sigmoid<Isa>::value(functions, x) : one;
      }
      if constexpr (kGradients) {
        step.g = load(plan_.dy + y_at_ + step.q * scan.d_inner);
        for (int v = 0; v < kVectors; ++v) step.g.v[v] = step.g.v[v] * Isa::set1(scan.scale);
        if (scan.z == nullptr) continue;
        const Row z = load(static_cast<const float*>(scan.z) + y_at_ + step.q * scan.d_inner);
        for (int v = 0; v < kVectors; ++v)
          step.g.v[v] = step.g.v[v] * Sigmoid<Isa>::silu(functions, z.v[v]);
      }
    }
    return tile_.fits(worst);
  }

  /// The rows of a later step lie a row of tokens apart, which no hardware prefetcher follows.
  template <bool kGradients>
  VSSM_INLINE void prefetch(int64_t t) const {
    if (t >= scan_.seqlen) return;
    const ScanPlan& scan = scan_;
    const int64_t q = order_[t], s = scan.params_by_step ? t : q;
    const int64_t u = u_at_ + q * scan.u_steps.token, y = y_at_ + q * scan.d_inner;
    const int64_t delta = delta_at_ + s * scan.delta_steps.token;
    __builtin_prefetch(static_cast<const float*>(scan.u) + u);
    __builtin_prefetch(static_cast<const float*>(scan.delta) + delta);
    if constexpr (kGradients) {
      __builtin_prefetch(plan_.dy + y);
      __builtin_prefetch(plan_.du + u, 1);
      __builtin_prefetch(plan_.ddelta + delta, 1);
      if (scan.z != nullptr) __builtin_prefetch(static_cast<const float*>(scan.z) + y);
    } else if (plan_.dz != nullptr) {
      __builtin_prefetch(plan_.dz + y, 1);
    }
  }

  /// One step forward: from the states at `h` to those at `next`; its decays go to `decays`, C.h
  /// to y.
  template <bool kFast, bool kOutput = false>
  VSSM_INLINE void advance(const Step& step, const float* h, float* next, float* decays,
                           Row* y = nullptr) const {
    const typename Isa::Decay decay;
    const float* B = B_ + step.s * scan_.B_steps.token;
    const float* C = C_ + step.s * scan_.C_steps.token;
    const int64_t N = states();
#pragma GCC unroll 1
    for (int v = 0; v < kVectors; ++v) {
      const Vec span = step.span.v[v], inject = step.dt.v[v] * step.x.v[v];
      Vec sum = Isa::set1(0.0F);
#pragma GCC unroll 4
      for (int64_t n = 0; n < N; ++n) {
        const int64_t place = n * kChannels + v * Isa::kLanes;
        const Vec a = Isa::load(tile_.row(n) + v * Isa::kLanes);
        const Vec d = kFast ? decay.fast(span, a) : Isa::Decay::any(span, a, tile_.octave);
        const Vec state = Isa::fma(d, Isa::load(h + place), inject * Isa::set1(B[n]));
        Isa::store(next + place, state);
        if (decays != nullptr) Isa::store(decays + place, d);
        if constexpr (kOutput) sum = Isa::fma(Isa::set1(C[n]), state, sum);
      }
      if constexpr (kOutput) y->v[v] = sum;
    }
  }

  VSSM_INLINE void add_to_y(const Step& step, Row y) const {
    const Vec scale = Isa::set1(scan_.scale);
    for (int v = 0; v < kVectors; ++v) {
      y.v[v] = Isa::fma(skip_.v[v], step.x.v[v], y.v[v]) * scale;
    }
    store(plan_.dz + y_at_ + step.q * scan_.d_inner, add_y_, y);
  }

  /// The steps of a chunk, last to first.
  VSSM_NOINLINE void retreat(const BackwardChunk& chunk) const {
    Row dD = L::load(chunk.sums), dbias = L::load(chunk.sums + kChannels);
    Row ddelta0 = L::load(chunk.sums + 2 * kChannels);
    const bool constant = scan_.delta0 != nullptr;
    for (int64_t i = chunk.count - 1; i >= 0; --i) {
      const Step& step = steps_[i];
      Row du, ddelta;
      for (int v = 0; v < kVectors; ++v) {
        Vec w, f;
        retreat_states(chunk, i, v, &w, &f);
        f = f * Isa::set1(0.693147182F * tile_.octave);  // the tile has A in units of the decay
        const Vec x = step.x.v[v], g = step.g.v[v];
        const Vec more = Isa::set1(step.gap - 1.0F);
        const Vec by_dt = constant ? Isa::fma(w, x, f) : Isa::fma(f, Isa::set1(step.gap), w * x);
        du.v[v] = Isa::fma(w, step.dt.v[v], g * skip_.v[v]);
        ddelta.v[v] = by_dt * step.slope.v[v];
        dD.v[v] = Isa::fma(g, x, dD.v[v]);
        dbias.v[v] = dbias.v[v] + ddelta.v[v];
        ddelta0.v[v] = Isa::fma(f, more, ddelta0.v[v]);
      }
      store(plan_.du + u_at_ + step.q * scan_.u_steps.token, add_u_, du);
      store(plan_.ddelta + delta_at_ + step.s * scan_.delta_steps.token, add_delta_, ddelta);
    }
    L::store(chunk.sums, dD);
    L::store(chunk.sums + kChannels, dbias);
    L::store(chunk.sums + 2 * kChannels, ddelta0);
  }

  /// One vector of one step; w and f as in selective_scan_backward.h.
  VSSM_INLINE void retreat_states(const BackwardChunk& chunk, int64_t i, int v, Vec* w,
                                  Vec* f) const {
    const Step& step = steps_[i];
    const float* B = B_ + step.s * scan_.B_steps.token;
    const float* C = C_ + step.s * scan_.C_steps.token;
    const int64_t N = states(), size = N * kChannels, column = v * Isa::kLanes;
    const float *h = chunk.states + i * size + column, *decays = chunk.decays + i * size + column;
    float* lanes_of_B = chunk.lanes_of_B + i * size + column;
    float* lanes_of_C = chunk.lanes_of_C + i * size + column;
    float *carry = chunk.carry + column, *sums_of_A = chunk.sums_of_A + column;
    const Vec span = step.span.v[v], g = step.g.v[v], inject = step.dt.v[v] * step.x.v[v];
    Vec w_sum = Isa::set1(0.0F), f_sum = Isa::set1(0.0F);
#pragma GCC unroll 4
    for (int64_t n = 0; n < N; ++n) {
      const int64_t row = n * kChannels;
      const Vec d = Isa::fma(g, Isa::set1(C[n]), Isa::load(carry + row));
      Isa::store(lanes_of_C + row,
                 Isa::fma(g, Isa::load(h + size + row), Isa::load(lanes_of_C + row)));
      Isa::store(lanes_of_B + row, Isa::fma(d, inject, Isa::load(lanes_of_B + row)));
      w_sum = Isa::fma(d, Isa::set1(B[n]), w_sum);
      const Vec before = d * Isa::load(decays + row);
      const Vec e = before * Isa::load(h + row);
      f_sum = Isa::fma(e, Isa::load(tile_.row(n) + column), f_sum);
      Isa::store(sums_of_A + row, Isa::fma(e, span, Isa::load(sums_of_A + row)));
      Isa::store(carry + row, before);
    }
    *w = w_sum;
    *f = f_sum;
  }

  const BackwardPlan& plan_;
  const ScanPlan& scan_;
  const typename Isa::Part part_;
  int64_t u_at_, delta_at_, y_at_;  // where this direction's first token and channel lie
  bool add_u_, add_delta_, add_y_;  // or overwrite
  const float *B_, *C_;
  const int32_t *order_, *gap_;
  Row bias_, skip_, delta0_;
  Tile<Isa, kStates == 0 ? kMaxStates : kStates> tile_;
  Step steps_[kMaxChunk];
};

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CPU_SCAN_BACKWARD_BLOCK_H_
