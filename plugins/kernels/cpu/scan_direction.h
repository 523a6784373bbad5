// The scan of one direction over one block of kChannels channels, as a template over an instruction
// set; lanes.h says how it is kept apart from the other sets.
#ifndef VSSM_PLUGINS_KERNELS_CPU_SCAN_DIRECTION_H_
#define VSSM_PLUGINS_KERNELS_CPU_SCAN_DIRECTION_H_

#include <cstdint>

#include "plugins/kernels/cpu/lanes.h"

namespace vssm {

/// One row of channels a state, times log2(e) kCells, as Isa::Decay takes it; or A itself where
/// that product is no float, or an A is positive or NaN: then Decay::fast does not hold.
template <class Isa, int kRows>
struct Tile {
  typename Lanes<Isa>::Row lowest;  // per channel; -inf where Decay::fast does not hold
  float octave;                     // what makes span times a row octaves
  alignas(64) float rows[kRows * kChannels];

  VSSM_INLINE const float* row(int64_t n) const { return rows + n * kChannels; }

  /// Whether Decay::fast holds for this span and what max_bits puts before it, of each channel.
  VSSM_INLINE bool fits(const typename Lanes<Isa>::Row& span) const {
    bool fast = true;
    for (int v = 0; v < Lanes<Isa>::kVectors; ++v) fast &= Isa::fits_decay(span.v[v] * lowest.v[v]);
    return fast;
  }

  /// To `states` + 2 aligned rows of memory, and from there: cheaper than anew from A.
  VSSM_INLINE void keep(float* memory, int64_t states) const {
    using L = Lanes<Isa>;
    L::store(memory, lowest);
    memory[kChannels] = octave;
    for (int64_t n = 0; n < states; ++n) L::store(memory + (n + 2) * kChannels, L::load(row(n)));
  }
  VSSM_INLINE void recall(const float* memory, int64_t states) {
    using L = Lanes<Isa>;
    lowest = L::load(memory);
    octave = memory[kChannels];
    for (int64_t n = 0; n < states; ++n)
      L::store(rows + n * kChannels, L::load(memory + (n + 2) * kChannels));
  }

  /// From A (channels, decays): as many decays as states, or one for all of them. Channels that do
  /// not exist decay to 1.
  VSSM_INLINE void fill(const float* A, int64_t decays, int64_t states, int64_t width) {
    // Copied first and read as vectors later: a vector load right behind the stores that make it up
    // would wait for each of them.
    copy(A, decays, states, width);
    octave = 1.0F / Isa::kCells;
    const auto unit = Isa::set1(1.44269504F * Isa::kCells);
    lowest = Lanes<Isa>::splat(-0.0F);
    bool negative = true;
    for (int64_t n = 0; n < states; ++n) {
      for (int v = 0; v < Lanes<Isa>::kVectors; ++v) {
        float* place = rows + n * kChannels + v * Isa::kLanes;
        const auto a = Isa::load(place) * unit;
        Isa::store(place, a);
        lowest.v[v] = Isa::min(a, lowest.v[v]);
        negative &= Isa::none_above_zero(a);
      }
    }
    for (int v = 0; v < Lanes<Isa>::kVectors; ++v) {
      negative &= Isa::none_above_zero(Isa::set1(-__FLT_MAX__) - lowest.v[v]);
    }
    if (__builtin_expect(negative, 1)) return;
    copy(A, decays, states, width);
    octave = 1.44269504F;
    lowest = Lanes<Isa>::splat(-__builtin_inff());
  }

