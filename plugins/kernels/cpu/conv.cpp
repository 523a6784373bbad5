// Runs a checked convolution over units of (image, some tokens).
#include <algorithm>

#include "plugins/kernels/cpu/conv_source.h"
#include "plugins/kernels/cpu/dispatch.h"

namespace vssm {
namespace {

constexpr int64_t kUnitTokens = 16;

struct Job {
  const CpuKernels* kernels;
  ConvPlan plan;
  const ConvSource* source;
  const char* x;
  char* y;
  int64_t row_bytes;  // of x and y
  int64_t units;      // of an image
};

void run_token(const Job& job, int64_t image, int64_t k, int64_t t) {
  const ConvSource& source = *job.source;
  const TokenConvShape& shape = source.shape;
  ConvTap taps[kMaxConvWidth];
  int64_t count = 0;
  source.for_taps(image, k, t, [&](int64_t j, int64_t s) {
    taps[count++] = {job.x + (image * shape.seqlen + s) * job.row_bytes,
                     source.weight + (k * shape.width + j) * source.padded};
  });
  const int64_t row = (image * shape.directions + k) * shape.seqlen + t;
  job.kernels->conv_token(job.plan, taps, count, source.bias + k * source.padded,
                          job.y + row * job.row_bytes);
}

void run_unit(void* argument, size_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const TokenConvShape& shape = job.source->shape;
  const auto unit = static_cast<int64_t>(index);
  const int64_t image = unit / job.units, first = unit % job.units * kUnitTokens;
  const int64_t end = std::min(first + kUnitTokens, shape.seqlen);
  for (int64_t k = 0; k < shape.directions; ++k) {
    for (int64_t t = first; t < end; ++t) run_token(job, image, k, t);
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
  const ConvSource source(args, shape);
  if (source.memory == nullptr) return source.starved(args.name);
  job.source = &source;
  job.plan = {shape.d_inner, args.x.dtype, args.activation != 0};
  job.x = static_cast<const char*>(args.x.data);
  job.y = static_cast<char*>(args.y);
  job.row_bytes = shape.d_inner * size_of(args.x.dtype);
  job.units = (shape.seqlen + kUnitTokens - 1) / kUnitTokens;
  parallel_for(run_unit, static_cast<size_t>(shape.batch * job.units), &job);
  return {};
}

}  // namespace vssm
