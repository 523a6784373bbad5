// The depthwise convolutions of one token in one direction and of tiles of a grid, and gradients,
// as templates over an instruction set; lanes.h says how it is kept apart from the other sets.
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

// Blocks of channels whose sums for all columns of a tile fit in the registers.
template <class Isa>
constexpr int kTileBlocks = Isa::kLanes == 16 ? 2 : 1;

/// The channels from c on, kBlocks blocks of them. A row of x is read once for all columns whose
/// taps reach it, and the loads of the taps are the operands of the products: two loads for each
/// product, as a token by itself needs, are more than a processor does. `kSide`: of the square,
/// where it is known; 0 where it is not.
template <class Isa, int kSide, int kBlocks, class Load>
VSSM_NOINLINE void sum_tile(const ConvSquare& square, const ConvTile& tile, int64_t c,
                            const Load& load, typename Lanes<Isa>::Row* sums) {
  using L = Lanes<Isa>;
  using Row = typename L::Row;
  // Of the 32 registers of AVX-512 enough are left for the taps of a row.
  constexpr bool kHeld = Isa::kLanes == 16 && kSide > 0;
  const int side = kSide > 0 ? kSide : static_cast<int>(square.side);
  const int window = side + kTileColumns - 1;
  Row sum[kTileColumns][kBlocks];
#pragma GCC unroll 4
  for (int i = 0; i < kTileColumns; ++i) {
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) sum[i][b] = L::load(square.bias + c + b * kChannels);
  }
  const void* const* source = tile.x;
  const float* taps = square.weight + c;
  Row held[kHeld ? kSide : 1][kBlocks];
  for (int row = 0; row < side; ++row) {
    if constexpr (kHeld) {
#pragma GCC unroll 7
      for (int j = 0; j < kSide; ++j) {
#pragma GCC unroll 2
        for (int b = 0; b < kBlocks; ++b) {
          held[j][b] = L::load(taps + j * square.padded + b * kChannels);
        }
      }
    }
#pragma GCC unroll 10
    for (int column = 0; column < window; ++column) {
      if (source[column] == nullptr) continue;
      Row x[kBlocks];
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b) x[b] = load(source[column], c + b * kChannels);
#pragma GCC unroll 4
      for (int i = 0; i < kTileColumns; ++i) {
        if (column < i || column - i >= side) continue;
        const float* tap = taps + (column - i) * square.padded;
#pragma GCC unroll 2
        for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 4
          for (int v = 0; v < L::kVectors; ++v) {
            const int at = b * static_cast<int>(kChannels) + v * Isa::kLanes;
            const auto weight = kHeld ? held[column - i][b].v[v] : Isa::load(tap + at);
            sum[i][b].v[v] = Isa::fma(weight, x[b].v[v], sum[i][b].v[v]);
          }
        }
      }
    }
    source += window;
    taps += side * square.padded;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTileColumns; ++i) {
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) sums[i * kBlocks + b] = sum[i][b];
  }
}

template <class Isa, DType kType, int kSide>
VSSM_INLINE void conv_tiles_typed(const ConvPlan& plan, const ConvSquare& square,
                                  const ConvTile* tiles, int64_t count) {
  using L = Lanes<Isa>;
  using Element = typename ElementOf<kType>::Type;
  constexpr int kBlocks = kTileBlocks<Isa>;
  typename L::Row sums[kTileColumns * kBlocks];
  int64_t blocks = kBlocks;
  // Channels outside of the tiles, so that their taps stay in the first-level cache.
  for (int64_t c = 0; c < plan.d_inner; c += blocks * kChannels) {
    const bool whole = plan.d_inner - c >= kBlocks * kChannels;
    const typename Isa::Part part(plan.d_inner - c);
    if (!whole) blocks = 1;
    for (const ConvTile* tile = tiles; tile < tiles + count; ++tile) {
      if (whole) {
        sum_tile<Isa, kSide, kBlocks>(
            square, *tile, c,
            [](const void* row, int64_t at) __attribute__((always_inline)) {
              return L::template load_all<kType>(static_cast<const Element*>(row) + at);
            },
            sums);
      } else {
        sum_tile<Isa, kSide, 1>(
            square, *tile, c,
            [&part](const void* row, int64_t at) __attribute__((always_inline)) {
              return L::template load_part<kType>(static_cast<const Element*>(row) + at, part);
            },
            sums);
      }
      if (plan.activation) activate<Isa>(kTileColumns * blocks, sums);
      for (int64_t i = 0; i < kTileColumns * blocks; ++i) {
        if (tile->y[i / blocks] == nullptr) continue;
        auto* y = static_cast<Element*>(tile->y[i / blocks]) + c + i % blocks * kChannels;
        L::template store_part<kType>(y, part, sums[i]);
      }
    }
  }
}

template <class Isa, DType kType>
VSSM_INLINE void conv_tiles_sized(const ConvPlan& plan, const ConvSquare& square,
                                  const ConvTile* tiles, int64_t count) {
  if (square.side == 7) return conv_tiles_typed<Isa, kType, 7>(plan, square, tiles, count);
  if (square.side == 3) return conv_tiles_typed<Isa, kType, 3>(plan, square, tiles, count);
  return conv_tiles_typed<Isa, kType, 0>(plan, square, tiles, count);
}

template <class Isa>
void conv_tiles(const ConvPlan& plan, const ConvSquare& square, const ConvTile* tiles,
                int64_t count) {
  const typename Isa::FlushDenormals flush;
  switch (plan.dtype) {
    case DType::kFloat16:
      return conv_tiles_sized<Isa, DType::kFloat16>(plan, square, tiles, count);
    case DType::kBFloat16:
      return conv_tiles_sized<Isa, DType::kBFloat16>(plan, square, tiles, count);
    default:
      return conv_tiles_sized<Isa, DType::kFloat32>(plan, square, tiles, count);
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