 private:
  VSSM_INLINE void copy(const float* A, int64_t decays, int64_t states, int64_t width) {
    const int64_t step = decays == 1 ? 0 : 1;
    for (int64_t c = 0; c < width; ++c) {
      for (int64_t n = 0; n < states; ++n) rows[n * kChannels + c] = A[c * decays + n * step];
    }
    for (int64_t n = 0; n < states && width < kChannels; ++n) {
      for (int64_t c = width; c < kChannels; ++c) rows[n * kChannels + c] = -0.0F;
    }
  }
};

/// The states are the caller's: it may take turns between blocks. `kOneDecay`: all states of a
/// channel decay alike, and any number of them is taken in tiles that fit in the registers.
/// `kRows`: of A, for as many states as there may be.
template <class Isa, DType kType, int kStates, bool kOneDecay = false,
          int kRows = kOneDecay      ? 1
                      : kStates == 0 ? static_cast<int>(kMaxStates)
                                     : kStates>
class DirectionScan {
 public:
  using L = Lanes<Isa>;
  using Row = typename L::Row;
  static constexpr int kVectors = L::kVectors;
  static constexpr int kFixedStates = kStates;

  /// `kept`: what keep() left of this direction and block, or null.
  VSSM_INLINE DirectionScan(const ScanPlan& plan, int64_t image, int64_t block, int64_t direction,
                            const float* kept = nullptr)
      : plan_(plan),
        block_(block),
        first_(direction == 0),
        last_(direction + 1 == plan.directions),
        part_(plan.d_inner - block * kChannels),
        u_stride_(plan.u_steps.token),
        delta_stride_(plan.delta_steps.token) {
    const int64_t channel = block * kChannels;
    const int64_t token = image * plan.seqlen;
    const int64_t kd = plan.Kd == 1 ? 0 : direction;
    const auto first = [image, direction](const ScanPlan::Steps& steps) {
      return image * steps.image + direction * steps.direction;
    };
    u_ = static_cast<const Element*>(plan.u) + first(plan.u_steps) + channel;
    delta_ = static_cast<const Element*>(plan.delta) + first(plan.delta_steps) + channel;
    B_ = plan.B + first(plan.B_steps);
    C_ = plan.C + first(plan.C_steps);
    order_ = plan.order + image * plan.order_stride + direction * plan.seqlen;
    gap_ = plan.gap + image * plan.gap_stride + direction * plan.seqlen;
    sums_ = plan.sums + token * plan.d_inner + channel;
    y_ = static_cast<Element*>(plan.y) + token * plan.d_inner + channel;
    if (plan.z != nullptr)
      z_ = static_cast<const Element*>(plan.z) + token * plan.d_inner + channel;
    bias_ = load(plan.delta_bias + kd * plan.d_inner + channel);
    skip_ = load(plan.D + (plan.Ks == 1 ? 0 : direction) * plan.d_inner + channel);
    if (plan.delta0 != nullptr) delta0_ = load(plan.delta0 + kd * plan.d_inner + channel);
    const int64_t decays = plan.decays;
    if (kept != nullptr) {
      tile_.recall(kept, rows());
    } else {
      tile_.fill(plan.A + ((plan.Ka == 1 ? 0 : direction) * plan.d_inner + channel) * decays,
                 decays, rows(), part_.width);
    }
    if constexpr (kOneDecay) {
      uniform_ = part_.width == kChannels && is_uniform(bias_) &&
                 is_uniform(L::load(tile_.row(0))) &&
                 (plan.delta0 == nullptr || is_uniform(delta0_));
    }
  }

  VSSM_INLINE void keep(float* memory) const { tile_.keep(memory, rows()); }

  /// Makes prefetch() look beyond the steps of a part: near their end to the first ones of the
  /// block that comes next, and all along to the part's blocks of the steps behind them, token by
  /// token, which memory gives faster than the lines of one block: each block calls for a share.
  VSSM_INLINE void look_ahead(const ScanPart& part) {
    const int64_t steps = part.to - part.from, place = block_ - part.first;
    const bool last = place + 1 == part.blocks;
    end_ = part.to;
    next_steps_ = last ? 0 : -steps;
    next_block_ = last ? part.first : block_ + 1;
    const int64_t share = place * steps;
    far_step_ = part.to + share / part.blocks;
    far_block_ = far_first_ = part.first;
    far_block_ += share % part.blocks;
    far_end_ = part.first + part.blocks;
  }

  VSSM_INLINE void clear(Row* h) const {
    const Row zero = L::splat(0.0F);
    if constexpr (kStates != 0) {
#pragma GCC unroll 16
      for (int n = 0; n < kStates; ++n) h[n] = zero;
    } else {
      for (int64_t n = 0; n < states(); ++n) h[n] = zero;
    }
  }

