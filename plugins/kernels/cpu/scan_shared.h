// The scan of one block of channels where the directions share step sizes, A and C, as PlainMamba's
// four do: they go on together, step by step, and those whose gaps agree at a step share its
// decays. A template over an instruction set, as lanes.h explains.
//
// PlainMamba-L1 (K 4, L 196, D 384, N 16), Zen 5, against four nodes of one direction: AVX-512 0.57
// of their time, AVX2 0.46, baseline 0.47; with gaps as after pruning to 0.8: 0.74, 0.61, 0.61, to
// 0.5: 0.89, 0.78, 0.76. With AVX-512, also: a load of C for each direction 4 % more, 16 states
// known at compile time 2 % less (left out), 2 or 16 states unrolled up to 8 % more.
#ifndef VSSM_PLUGINS_KERNELS_CPU_SCAN_SHARED_H_
#define VSSM_PLUGINS_KERNELS_CPU_SCAN_SHARED_H_

#include <cstdint>

#include "plugins/kernels/cpu/scan_direction.h"

namespace vssm {

template <class Isa, DType kType>
class SharedScan {
 public:
  VSSM_INLINE SharedScan(const ScanPlan& plan, int64_t image, int64_t block)
      : plan_(plan), part_(plan.d_inner - block * kChannels) {
    const int64_t channel = block * kChannels;
    const int64_t token = image * plan.seqlen;
    const int64_t N = plan.d_state;
    delta_ = static_cast<const Element*>(plan.delta) + token * plan.d_inner + channel;
    B_ = plan.B + image * plan.B_steps.image;
    C_ = plan.C + token * N;
    sums_ = plan.sums + token * plan.d_inner + channel;
    y_ = static_cast<Element*>(plan.y) + token * plan.d_inner + channel;
    if (plan.z != nullptr)
      z_ = static_cast<const Element*>(plan.z) + token * plan.d_inner + channel;
    D_ = plan.D + channel;
    bias_ = load(plan.delta_bias + channel);
    if (plan.delta0 != nullptr) delta0_ = load(plan.delta0 + channel);
    tile_.fill(plan.A + channel * N, N, N, part_.width);
    for (int64_t k = 0; k < plan.directions; ++k) {
      Direction& d = directions_[k];
      d.u = static_cast<const Element*>(plan.u) + image * plan.u_steps.image +
            k * plan.u_steps.direction + channel;
      d.order = plan.order + image * plan.order_stride + k * plan.seqlen;
      d.gap = plan.gap + image * plan.gap_stride + k * plan.seqlen;
    }
    for (int64_t i = 0; i < kMaxDirections * N; ++i) L::store(h_ + i * kChannels, L::splat(0.0F));
  }

  VSSM_INLINE void run() {
    begin_sums();
    Row dt[kSteps];
    for (int64_t t = 0; t < plan_.seqlen; t += kSteps) {
      const int64_t rest = plan_.seqlen - t;
      const int64_t count = rest < kSteps ? rest : kSteps;
      plan_.delta_softplus ? prepare<true>(t, count, dt) : prepare<false>(t, count, dt);
      for (int64_t i = 0; i < count; ++i) {
        prefetch(t + kSteps + i);
        recur(t + i, dt[i]);
      }
    }
    if (kType != DType::kFloat32 || z_ != nullptr) convert();
  }

 private:
  static constexpr int64_t kMaxDirections = kMaxTogether;
  static constexpr int64_t kSteps = 8;
  using L = Lanes<Isa>;
  using Row = typename L::Row;
  static constexpr int kVectors = L::kVectors;
  using Element = typename ElementOf<kType>::Type;

  struct Direction {
    const Element* u;
    const int32_t *order, *gap;
  };

  VSSM_INLINE Row load(const float* source) const {
    return L::template load_part<DType::kFloat32>(source, part_);
  }

