// What a convolution and its backward pass read: which token a tap reads, and the taps as the
// kernels take them. For the drivers; the kernels themselves use nothing from std::.
#ifndef VSSM_PLUGINS_KERNELS_CPU_CONV_SOURCE_H_
#define VSSM_PLUGINS_KERNELS_CPU_CONV_SOURCE_H_

#include <algorithm>
#include <cstdint>

#include "plugins/kernels/cpu/aligned.h"
#include "plugins/kernels/cpu/kernels.h"
#include "plugins/kernels/token_conv.h"

namespace vssm {

struct ConvSource {
  TokenConvShape shape;
  int64_t padded;           // d_inner, filled up to whole blocks of channels
  const int32_t* position;  // null: offsets count tokens
  int64_t position_stride;
  int64_t grid_width;  // 0: a line
  Floats memory;       // weight, then bias; empty where there was no memory
  int64_t floats;
  const float *weight, *bias;  // (directions, width, padded), (directions, padded)

  ConvSource(const TokenConvArgs& args, const TokenConvShape& of)
      : shape(of),
        padded((of.d_inner + kChannels - 1) / kChannels * kChannels),
        position(args.by_position != 0 ? static_cast<const int32_t*>(args.position.data) : nullptr),
        position_stride(args.position.dims[0] == 1 ? 0 : of.seqlen),
        grid_width(args.grid_width),
        floats(of.directions * (of.width + 1) * padded) {
    memory = allocate(floats);
    if (memory == nullptr) return;
    float* taps = memory.get();
    float* shift = taps + of.directions * of.width * padded;
    lay_out(static_cast<const float*>(args.weight.data), static_cast<const float*>(args.bias.data),
            taps, shift);
    weight = taps;
    bias = shift;
  }

  /// Why there is no `memory`.
  Status starved(const char* op) const {
    return Status::error(op, ": no memory for ", floats * 4,
                         " bytes of scratch; use fewer channels");
  }

  /// Calls tap(j, s) for every tap of a token that reads a token; one that is not there adds
  /// nothing.
  template <class Tap>
  void for_taps(int64_t image, int64_t k, int64_t t, const Tap& tap) const {
    const int32_t* of_image = position == nullptr ? nullptr : position + image * position_stride;
    if (shape.side > 0) return for_grid_taps(of_image, t, tap);
    for (int64_t j = 0; j < shape.width; ++j) {
      const int64_t away = shape.width - 1 - j;
      const int32_t s =
          token_at(of_image, static_cast<int32_t>(shape.seqlen), static_cast<int32_t>(t),
                   static_cast<int32_t>(k == 0 ? -away : away));
      if (s >= 0) tap(j, int64_t{s});
    }
  }

 private:
  template <class Tap>
  void for_grid_taps(const int32_t* of_image, int64_t t, const Tap& tap) const {
    int32_t tokens[kMaxConvSide];
    const auto side = static_cast<int32_t>(shape.side);
    for (int32_t row = 0; row < side; ++row) {
      tokens_on_grid(of_image, static_cast<int32_t>(shape.seqlen), static_cast<int32_t>(t),
                     grid_width, side, row - side / 2, tokens);
      for (int32_t i = 0; i < side; ++i) {
        if (tokens[i] >= 0) tap(int64_t{row} * side + i, int64_t{tokens[i]});
      }
    }
  }

  /// The taps of all channels side by side, as the kernels read them; zeros behind the last one.
  void lay_out(const float* taps, const float* shift, float* to_taps, float* to_shift) const {
    for (int64_t k = 0; k < shape.directions; ++k) {
      // Block by block of channels, so that what is written is whole lines of the cache.
      for (int64_t c = 0; c < padded; c += kChannels) {
        const int64_t count = std::min(kChannels, shape.d_inner - c);
        const float* from = taps + (k * shape.d_inner + c) * shape.width;
        for (int64_t j = 0; j < shape.width; ++j) {
          float* to = to_taps + (k * shape.width + j) * padded + c;
          for (int64_t i = 0; i < count; ++i) to[i] = from[i * shape.width + j];
          std::fill(to + count, to + kChannels, 0.0F);
        }
        float* to = std::copy_n(shift + k * shape.d_inner + c, count, to_shift + k * padded + c);
        std::fill_n(to, kChannels - count, 0.0F);
      }
    }
  }
};

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CPU_CONV_SOURCE_H_