  /// The steps from t on, kSteps at most; `h` are the states before and after. `kPart`: of a part
  /// of a long list, after look_ahead().
  template <bool kPart = false>
  VSSM_INLINE void advance_block(const typename Isa::Decay& decay, int64_t t, Row* h) {
    const int64_t rest = plan_.seqlen - t;
    const int64_t count = rest < kSteps ? rest : kSteps;
    if constexpr (kStates == 1) return advance_one<kPart>(t, count, h);
    Step steps[kSteps];
    if constexpr (kOneDecay) {
      alignas(64) float deltas[kSteps] = {};
      if (uniform_ && gather(t, count, deltas)) {
        plan_.delta_softplus ? prepare_head<true>(t, count, deltas, steps)
                             : prepare_head<false>(t, count, deltas, steps);
      } else {
        const bool fast =
            plan_.delta_softplus ? prepare<true>(t, count, steps) : prepare<false>(t, count, steps);
        raise(decay, fast, count, steps);
      }
      for (int64_t i = 0; i < count; ++i) prefetch<kPart>(t + kSteps + i);
      advance_tiles<Isa::kStateVectors >= 16 ? 16 : 8>(0, count, steps, h);
      for (int64_t i = 0; i < count; ++i) finish(order_[t + i], steps[i], steps[i].y);
    } else {
      const bool fast =
          plan_.delta_softplus ? prepare<true>(t, count, steps) : prepare<false>(t, count, steps);
      for (int64_t i = 0; i < count; ++i) {
        prefetch<kPart>(t + kSteps + i);
        finish(order_[t + i], steps[i], recur(decay, fast, h, steps[i]));
      }
    }
  }

  // The softplus of a step is a chain of some 100 cycles. Taken step by step it leaves the reorder
  // buffer too short to overlap it with the states of the step before; a loop over a block of
  // steps hides it. Vim-T layer, Zen 5: step by step 0.38 ms, blocks of 32 0.26 ms; later, with the
  // rest improved, blocks of 4, 8, 16 and 32: 0.236, 0.226, 0.224, 0.227 ms.
  static constexpr int64_t kSteps = 16;
  // How far ahead advance_one() calls for rows of delta, no nearer than the second-level cache. The
  // same scan of VMamba with them in the first: as long; past both, as data used once: 2.4 times as
  // long; u and the sums, which are there since the direction before, called for as well: 1.07.
  static constexpr int64_t kAhead = 2 * kSteps;

 private:
  using Element = typename ElementOf<kType>::Type;

  struct Step {
    Row span, inject, y, gate;  // with one decay for all states it takes the place of the span
    int64_t params;             // the token whose B and C count
  };

  VSSM_INLINE int64_t states() const { return kStates == 0 ? plan_.d_state : kStates; }
  /// Of A.
  VSSM_INLINE int64_t rows() const { return kOneDecay ? 1 : states(); }

  VSSM_INLINE Row load(const float* source) const {
    return L::template load_part<DType::kFloat32>(source, part_);
  }

