// The depthwise convolution of one token in one direction and its gradients, as a template over an
// instruction set; lanes.h says how it is kept apart from the other sets.
#ifndef VSSM_PLUGINS_KERNELS_CPU_CONV_IMPL_H_
#define VSSM_PLUGINS_KERNELS_CPU_CONV_IMPL_H_

#include <cstdint>

#include "plugins/kernels/cpu/lanes.h"

namespace vssm {

constexpr int64_t kConvBlocks = 8;  // of kChannels channels, whose sums are held at once

/// kCount taps of the channels [c, end), added to `sums`.
template <class Isa, DType kType, int kCount>
VSSM_NOINLINE void add_taps(const ConvTap* taps, int64_t c, int64_t end,
                            typename Lanes<Isa>::Row* sums) {
  using L = Lanes<Isa>;
  using Element = typename ElementOf<kType>::Type;
  const Element* x[kCount];
  const float* weight[kCount];
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) {
    x[j] = static_cast<const Element*>(taps[j].x);
    weight[j] = taps[j].weight;
  }
  const auto add = [&](const auto& load) __attribute__((always_inline)) {
    auto sum = *sums;
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      const typename L::Row row = load(x[j] + c);
      for (int v = 0; v < L::kVectors; ++v) {
        const auto tap = Isa::load(weight[j] + c + v * Isa::kLanes);
        sum.v[v] = Isa::fma(tap, row.v[v], sum.v[v]);
      }
    }
    *sums++ = sum;
  };
  for (; c + kChannels <= end; c += kChannels) {
    add([](const Element* row)
            __attribute__((always_inline)) { return L::template load_all<kType>(row); });
  }
  if (c == end) return;
  const typename Isa::Part part(end - c);
  add([&part](const Element* row)
          __attribute__((always_inline)) { return L::template load_part<kType>(row, part); });
}

/// Apart from the sums, so that its constants do not compete with them for registers.
template <class Isa>
VSSM_NOINLINE void activate(int64_t blocks, typename Lanes<Isa>::Row* sums) {
  const typename FunctionsOf<Isa>::Type functions;
  for (int64_t i = 0; i < blocks; ++i) {
    for (int v = 0; v < Lanes<Isa>::kVectors; ++v) {
      sums[i].v[v] = Sigmoid<Isa>::silu(functions, sums[i].v[v]);
    }
  }
}

template <class Isa, DType kType>
VSSM_INLINE void conv_typed(const ConvPlan& plan, const ConvTap* taps, int64_t count,
                            const float* bias, void* target) {
  using L = Lanes<Isa>;
  auto* y = static_cast<typename ElementOf<kType>::Type*>(target);
  typename L::Row sums[kConvBlocks];
  for (int64_t c = 0; c < plan.d_inner; c += kConvBlocks * kChannels) {
    const int64_t rest = plan.d_inner - c;
    const int64_t end = c + (rest < kConvBlocks * kChannels ? rest : kConvBlocks * kChannels);
    const int64_t blocks = (end - c + kChannels - 1) / kChannels;
    for (int64_t i = 0; i < blocks; ++i) sums[i] = L::load(bias + c + i * kChannels);
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) add_taps<Isa, kType, 4>(taps + j, c, end, sums);
    if (count - j == 3) add_taps<Isa, kType, 3>(taps + j, c, end, sums);
    if (count - j == 2) add_taps<Isa, kType, 2>(taps + j, c, end, sums);
    if (count - j == 1) add_taps<Isa, kType, 1>(taps + j, c, end, sums);
    if (plan.activation) activate<Isa>(blocks, sums);
    for (int64_t i = 0; i < blocks; ++i) {
      const typename Isa::Part part(end - c - i * kChannels);
      L::template store_part<kType>(y + c + i * kChannels, part, sums[i]);
    }
  }
}

/// Token by token and along its channels: rows are read and written as they lie in memory, and the
/// taps of all channels stay in the first-level cache.
template <class Isa>
void conv_token(const ConvPlan& plan, const ConvTap* taps, int64_t count, const float* bias,
                void* y) {
  const typename Isa::FlushDenormals flush;
  switch (plan.dtype) {
    case DType::kFloat16:
      return conv_typed<Isa, DType::kFloat16>(plan, taps, count, bias, y);
    case DType::kBFloat16:
      return conv_typed<Isa, DType::kBFloat16>(plan, taps, count, bias, y);
    default:
      return conv_typed<Isa, DType::kFloat32>(plan, taps, count, bias, y);
  }
}

/// The sums are computed anew: to keep them from the forward pass would take as much memory as y.
template <class Isa>
void conv_token_backward(const ConvPlan& plan, const ConvGradientTap* taps, int64_t count,
                         const float* bias, const float* dy, float* dbias) {
  using L = Lanes<Isa>;
  using Row = typename L::Row;
  const typename Isa::FlushDenormals flush;
  const typename FunctionsOf<Isa>::Type functions;
  for (int64_t c = 0; c < plan.d_inner; c += kChannels) {
    const typename Isa::Part part(plan.d_inner - c);
    const auto load = [&part, c](const float* row) __attribute__((always_inline)) {
      return L::template load_part<DType::kFloat32>(row + c, part);
    };
    Row slope = load(dy);
    if (plan.activation) {
      Row sum = L::load(bias + c);
      for (int64_t j = 0; j < count; ++j) {
        const Row x = load(taps[j].x), weight = L::load(taps[j].weight + c);
        for (int v = 0; v < L::kVectors; ++v) {
          sum.v[v] = Isa::fma(weight.v[v], x.v[v], sum.v[v]);
        }
      }
      for (int v = 0; v < L::kVectors; ++v) {
        slope.v[v] = slope.v[v] * Sigmoid<Isa>::slope(functions, sum.v[v]);
      }
    }
    Row total = L::load(dbias + c);
    for (int v = 0; v < L::kVectors; ++v) total.v[v] = total.v[v] + slope.v[v];
    L::store(dbias + c, total);
    for (int64_t j = 0; j < count; ++j) {
      const Row x = load(taps[j].x), weight = L::load(taps[j].weight + c);
      Row dweight = L::load(taps[j].dweight + c), dx = load(taps[j].dx);
      for (int v = 0; v < L::kVectors; ++v) {
        dweight.v[v] = Isa::fma(slope.v[v], x.v[v], dweight.v[v]);
        dx.v[v] = Isa::fma(slope.v[v], weight.v[v], dx.v[v]);
      }
      L::store(taps[j].dweight + c, dweight);
      L::template store_part<DType::kFloat32>(taps[j].dx + c, part, dx);
    }
  }
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CPU_CONV_IMPL_H_
