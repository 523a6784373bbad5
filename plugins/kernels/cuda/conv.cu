// TokenConv on a GPU: a block takes some channels and some tokens of one image, all directions. Its
// threads are channels, which hold their taps in registers and walk down the tokens; neighbouring
// tokens read the same rows, which the first-level cache then has. Where the tokens lie on a grid,
// that goes for the tokens of a row, and for the rows that the square of taps covers.
#include "plugins/kernels/cuda/common.cuh"
#include "plugins/kernels/cuda/math.cuh"
#include "plugins/kernels/token_conv.h"

namespace vssm {
namespace {

constexpr int kMaxThreads = 256;
// By reckoning, not measured: a block loads its taps once for so many tokens, and 197 tokens of 384
// channels still make 13 blocks.
constexpr int kTokens = 16;

struct ConvParams {
  const void* x;
  const float *weight, *bias;
  const int32_t* position;  // null: offsets count tokens
  int64_t position_image;   // from one image to the next; 0 where they share
  void* y;
  int32_t seqlen, d_inner, directions, width;
  int32_t grid_width, side;  // 0 where the tokens are a line
  int32_t packs;             // of channels, in a row of x
  int32_t groups;            // blocks that share a row of x
  int32_t tiles;             // blocks that share the tokens of an image
  bool activation;
};

/// The tokens that a block's taps read: for each of its own those of a direction, side by side.
struct Sources {
  static constexpr int kTaps = kMaxConvDirections * kMaxConvWidth;
  int32_t token[kTokens][kTaps];
};
static_assert(kMaxTaps <= Sources::kTaps);

template <bool kOnGrid>
__device__ __forceinline__ void find_sources(const ConvParams& p, int64_t image, int32_t first,
                                             int32_t count, Sources& sources) {
  const int32_t* position = p.position == nullptr ? nullptr : p.position + image * p.position_image;
  const int32_t each = count * p.width;
  const int32_t units = kOnGrid ? count * p.side : p.directions * each;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < units;
       i += static_cast<int32_t>(blockDim.x)) {
    if constexpr (kOnGrid) {
      const int32_t t = i / p.side, row = i % p.side;
      tokens_on_grid(position, p.seqlen, first + t, p.grid_width, p.side, row - p.side / 2,
                     sources.token[t] + row * p.side);
    } else {
      const int32_t k = i / each, t = i % each / p.width, j = i % p.width;
      const int32_t away = p.width - 1 - j;
      sources.token[t][k * p.width + j] =
          token_at(position, p.seqlen, first + t, k == 0 ? -away : away);
    }
  }
}

/// kPack channels of one direction. `kWidth`: of the taps, where it is known; 0 where it is not.
template <typename T, int kPack, int kWidth>
class ChannelConv {
 public:
  __device__ __forceinline__ ChannelConv(const ConvParams& p, int32_t direction, int32_t channel)
      : p_(p), weight_(p.weight + (int64_t{direction} * p.d_inner + channel) * p.width) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      bias_[i] = p.bias[int64_t{direction} * p.d_inner + channel + i];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) taps_[j][i] = weight_[i * kWidth + j];
    }
  }

  /// `x` and `y` are the image's, from the first channel on; `source` has the width's tokens.
  __device__ __forceinline__ void run(const T* x, const int32_t* source, T* y) const {
    Pack<float, kPack> sum;
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum.v[i] = bias_[i];
    if constexpr (kWidth > 0) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) add(x, source[j], taps_[j], sum);
    } else {
      for (int j = 0; j < p_.width; ++j) {
        float taps[kPack];
#pragma unroll
        for (int i = 0; i < kPack; ++i) taps[i] = weight_[i * p_.width + j];
        add(x, source[j], taps, sum);
      }
    }
    Pack<T, kPack> result;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      result.v[i] = from_float<T>(p_.activation ? silu(sum.v[i]) : sum.v[i]);
    }
    *reinterpret_cast<Pack<T, kPack>*>(y) = result;
  }

 private:
  __device__ __forceinline__ void add(const T* x, int32_t token, const float* taps,
                                      Pack<float, kPack>& sum) const {
    if (token < 0) return;  // the same for all threads of a block
    const auto row = *reinterpret_cast<const Pack<T, kPack>*>(x + int64_t{token} * p_.d_inner);
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum.v[i] = fmaf(taps[i], to_float(row.v[i]), sum.v[i]);
  }

  const ConvParams& p_;
  const float* weight_;
  float bias_[kPack];
  float taps_[kWidth > 0 ? kWidth : 1][kPack];
};