  /// What `count` steps from t need apart from the state: span, dt u, D u, the gate. All that the
  /// loop reads is copied to locals first: a vector store may alias a member, which would be read
  /// again. Returns whether Decay::fast holds for all of them: tested step by step it cost 3 % of a
  /// Vim-T layer.
  /// Not inlined, so that its constants do not compete with the states for registers.
  template <bool kSoftplus>
  VSSM_NOINLINE bool prepare(int64_t t, int64_t count, Step* steps) const {
    const typename FunctionsOf<Isa>::Type functions;
    const Element *u = u_, *delta = delta_;
    const int64_t u_stride = u_stride_, delta_stride = delta_stride_;
    const int32_t *order = order_ + t, *gap = gap_ + t;
    const bool by_step = plan_.params_by_step;
    const bool constant = plan_.delta0 != nullptr;
    const Element* z = last_ ? z_ : nullptr;
    const int64_t z_stride = plan_.d_inner;
    const bool every_place = plan_.every_place;
    const Row bias = bias_, skip = skip_, delta0 = delta0_;
    const typename Isa::Part part = part_;
    Row worst = L::splat(0.0F);
    for (int64_t i = 0; i < count; ++i) {
      Step& step = steps[i];
      const int64_t q = order[i];
      const int64_t s = by_step ? t + i : q;
      const Row x = L::template load_part<kType>(u + q * u_stride, part);
      Row dt = L::template load_part<kType>(delta + s * delta_stride, part);
      for (int v = 0; v < kVectors; ++v) {
        dt.v[v] = dt.v[v] + bias.v[v];
        if constexpr (kSoftplus) dt.v[v] = functions.softplus(dt.v[v]);
        step.inject.v[v] = dt.v[v] * x.v[v];
        step.y.v[v] = skip.v[v] * x.v[v];
      }
      if (!every_place) {
        const auto places = Isa::set1(static_cast<float>(t + i == 0 ? 1 : gap[i]));
        for (int v = 0; v < kVectors; ++v) {
          dt.v[v] = constant ? Isa::fma(places - Isa::set1(1.0F), delta0.v[v], dt.v[v])
                             : dt.v[v] * places;
        }
      }
      for (int v = 0; v < kVectors; ++v) worst.v[v] = Isa::max_bits(worst.v[v], dt.v[v]);
      step.span = dt;
      if (z != nullptr) {
        const Row gate = L::template load_part<kType>(z + q * z_stride, part);
        for (int v = 0; v < kVectors; ++v)
          step.gate.v[v] = Sigmoid<Isa>::silu(functions, gate.v[v]);
      }
      step.params = s;
    }
    return tile_.fits(worst);
  }

  /// The rows of a step of the next block: they lie a row of tokens apart, which no hardware
  /// prefetcher follows, and this loop leaves the load units time. Zen 5: 2 % at 197 tokens, a
  /// quarter at 3136.
  template <bool kPart>
  VSSM_INLINE void prefetch(int64_t t) {
    const bool beyond = kPart && t >= end_;
    if (beyond) t += next_steps_;
    if (t < plan_.seqlen) call<3>(t, beyond ? next_block_ : block_);
    if constexpr (kPart) prefetch_far();
  }

  VSSM_INLINE void prefetch_far() {
    if (far_step_ >= plan_.seqlen) return;
    call<2>(far_step_, far_block_);
    if (++far_block_ < far_end_) return;
    far_block_ = far_first_;
    ++far_step_;
  }

  /// For the rows of a step, to the cache level that is the better the higher it is.
  template <int kLevel>
  VSSM_INLINE void call(int64_t t, int64_t block) const {
    const int64_t q = order_[t];
    const int64_t s = plan_.params_by_step ? t : q;
    const int64_t aside = (block - block_) * kChannels;
    __builtin_prefetch(u_ + q * u_stride_ + aside, 0, kLevel);
    __builtin_prefetch(delta_ + s * delta_stride_ + aside, 0, kLevel);
    __builtin_prefetch(sums_ + q * plan_.d_inner + aside, 1, kLevel);
  }

  VSSM_INLINE Row recur(const typename Isa::Decay& decay, bool fast, Row* h,
                        const Step& step) const {
    const float* B = B_ + step.params * plan_.B_steps.token;
    const float* C = C_ + step.params * plan_.C_steps.token;
    Row y = step.y;
    if (__builtin_expect(fast, 1)) {
      advance<true>(decay, step.span, step.inject, B, C, h, &y);
    } else {
      advance<false>(decay, step.span, step.inject, B, C, h, &y);
    }
    return y;
  }