  /// The skip of all directions, which each visit every token once: scale D u.
  VSSM_NOINLINE void begin_sums() const {
    const int64_t terms = plan_.Ku == 1 ? 1 : plan_.directions;
    Row skip[kMaxDirections];
    for (int64_t k = 0; k < plan_.directions; ++k) {
      const Row d = load(D_ + (plan_.Ks == 1 ? 0 : k) * plan_.d_inner);
      for (int v = 0; v < kVectors; ++v) {
        const auto scaled = d.v[v] * Isa::set1(plan_.scale);
        skip[k].v[v] = scaled;
        if (k >= terms) skip[0].v[v] = skip[0].v[v] + scaled;
      }
    }
    for (int64_t q = 0; q < plan_.seqlen; ++q) {
      Row sum = L::splat(0.0F);
      for (int64_t k = 0; k < terms; ++k) {
        const Row x = load_u(k, q);
        for (int v = 0; v < kVectors; ++v) sum.v[v] = Isa::fma(skip[k].v[v], x.v[v], sum.v[v]);
      }
      L::template store_part<DType::kFloat32>(sums_ + q * plan_.d_inner, part_, sum);
    }
  }

  VSSM_INLINE Row load_u(int64_t k, int64_t q) const {
    return L::template load_part<kType>(directions_[k].u + q * plan_.u_steps.token, part_);
  }

  /// Not inlined, so that its constants do not compete with others for registers.
  template <bool kSoftplus>
  VSSM_NOINLINE void prepare(int64_t t, int64_t count, Row* steps) const {
    const typename FunctionsOf<Isa>::Type functions;
    const int64_t stride = plan_.d_inner;
    const Element* delta = delta_ + t * stride;
    const Row bias = bias_;
    const typename Isa::Part part = part_;
    for (int64_t i = 0; i < count; ++i) {
      Row dt = L::template load_part<kType>(delta + i * stride, part);
      for (int v = 0; v < kVectors; ++v) {
        dt.v[v] = dt.v[v] + bias.v[v];
        if constexpr (kSoftplus) dt.v[v] = functions.softplus(dt.v[v]);
      }
      steps[i] = dt;
    }
  }

  /// As in scan_direction.h.
  VSSM_INLINE void prefetch(int64_t t) const {
    if (t >= plan_.seqlen) return;
    __builtin_prefetch(delta_ + t * plan_.d_inner);
    for (int64_t k = 0; k < plan_.directions; ++k) {
      const int64_t q = directions_[k].order[t];
      __builtin_prefetch(directions_[k].u + q * plan_.u_steps.token);
      __builtin_prefetch(sums_ + q * plan_.d_inner, 1);
    }
  }

  /// Directions whose gaps agree go together; a first step's has no effect.
  VSSM_INLINE void recur(int64_t t, const Row& dt) {
    int members[kMaxDirections] = {0, 1, 2, 3};
    const auto K = static_cast<int>(plan_.directions);
    const int32_t gap = t == 0 ? 1 : directions_[0].gap[t];
    bool equal = true;
    for (int k = 1; k < K && t > 0; ++k) equal &= directions_[k].gap[t] == gap;
    if (__builtin_expect(equal, 1)) return group(t, gap, dt, members, K);
    bool done[kMaxDirections] = {};
    for (int first = 0; first < K; ++first) {
      if (done[first]) continue;
      int size = 0;
      for (int k = first; k < K; ++k) {
        if (directions_[k].gap[t] != directions_[first].gap[t]) continue;
        members[size++] = k;
        done[k] = true;
      }
      group(t, directions_[first].gap[t], dt, members, size);
    }
  }

  VSSM_INLINE void group(int64_t t, int32_t gap, const Row& dt, const int* members, int size) {
    const auto places = Isa::set1(static_cast<float>(gap));
    Row span;
    for (int v = 0; v < kVectors; ++v) {
      span.v[v] = plan_.delta0 == nullptr
                      ? dt.v[v] * places
                      : Isa::fma(places - Isa::set1(1.0F), delta0_.v[v], dt.v[v]);
    }
    if (!tile_.fits(span)) {
      for (int i = 0; i < size; ++i) advance<false, 1>(t, span, dt, members + i);
    } else if (size == 4) {
      advance<true, 4>(t, span, dt, members);
    } else if (size == 3) {
      advance<true, 3>(t, span, dt, members);
    } else if (size == 2) {
      advance<true, 2>(t, span, dt, members);
    } else {
      advance<true, 1>(t, span, dt, members);
    }
  }

