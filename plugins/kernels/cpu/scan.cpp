// Runs a checked scan over units of (image, block of channels).
#include <algorithm>
#include <memory>
#include <new>

#include "plugins/kernels/cpu/dispatch.h"
#include "plugins/kernels/cpu/kernels.h"
#include "plugins/kernels/selective_scan.h"

namespace vssm {
namespace {

static_assert(kMaxDState <= kMaxStates, "a larger d_state needs larger units");

struct Job {
  const CpuKernels* kernels;
  ScanPlan plan;
  int64_t units;  // of an image
  // Half types only: B and C of each image are converted once, not once a block of channels.
  const uint16_t *half_B, *half_C;
  float *B, *C;
};

constexpr int64_t kLongList = 8192;

/// Wide units where memory counts, as even in number and size as they get; with one decay for all
/// states as wide as their states leave room.
int64_t blocks_per_unit(const SelectiveScanShape& shape) {
  const bool is_long = shape.seqlen >= kLongList && shape.d_state <= kMaxWideStates;
  if (shape.decays > 1 && !is_long) return 1;
  const int64_t widest = std::clamp<int64_t>(kMaxStates / shape.d_state, 1, kWidest);
  const int64_t blocks = (shape.d_inner + kChannels - 1) / kChannels;
  const int64_t units = 2 * ((blocks + 2 * widest - 1) / (2 * widest));
  return (blocks + units - 1) / units;
}

void run_unit(void* argument, size_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const auto unit = static_cast<int64_t>(index);
  job.kernels->scan_unit(job.plan, unit / job.units, unit % job.units);
}

void widen_image(void* argument, size_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const auto image = static_cast<int64_t>(index);
  const int64_t b = job.plan.seqlen * job.plan.Kb * job.plan.d_state;
  const int64_t c = job.plan.seqlen * job.plan.Kc * job.plan.d_state;
  job.kernels->widen(job.half_B + image * b, job.plan.dtype, job.B + image * b, b);
  job.kernels->widen(job.half_C + image * c, job.plan.dtype, job.C + image * c, c);
}

/// Whether every gap is 1, but that of a first step, which has no effect; and there is no delta0,
/// which times 0 may be NaN.
bool every_place(const SelectiveScanArgs& args, const SelectiveScanShape& shape) {
  const auto* gap = static_cast<const int32_t*>(args.gap.data);
  const int64_t rows = args.gap.dims[0] * shape.directions;
  int32_t others = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t* own = gap + row * shape.seqlen;
    for (int64_t t = 1; t < shape.seqlen; ++t) others |= own[t] ^ 1;
  }
  return others == 0 && !args.constant_gap;
}

}  // namespace

ScanPlan plan_from(const SelectiveScanArgs& args, const SelectiveScanShape& shape) {
  ScanPlan plan = {};
  plan.batch = shape.batch;
  plan.seqlen = shape.seqlen;
  plan.directions = shape.directions;
  plan.d_inner = shape.d_inner;
  plan.d_state = shape.d_state;
  plan.Ku = shape.Ku;
  plan.Kd = shape.Kd;
  plan.Ka = shape.Ka;
  plan.Kb = shape.Kb;
  plan.Kc = shape.Kc;
  plan.Ks = shape.Ks;
  const auto steps = [&shape](int64_t K, int64_t width) {
    const Strides strides = strides_of(shape, K, width);
    return ScanPlan::Steps{strides.image, strides.direction, strides.token};
  };
  plan.u_steps = steps(shape.Ku, shape.d_inner);
  plan.delta_steps = steps(shape.Kd, shape.d_inner);
  plan.B_steps = steps(shape.Kb, shape.d_state);
  plan.C_steps = steps(shape.Kc, shape.d_state);
  plan.decays = shape.decays;
  plan.dtype = args.u.dtype;
  plan.u = args.u.data;
  plan.delta = args.delta.data;
  plan.A = static_cast<const float*>(args.A.data);
  plan.B = static_cast<const float*>(args.B.data);
  plan.C = static_cast<const float*>(args.C.data);
  plan.D = static_cast<const float*>(args.D.data);
  plan.delta_bias = static_cast<const float*>(args.delta_bias.data);
  plan.order = static_cast<const int32_t*>(args.order.data);
  plan.gap = static_cast<const int32_t*>(args.gap.data);
  const int64_t table = shape.directions * shape.seqlen;
  plan.order_stride = shape.order_per_image ? table : 0;
  plan.gap_stride = shape.gap_per_image ? table : 0;
  plan.z = args.gated ? args.z.data : nullptr;
  plan.delta0 = args.constant_gap ? static_cast<const float*>(args.delta0.data) : nullptr;
  plan.delta_softplus = args.delta_softplus != 0;
  plan.params_by_step = args.params_by_step != 0;
  plan.every_place = every_place(args, shape);
  plan.scale = args.scale;
  plan.sums = static_cast<float*>(args.y);
  plan.y = args.y;
  return plan;
}

Status selective_scan_cpu(const SelectiveScanArgs& args, const ParallelFor& parallel_for) {
  SelectiveScanShape shape;
  Status status = check(args, &shape);
  if (!status.ok()) return status;
  Job job = {};
  status = select_cpu_kernels(&job.kernels);
  if (!status.ok()) return status;
  status = check_values(args, shape);
  if (!status.ok()) return status;
  if (shape.batch == 0) return {};

  job.plan = plan_from(args, shape);
  job.plan.blocks_per_unit = blocks_per_unit(shape);
  const int64_t channels = kChannels * job.plan.blocks_per_unit;
  job.units = (shape.d_inner + channels - 1) / channels;
  std::unique_ptr<float[]> scratch;
  if (job.plan.dtype != DType::kFloat32) {
    const int64_t tokens = shape.batch * shape.seqlen;
    const int64_t b = tokens * shape.Kb * shape.d_state;
    const int64_t c = tokens * shape.Kc * shape.d_state;
    const int64_t sums = shape.directions > 1 ? tokens * shape.d_inner : 0;
    scratch.reset(new (std::nothrow) float[static_cast<size_t>(b + c + sums)]);
    if (scratch == nullptr) {
      return Status::error(args.name, ": no memory for ", (b + c + sums) * 4,
                           " bytes of scratch; run smaller batches");
    }
    job.half_B = static_cast<const uint16_t*>(args.B.data);
    job.half_C = static_cast<const uint16_t*>(args.C.data);
    job.plan.B = job.B = scratch.get();
    job.plan.C = job.C = scratch.get() + b;
    job.plan.sums = scratch.get() + b + c;
    parallel_for(widen_image, static_cast<size_t>(shape.batch), &job);
  }
  parallel_for(run_unit, static_cast<size_t>(shape.batch * job.units), &job);
  return {};
}

}  // namespace vssm