  /// h = exp2(span A) h + inject B;  y += C h, over all states.
  template <bool kFast>
  VSSM_INLINE void advance(const typename Isa::Decay& decay, const Row& span, const Row& inject,
                           const float* B, const float* C, Row* h, Row* y) const {
    if constexpr (kStates != 0) {
      Row even = *y, odd = L::splat(0.0F);  // a second sum shortens the chain of additions
#pragma GCC unroll 16
      for (int n = 0; n < kStates; ++n) {
        one_state<kFast, 0, kVectors>(decay, span, inject, B[n], C[n], n, &h[n],
                                      n % 2 == 0 ? &even : &odd);
      }
      for (int v = 0; v < kVectors; ++v) y->v[v] = even.v[v] + odd.v[v];
    } else {
      // As many vectors at a time as fit in the registers with their span, inject and y.
      advance_vectors<kFast, 0>(decay, span, inject, B, C, h, y);
    }
  }

  template <bool kFast, int kFrom>
  VSSM_INLINE void advance_vectors(const typename Isa::Decay& decay, const Row& span,
                                   const Row& inject, const float* B, const float* C, Row* h,
                                   Row* y) const {
    constexpr int kTo = kFrom + Isa::kVectorsAtOnce;
    Row sum = *y;
    const int64_t N = states();
    for (int64_t n = 0; n < N; ++n) {
      one_state<kFast, kFrom, kTo>(decay, span, inject, B[n], C[n], n, &h[n], &sum);
    }
    for (int v = kFrom; v < kTo; ++v) y->v[v] = sum.v[v];
    if constexpr (kTo < kVectors) advance_vectors<kFast, kTo>(decay, span, inject, B, C, h, y);
  }

  template <bool kFast, int kFrom, int kTo>
  VSSM_INLINE void one_state(const typename Isa::Decay& decay, const Row& span, const Row& inject,
                             float B, float C, int64_t n, Row* h, Row* y) const {
    const auto b = Isa::set1(B);
    const auto c = Isa::set1(C);
#pragma GCC unroll 4
    for (int v = kFrom; v < kTo; ++v) {
      const auto a = Isa::load(tile_.row(n) + v * Isa::kLanes);
      const auto d = kFast ? decay.fast(span.v[v], a) : Isa::Decay::any(span.v[v], a, tile_.octave);
      h->v[v] = Isa::fma(d, h->v[v], inject.v[v] * b);
      y->v[v] = Isa::fma(c, h->v[v], y->v[v]);
    }
  }

  /// Whether all channels have one value; NaN is none.
  static VSSM_INLINE bool is_uniform(const Row& row) {
    const auto first = Isa::set1(Isa::first(row.v[0]));
    bool uniform = true;
    for (int v = 0; v < kVectors; ++v) uniform &= Isa::all_equal(row.v[v], first);
    return uniform;
  }

  /// The deltas of `count` steps, one each; false where the channels of the block differ.
  VSSM_INLINE bool gather(int64_t t, int64_t count, float* deltas) const {
    bool uniform = true;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t s = plan_.params_by_step ? t + i : order_[t + i];
      const Row row = L::template load_all<kType>(delta_ + s * delta_stride_);
      deltas[i] = Isa::first(row.v[0]);
      uniform &= is_uniform(row);
    }
    return uniform;
  }