  /// h = exp2(span A) h + dt u B;  y += C h, over all states, of kTogether directions; then each
  /// y goes to the token that it belongs to.
  template <bool kFast, int kTogether>
  VSSM_NOINLINE void advance(int64_t t, const Row& span, const Row& dt, const int* members) {
    const typename Isa::Decay decay;
    const int64_t N = plan_.d_state;
    const float* B[kTogether];
    const float* C = C_ + t * N;
    float *h[kTogether], *target[kTogether];
    Row inject[kTogether], y[kTogether];
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) {
      const int k = kTogether == 4 ? i : members[i];  // four are all there are
      const int64_t q = directions_[k].order[t];
      B[i] = B_ + t * plan_.B_steps.token + k * plan_.B_steps.direction;
      h[i] = h_ + k * kChannels;
      target[i] = sums_ + q * plan_.d_inner;
      const Row x = load_u(k, q);
      for (int v = 0; v < kVectors; ++v) inject[i].v[v] = dt.v[v] * x.v[v];
    }
#pragma GCC unroll 1
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = v * Isa::kLanes;
      const typename Isa::Vec now = span.v[v];
      typename Isa::Vec in[kTogether], sum[kTogether];
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) {
        in[i] = inject[i].v[v];
        sum[i] = Isa::set1(0.0F);
      }
      for (int64_t n = 0; n < N; ++n) {
        const auto c = Isa::set1(C[n]);
        const auto a = Isa::load(tile_.row(n) + column);
        const auto d = kFast ? decay.fast(now, a) : Isa::Decay::any(now, a, tile_.octave);
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) {
          float* place = h[i] + n * (kMaxDirections * kChannels) + column;
          const auto next = Isa::fma(d, Isa::load(place), in[i] * Isa::set1(B[i][n]));
          Isa::store(place, next);
          sum[i] = Isa::fma(c, next, sum[i]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) y[i].v[v] = sum[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) add(target[i], y[i]);  // in turn: tokens may coincide
  }

  VSSM_INLINE void add(float* target, const Row& y) const {
    const auto scale = Isa::set1(plan_.scale);
    Row sum = L::template load_part<DType::kFloat32>(target, part_);
    for (int v = 0; v < kVectors; ++v) sum.v[v] = Isa::fma(y.v[v], scale, sum.v[v]);
    L::template store_part<DType::kFloat32>(target, part_, sum);
  }

  /// From the sums to y: gates, and stores in its type.
  VSSM_NOINLINE void convert() const {
    const typename FunctionsOf<Isa>::Type functions;
    for (int64_t q = 0; q < plan_.seqlen; ++q) {
      Row y = L::template load_part<DType::kFloat32>(sums_ + q * plan_.d_inner, part_);
      if (z_ != nullptr) {
        const Row z = L::template load_part<kType>(z_ + q * plan_.d_inner, part_);
        for (int v = 0; v < kVectors; ++v) y.v[v] = y.v[v] * Sigmoid<Isa>::silu(functions, z.v[v]);
      }
      L::template store_part<kType>(y_ + q * plan_.d_inner, part_, y);
    }
  }

  const ScanPlan& plan_;
  const typename Isa::Part part_;
  const Element *delta_, *z_ = nullptr;
  float* sums_;
  Element* y_;
  const float *B_, *C_, *D_;
  Row bias_, delta0_;
  Direction directions_[kMaxDirections];
  Tile<Isa, kMaxStates / kMaxDirections> tile_;
  alignas(64) float h_[kMaxStates * kChannels];
};

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CPU_SCAN_SHARED_H_
