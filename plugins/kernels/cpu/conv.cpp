// Runs a checked convolution over units of (image, some tokens).
#include <algorithm>
#include <memory>
#include <new>

#include "plugins/kernels/cpu/dispatch.h"
#include "plugins/kernels/cpu/kernels.h"
#include "plugins/kernels/token_conv.h"

namespace vssm {
namespace {

constexpr int64_t kUnitTokens = 16;

// A vector that lies across two cache lines is read at half the rate.
constexpr std::align_val_t kLine{64};

struct FreeAligned {
  void operator()(float* data) const { operator delete[](data, kLine); }
};
using Floats = std::unique_ptr<float[], FreeAligned>;

struct Job {
  const CpuKernels* kernels;
  ConvPlan plan;
  TokenConvShape shape;
  const char* x;
  const int32_t* position;  // null: offsets count tokens
  int64_t position_stride;
  int64_t padded;              // d_inner, filled up to whole blocks of channels
  const float *weight, *bias;  // (directions, width, padded), (directions, padded)
  char* y;
  int64_t row_bytes;  // of x and y
  int64_t units;      // of an image
};

/// One token in one direction. A token that is not there adds nothing.
void run_token(const Job& job, int64_t image, int64_t k, int64_t t) {
  const TokenConvShape& shape = job.shape;
  const int32_t* position = job.position;
  if (position != nullptr) position += image * job.position_stride;
  ConvTap taps[kMaxConvWidth];
  int64_t count = 0;
  for (int64_t j = 0; j < shape.width; ++j) {
    const int64_t away = shape.width - 1 - j;
    const int32_t s =
        token_at(position, static_cast<int32_t>(shape.seqlen), static_cast<int32_t>(t),
                 static_cast<int32_t>(k == 0 ? -away : away));
    if (s < 0) continue;
    taps[count++] = {job.x + (image * shape.seqlen + s) * job.row_bytes,
                     job.weight + (k * shape.width + j) * job.padded};
  }
  const int64_t row = (image * shape.directions + k) * shape.seqlen + t;
  job.kernels->conv_token(job.plan, taps, count, job.bias + k * job.padded,
                          job.y + row * job.row_bytes);
}

void run_unit(void* argument, size_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const auto unit = static_cast<int64_t>(index);
  const int64_t image = unit / job.units, first = unit % job.units * kUnitTokens;
  const int64_t end = std::min(first + kUnitTokens, job.shape.seqlen);
  for (int64_t k = 0; k < job.shape.directions; ++k) {
    for (int64_t t = first; t < end; ++t) run_token(job, image, k, t);
  }
}

/// The taps of all channels side by side, as the kernels read them; zeros behind the last channel.
void lay_out(const TokenConvArgs& args, const TokenConvShape& shape, int64_t padded, float* weight,
             float* bias) {
  const auto* taps = static_cast<const float*>(args.weight.data);
  const auto* shift = static_cast<const float*>(args.bias.data);
  for (int64_t k = 0; k < shape.directions; ++k) {
    for (int64_t c = 0; c < padded; ++c) {
      const int64_t channel = k * shape.d_inner + c;
      const bool there = c < shape.d_inner;
      for (int64_t j = 0; j < shape.width; ++j) {
        weight[(k * shape.width + j) * padded + c] = there ? taps[channel * shape.width + j] : 0.0F;
      }
      bias[k * padded + c] = there ? shift[channel] : 0.0F;
    }
  }
}

}  // namespace

Status token_conv_cpu(const TokenConvArgs& args, const ParallelFor& parallel_for) {
  TokenConvShape shape;
  Status status = check(args, &shape);
  if (!status.ok()) return status;
  Job job = {};
  status = select_cpu_kernels(&job.kernels);
  if (status.ok()) status = check_values(args, shape);
  if (!status.ok()) return status;
  if (shape.batch == 0) return {};
  job.padded = (shape.d_inner + kChannels - 1) / kChannels * kChannels;
  const int64_t taps = shape.directions * shape.width * job.padded;
  const int64_t floats = taps + shape.directions * job.padded;
  const Floats scratch(static_cast<float*>(operator new[](
      static_cast<size_t>(floats) * sizeof(float), kLine, std::nothrow)));
  if (scratch == nullptr) {
    return Status::error(args.name, ": no memory for ", floats * 4,
                         " bytes of scratch; use fewer channels");
  }
  lay_out(args, shape, job.padded, scratch.get(), scratch.get() + taps);
  job.weight = scratch.get();
  job.bias = scratch.get() + taps;
  job.plan = {shape.d_inner, args.x.dtype, args.activation != 0};
  job.shape = shape;
  job.x = static_cast<const char*>(args.x.data);
  if (args.by_position != 0) job.position = static_cast<const int32_t*>(args.position.data);
  job.position_stride = args.position.dims[0] == 1 ? 0 : shape.seqlen;
  job.y = static_cast<char*>(args.y);
  job.row_bytes = shape.d_inner * size_of(args.x.dtype);
  job.units = (shape.seqlen + kUnitTokens - 1) / kUnitTokens;
  parallel_for(run_unit, static_cast<size_t>(shape.batch * job.units), &job);
  return {};
}

}  // namespace vssm