  /// What prepare() and raise() do, where all channels of the block have the same step sizes, as
  /// those of one head of Mamba-2 have: then the vectors lie along the steps, and softplus and
  /// decay are computed once a step instead of once a channel and step. Xeon (model 207), L 196,
  /// 768 channels, 64 states, best of 150: AVX-512 0.73 ms without, 0.63 with, 0.56 four blocks at
  /// a time (scan_wide); AVX2 1.24, 1.05, 1.01. The 28.9 million products alone take 0.38 and 0.69.
  template <bool kSoftplus>
  VSSM_NOINLINE void prepare_head(int64_t t, int64_t count, float* dts, Step* steps) const {
    const typename FunctionsOf<Isa>::Type functions;
    const typename Isa::Decay decay;
    alignas(64) float places[kSteps] = {}, decays[kSteps];
    for (int64_t i = 0; i < count; ++i)
      places[i] = static_cast<float>(t + i == 0 ? 1 : gap_[t + i]);
    const auto bias = bias_.v[0], a = Isa::load(tile_.row(0)), lowest = tile_.lowest.v[0];
    for (int64_t i = 0; i < kSteps; i += Isa::kLanes) {
      auto dt = Isa::load(dts + i) + bias;
      if constexpr (kSoftplus) dt = functions.softplus(dt);
      const auto place = Isa::load(places + i);
      const auto span = plan_.delta0 == nullptr
                            ? dt * place
                            : Isa::fma(place - Isa::set1(1.0F), delta0_.v[0], dt);
      Isa::store(dts + i, dt);
      Isa::store(decays + i, Isa::fits_decay(span * lowest)
                                 ? decay.fast(span, a)
                                 : Isa::Decay::any(span, a, tile_.octave));
    }
    const Element* z = last_ ? z_ : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      Step& step = steps[i];
      const int64_t q = order_[t + i];
      const Row x = L::template load_all<kType>(u_ + q * u_stride_);
      for (int v = 0; v < kVectors; ++v) {
        step.span.v[v] = Isa::set1(decays[i]);
        step.inject.v[v] = Isa::set1(dts[i]) * x.v[v];
        step.y.v[v] = skip_.v[v] * x.v[v];
      }
      if (z != nullptr) {
        const Row gate = L::template load_all<kType>(z + q * plan_.d_inner);
        for (int v = 0; v < kVectors; ++v)
          step.gate.v[v] = Sigmoid<Isa>::silu(functions, gate.v[v]);
      }
      step.params = plan_.params_by_step ? t + i : q;
    }
  }

  /// From the spans of `count` steps to their decays, in their place.
  VSSM_INLINE void raise(const typename Isa::Decay& decay, bool fast, int64_t count,
                         Step* steps) const {
    for (int64_t i = 0; i < count; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        const auto span = steps[i].span.v[v], a = Isa::load(tile_.row(0) + v * Isa::kLanes);
        steps[i].span.v[v] = fast ? decay.fast(span, a) : Isa::Decay::any(span, a, tile_.octave);
      }
    }
  }

  /// The states from n on through `count` steps, kTile at a time, then the rest by smaller tiles.
  template <int kTile>
  VSSM_INLINE void advance_tiles(int64_t n, int64_t count, Step* steps, Row* h) const {
    for (; n + kTile <= states(); n += kTile) advance_tile<kTile>(n, count, steps, h + n);
    if constexpr (kTile > 1) {
      if (n < states()) advance_tiles<kTile / 2>(n, count, steps, h);
    }
  }

  /// h = decay h + inject B;  y += C h. The states stay in registers from step to step, so that a
  /// step reads no more than its B and C: with the states in the first-level cache the loads and
  /// stores of a step take longer than its multiplications.
  template <int kTile>
  VSSM_NOINLINE void advance_tile(int64_t n, int64_t count, Step* steps, Row* h) const {
    using Vec = typename Isa::Vec;
    constexpr int kSums = kTile >= 8 ? kTile / 4 : 1;
    const int64_t B_stride = plan_.B_steps.token, C_stride = plan_.C_steps.token;
    const float *rows_of_B = B_ + n, *rows_of_C = C_ + n;
    for (int v = 0; v < kVectors; ++v) {
      Vec state[kTile];
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) state[i] = h[i].v[v];
      for (int64_t t = 0; t < count; ++t) {
        Step& step = steps[t];
        const float* B = rows_of_B + step.params * B_stride;
        const float* C = rows_of_C + step.params * C_stride;
        const Vec decay = step.span.v[v], inject = step.inject.v[v];
        Vec sum[kSums] = {step.y.v[v]};  // each a chain of four additions
#pragma GCC unroll 16
        for (int i = 0; i < kTile; ++i) {
          state[i] = Isa::fma(decay, state[i], inject * Isa::set1(B[i]));
          const Vec c = Isa::set1(C[i]);
          sum[i % kSums] =
              i > 0 && i < kSums ? c * state[i] : Isa::fma(c, state[i], sum[i % kSums]);
        }
#pragma GCC unroll 4
        for (int i = 1; i < kSums; ++i) sum[0] = sum[0] + sum[i];
        step.y.v[v] = sum[0];
      }
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) h[i].v[v] = state[i];
    }
  }

  /// All of some steps with one state. There is so little to compute that what is kept for a later
  /// loop counts: only step sizes are. VMamba (L 3136, D 96, K 4) on a Xeon (Sapphire Rapids),
  /// least of 150 runs in turns: AVX-512 1.23 ms with all that prepare() keeps, 1.14 so.
  template <bool kPart>
  VSSM_INLINE void advance_one(int64_t t, int64_t count, Row* h) {
    OneStep one;
    const bool fast = plan_.delta_softplus ? measure<kPart, true>(t, count, &one)
                                           : measure<kPart, false>(t, count, &one);
    one.keep = last_ && (z_ != nullptr || kType != DType::kFloat32);
    if (first_) {
      fast ? advance_one<true, true>(t, count, &one, h)
           : advance_one<false, true>(t, count, &one, h);
    } else {
      fast ? advance_one<true, false>(t, count, &one, h)
           : advance_one<false, false>(t, count, &one, h);
    }
    if (one.keep) finish_one(t, count, one);
  }

  struct OneStep {
    Row dt[kSteps], longer[kSteps], y[kSteps];
    const Row* span;         // dt, where every step stands for its own place alone
    int64_t params[kSteps];  // the tokens whose B and C count
    bool keep;               // the results, in y, rather than add them to the sums
  };

  /// Step sizes and spans of `count` steps; whether Decay::fast holds for all of them.
  template <bool kPart, bool kSoftplus>
  VSSM_NOINLINE bool measure(int64_t t, int64_t count, OneStep* one) {
    const typename FunctionsOf<Isa>::Type functions;
    const Element* delta = delta_;
    const int64_t stride = delta_stride_, ahead = plan_.seqlen - t - kAhead;
    const int32_t* order = order_ + t;
    const bool by_step = plan_.params_by_step;
    const Row bias = bias_;
    const typename Isa::Part part = part_;
    Row worst = L::splat(0.0F);
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (kPart) {
        prefetch_far();
      } else if (i < ahead) {
        const int64_t s = by_step ? t + i + kAhead : order[i + kAhead];
        __builtin_prefetch(delta + s * stride, 0, 2);
      }
      const int64_t s = by_step ? t + i : order[i];
      Row dt = L::template load_part<kType>(delta + s * stride, part);
      for (int v = 0; v < kVectors; ++v) {
        dt.v[v] = dt.v[v] + bias.v[v];
        if constexpr (kSoftplus) dt.v[v] = functions.softplus(dt.v[v]);
        worst.v[v] = Isa::max_bits(worst.v[v], dt.v[v]);
      }
      one->dt[i] = dt;
      one->params[i] = s;
    }
    one->span = one->dt;
    if (!plan_.every_place) worst = lengthen(t, count, one);
    return tile_.fits(worst);
  }

  /// The spans of steps that stand for several places, and the one furthest from what fits_decay
  /// takes.
  VSSM_NOINLINE Row lengthen(int64_t t, int64_t count, OneStep* one) const {
    const bool constant = plan_.delta0 != nullptr;
    Row worst = L::splat(0.0F);
    for (int64_t i = 0; i < count; ++i) {
      const auto places = Isa::set1(static_cast<float>(t + i == 0 ? 1 : gap_[t + i]));
      for (int v = 0; v < kVectors; ++v) {
        const auto dt = one->dt[i].v[v];
        const auto span =
            constant ? Isa::fma(places - Isa::set1(1.0F), delta0_.v[v], dt) : dt * places;
        one->longer[i].v[v] = span;
        worst.v[v] = Isa::max_bits(worst.v[v], span);
      }
    }
    one->span = one->longer;
    return worst;
  }

  /// Adds to the sums, or keeps the results for finish_one(). Not inlined: among much else in
  /// registers the compiler moves addresses from and to vector registers in each step.
  template <bool kFast, bool kFirst>
  VSSM_NOINLINE void advance_one(int64_t t, int64_t count, OneStep* one, Row* h) const {
    const typename Isa::Decay decay;
    const int32_t* order = order_ + t;
    const int64_t B_stride = plan_.B_steps.token, C_stride = plan_.C_steps.token;
    const int64_t y_stride = plan_.d_inner, u_stride = u_stride_;
    const Element* u = u_;
    const float *B = B_, *C = C_;
    float* sums = sums_;
    const Row *spans = one->span, skip = skip_;
    const float octave = tile_.octave;
    const auto scale = Isa::set1(plan_.scale);
    const typename Isa::Part part = part_;
    const Row a = L::load(tile_.row(0));
    Row state = *h;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t q = order[i], s = one->params[i];
      const Row x = L::template load_part<kType>(u + q * u_stride, part);
      const auto b = Isa::set1(B[s * B_stride]);
      const auto c = Isa::set1(C[s * C_stride]);
      Row y;
      for (int v = 0; v < kVectors; ++v) {
        const auto d = kFast ? decay.fast(spans[i].v[v], a.v[v])
                             : Isa::Decay::any(spans[i].v[v], a.v[v], octave);
        state.v[v] = Isa::fma(d, state.v[v], one->dt[i].v[v] * x.v[v] * b);
        y.v[v] = Isa::fma(c, state.v[v], skip.v[v] * x.v[v]);
      }
      float* sum = sums + q * y_stride;
      if constexpr (kFirst) {
        for (int v = 0; v < kVectors; ++v) y.v[v] = y.v[v] * scale;
      } else {
        const Row before = L::template load_part<DType::kFloat32>(sum, part);
        for (int v = 0; v < kVectors; ++v) y.v[v] = Isa::fma(y.v[v], scale, before.v[v]);
      }
      if (one->keep) {
        one->y[i] = y;
      } else {
        L::template store_part<DType::kFloat32>(sum, part, y);
      }
    }
    *h = state;
  }

  /// Gates the results and stores them in the type of y.
  VSSM_NOINLINE void finish_one(int64_t t, int64_t count, const OneStep& one) const {
    const typename FunctionsOf<Isa>::Type functions;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t offset = order_[t + i] * plan_.d_inner;
      Row y = one.y[i];
      if (z_ != nullptr) {
        const Row z = L::template load_part<kType>(z_ + offset, part_);
        for (int v = 0; v < kVectors; ++v) y.v[v] = y.v[v] * Sigmoid<Isa>::silu(functions, z.v[v]);
      }
      L::template store_part<kType>(y_ + offset, part_, y);
    }
  }

  /// The first direction writes, the others add, the last one gates and stores in the type of y.
  VSSM_INLINE void finish(int64_t q, const Step& step, Row y) const {
    const int64_t offset = q * plan_.d_inner;
    const auto scale = Isa::set1(plan_.scale);
    if (first_) {
      for (int v = 0; v < kVectors; ++v) y.v[v] = y.v[v] * scale;
    } else {
      const Row before = L::template load_part<DType::kFloat32>(sums_ + offset, part_);
      for (int v = 0; v < kVectors; ++v) y.v[v] = Isa::fma(y.v[v], scale, before.v[v]);
    }
    if (!last_) return L::template store_part<DType::kFloat32>(sums_ + offset, part_, y);
    if (z_ != nullptr) {
      for (int v = 0; v < kVectors; ++v) y.v[v] = y.v[v] * step.gate.v[v];
    }
    L::template store_part<kType>(y_ + offset, part_, y);
  }

  const ScanPlan& plan_;
  const int64_t block_;
  // By look_ahead().
  int64_t end_, next_steps_, next_block_, far_step_, far_block_, far_first_, far_end_;
  const bool first_, last_;
  const typename Isa::Part part_;
  const int64_t u_stride_, delta_stride_;
  const Element *u_, *delta_, *z_ = nullptr;
  const float *B_, *C_;
  const int32_t *order_, *gap_;
  float* sums_;
  Element* y_;
  Row bias_, skip_, delta0_;
  bool uniform_ = false;  // whether all channels have one bias, A and delta0
  Tile<Isa, kRows> tile_;
};

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CPU_SCAN_DIRECTION_H_
