// Runs a checked backward pass of a convolution over units of (image, some channels), then adds up
// what the images share.
#include <algorithm>

#include "plugins/kernels/cpu/conv_source.h"
#include "plugins/kernels/cpu/dispatch.h"

namespace vssm {
namespace {

// Channels of a unit. It goes through all tokens in both directions, so that one thread adds up a
// row of dx, and their rows stay in the first-level cache from one tap to the next.
constexpr int64_t kUnitChannels = 8 * kChannels;

struct Job {
  const CpuKernels* kernels;
  bool activation;
  const ConvSource* source;
  const float *x, *dy;
  float* dx;
  float* rows;    // of each image the gradients of weight and bias, laid out as in the source
  int64_t units;  // of an image
};

void run_unit(void* argument, size_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const ConvSource& source = *job.source;
  const TokenConvShape& shape = source.shape;
  const auto unit = static_cast<int64_t>(index);
  const int64_t image = unit / job.units, c = unit % job.units * kUnitChannels;
  const ConvPlan plan = {std::min(kUnitChannels, shape.d_inner - c), DType::kFloat32,
                         job.activation};
  const int64_t padded = std::min(kUnitChannels, source.padded - c);
  float* dweight = job.rows + image * source.floats + c;
  float* dbias = dweight + (source.bias - source.weight);
  for (int64_t row = 0; row < shape.directions * (shape.width + 1); ++row) {
    std::fill_n(dweight + row * source.padded, padded, 0.0F);
  }
  const int64_t first = image * shape.seqlen;
  for (int64_t t = 0; t < shape.seqlen; ++t) {
    std::fill_n(job.dx + (first + t) * shape.d_inner + c, plan.d_inner, 0.0F);
  }
  for (int64_t k = 0; k < shape.directions; ++k) {
    for (int64_t t = 0; t < shape.seqlen; ++t) {
      ConvGradientTap taps[kMaxTaps];
      int64_t count = 0;
      source.for_taps(image, k, t, [&](int64_t j, int64_t s) {
        const int64_t token = (first + s) * shape.d_inner + c;
        const int64_t tap = (k * shape.width + j) * source.padded;
        taps[count++] = {job.x + token, source.weight + tap + c, job.dx + token, dweight + tap};
      });
      const int64_t row = (image * shape.directions + k) * shape.seqlen + t;
      job.kernels->conv_token_backward(plan, taps, count, source.bias + k * source.padded + c,
                                       job.dy + row * shape.d_inner + c, dbias + k * source.padded);
    }
  }
}

/// The images' rows added up in their order, whatever thread wrote them, and laid out as weight and
/// bias are.
void add_up(const Job& job, const TokenConvBackwardArgs& args) {
  const ConvSource& source = *job.source;
  const TokenConvShape& shape = source.shape;
  for (int64_t image = 1; image < shape.batch; ++image) {
    const float* row = job.rows + image * source.floats;
    for (int64_t i = 0; i < source.floats; ++i) job.rows[i] += row[i];
  }
  const float* dbias = job.rows + (source.bias - source.weight);
  for (int64_t k = 0; k < shape.directions; ++k) {
    for (int64_t c = 0; c < shape.d_inner; ++c) {
      const int64_t channel = k * shape.d_inner + c;
      for (int64_t j = 0; j < shape.width; ++j) {
        args.dweight[channel * shape.width + j] =
            job.rows[(k * shape.width + j) * source.padded + c];
      }
      args.dbias[channel] = dbias[k * source.padded + c];
    }
  }
}

}  // namespace

Status token_conv_backward_cpu(const TokenConvBackwardArgs& args, const ParallelFor& parallel_for) {
  const TokenConvArgs& forward = args.forward;
  TokenConvShape shape;
  Status status = check(args, &shape);
  if (!status.ok()) return status;
  Job job = {};
  status = select_cpu_kernels(&job.kernels);
  if (status.ok()) status = check_values(forward, shape);
  if (!status.ok()) return status;
  const ConvSource source(forward, shape);
  if (source.memory == nullptr) return source.starved(forward.name);
  const int64_t count = source.floats * std::max<int64_t>(shape.batch, 1);
  const Floats rows = allocate(count);
  if (rows == nullptr) {
    return Status::error(forward.name, ": no memory for ", count * 4,
                         " bytes of partial gradients; run smaller batches");
  }
  if (shape.batch == 0) std::fill_n(rows.get(), source.floats, 0.0F);
  job.activation = forward.activation != 0;
  job.source = &source;
  job.x = static_cast<const float*>(forward.x.data);
  job.dy = static_cast<const float*>(args.dy.data);
  job.dx = args.dx;
  job.rows = rows.get();
  job.units = (shape.d_inner + kUnitChannels - 1) / kUnitChannels;
  parallel_for(run_unit, static_cast<size_t>(shape.batch * job.units), &job);
  add_up(job, args);
  return {};
}

}  // namespace vssm