template <typename T, int kPack, int kWidth, bool kOnGrid>
__global__ void __launch_bounds__(kMaxThreads) conv_kernel(const __grid_constant__ ConvParams p) {
  auto& sources = shared_memory<Sources>();
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  const int32_t group = block % p.groups, tile = block / p.groups % p.tiles;
  const int64_t image = block / p.groups / p.tiles;
  const int32_t first = tile * kTokens, count = min(kTokens, p.seqlen - first);
  find_sources<kOnGrid>(p, image, first, count, sources);
  __syncthreads();
  const int32_t pack = group * static_cast<int32_t>(blockDim.x) + static_cast<int32_t>(threadIdx.x);
  if (pack >= p.packs) return;
  const int32_t channel = pack * kPack;
  const T* x = static_cast<const T*>(p.x) + image * p.seqlen * p.d_inner + channel;
  for (int32_t k = 0; k < p.directions; ++k) {
    const ChannelConv<T, kPack, kWidth> conv(p, k, channel);
    const int64_t row = (image * p.directions + k) * p.seqlen + first;
    T* y = static_cast<T*>(p.y) + row * p.d_inner + channel;
    for (int32_t t = 0; t < count; ++t) {
      conv.run(x, sources.token[t] + k * p.width, y + int64_t{t} * p.d_inner);
    }
  }
}

/// Whether rows of x and y may be read kPack elements at a time.
template <typename T, int kPack>
bool is_wide(const TokenConvArgs& args, const TokenConvShape& shape) {
  const auto all = reinterpret_cast<uintptr_t>(args.x.data) | reinterpret_cast<uintptr_t>(args.y);
  return shape.d_inner % kPack == 0 && all % (sizeof(T) * kPack) == 0;
}

template <typename T, int kPack, int kWidth, bool kOnGrid>
Status launch_conv(const TokenConvArgs& args, const TokenConvShape& shape, cudaStream_t stream) {
  ConvParams p = {};
  p.x = args.x.data;
  p.weight = static_cast<const float*>(args.weight.data);
  p.bias = static_cast<const float*>(args.bias.data);
  if (args.by_position != 0) p.position = static_cast<const int32_t*>(args.position.data);
  p.position_image = args.position.dims[0] == 1 ? 0 : shape.seqlen;
  p.y = args.y;
  p.seqlen = static_cast<int32_t>(shape.seqlen);
  p.d_inner = static_cast<int32_t>(shape.d_inner);
  p.directions = static_cast<int32_t>(shape.directions);
  p.width = static_cast<int32_t>(shape.width);
  p.grid_width = static_cast<int32_t>(args.grid_width);
  p.side = static_cast<int32_t>(shape.side);
  p.activation = args.activation != 0;
  p.packs = p.d_inner / kPack;
  const int32_t threads = channel_threads(p.packs, kMaxThreads);
  p.groups = (p.packs - 1) / threads + 1;
  p.tiles = (p.seqlen - 1) / kTokens + 1;
  const int64_t blocks = int64_t{p.groups} * p.tiles;
  if (shape.batch > INT32_MAX / blocks) {
    return Status::error(args.name, ": batch=", shape.batch, " is more than ", INT32_MAX / blocks,
                         ", what one launch takes; split the batch");
  }
  const dim3 grid(static_cast<unsigned>(shape.batch * blocks));
  return launch(args.name, conv_kernel<T, kPack, kWidth, kOnGrid>,
                {grid, dim3(static_cast<unsigned>(threads))}, stream, p);
}

template <typename T, int kPack>
Status launch_packs(const TokenConvArgs& args, const TokenConvShape& shape, cudaStream_t stream) {
  if (args.on_grid) {
    if (shape.width == 9) return launch_conv<T, kPack, 9, true>(args, shape, stream);
    // So many taps of more than one channel would not fit in a thread's registers.
    if (shape.width == 49) return launch_conv<T, 1, 49, true>(args, shape, stream);
    return launch_conv<T, kPack, 0, true>(args, shape, stream);
  }
  if (shape.width == 4) return launch_conv<T, kPack, 4, false>(args, shape, stream);
  return launch_conv<T, kPack, 0, false>(args, shape, stream);
}

}  // namespace

int64_t token_conv_cuda_workspace(const TokenConvShape&) { return 0; }

Status token_conv_cuda(const TokenConvArgs& args, const CudaLaunch& launch) {
  TokenConvShape shape;
  const Status status = check(args, &shape);
  if (!status.ok() || shape.batch == 0) return status;
  constexpr int kPack = 4;
  if (shape.d_inner > INT32_MAX / 2) {
    return Status::error(args.name, ": d_inner=", shape.d_inner, " is more than ", INT32_MAX / 2,
                         ", what the CUDA kernel takes; split the channels");
  }
  return with_float_type(args.name, args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const cudaStream_t stream = stream_of(launch);
    return is_wide<T, kPack>(args, shape) ? launch_packs<T, kPack>(args, shape, stream)
                                          : launch_packs<T, 1>(args, shape, stream);
  });
}

}  // namespace vssm
