// The CUDA scans: from checked arguments to the kernel that suits the shape.
#include "plugins/kernels/cuda/scan_launch.cuh"
#include "plugins/kernels/selective_scan.h"

namespace vssm {
namespace {

// Warps a multiprocessor, one thread a channel, from which kAuto takes the throughput kernels.
// Chosen by arithmetic, not measured: below, a warp's own latency is not hidden by others. Four
// directions at once have four times the independent work, so fewer warps will do; and the latency
// kernel does not share their decays.
constexpr double kThroughputWarps = 8;
constexpr double kTogetherWarps = 4;

bool aligned_to_four(const void* data, DType dtype, const SelectiveScanShape& shape) {
  const auto bytes = static_cast<uintptr_t>(4 * size_of(dtype));
  return shape.d_state % 4 == 0 && reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

/// Strides of 32 bits keep the address of a row one instruction; steps are counted past the end.
Status check_strides(const char* name, const SelectiveScanShape& shape) {
  constexpr int64_t kMostTokens = INT32_MAX / 2;
  if (shape.seqlen > kMostTokens) {
    return Status::error(name, ": seqlen=", shape.seqlen, " is more than ", kMostTokens,
                         ", what the CUDA kernels take; run it on the CPU, or split the sequence");
  }
  constexpr int64_t kLongest = INT32_MAX / 8;
  const int64_t widest =
      shape.directions * (shape.d_inner > kMaxDState ? shape.d_inner : kMaxDState);
  if (widest <= kLongest) return {};
  return Status::error(name, ": directions * d_inner=", widest, " is more than ", kLongest,
                       ", what the CUDA kernels take; run it on the CPU, or split the channels");
}

void set_strides(const SelectiveScanShape& shape, ScanParams* p) {
  const auto width = static_cast<int32_t>(shape.d_inner);
  const auto states = static_cast<int32_t>(shape.d_state);
  const auto set = [&shape](int64_t K, int64_t row, int32_t* token, int64_t* direction,
                            int64_t* image) {
    const Strides strides = strides_of(shape, K, row);
    *token = static_cast<int32_t>(strides.token);
    *direction = strides.direction;
    *image = strides.image;
  };
  set(shape.Ku, width, &p->u_token, &p->u_direction, &p->u_image);
  set(shape.Kd, width, &p->delta_token, &p->delta_direction, &p->delta_image);
  set(shape.Kb, states, &p->B_token, &p->B_direction, &p->B_image);
  set(shape.Kc, states, &p->C_token, &p->C_direction, &p->C_image);
  p->D_direction = shape.Ks == 1 ? 0 : width;
  p->bias_direction = shape.Kd == 1 ? 0 : width;
  p->A_direction = shape.Ka == 1 ? 0 : shape.d_inner * shape.decays;
  p->A_channel = static_cast<int32_t>(shape.decays);
  const int64_t steps = shape.directions * shape.seqlen;
  p->order_image = shape.order_per_image ? steps : 0;
  p->gap_image = shape.gap_per_image ? steps : 0;
}

ScanParams params_from(const SelectiveScanArgs& args, const SelectiveScanShape& shape) {
  ScanParams p = {};
  p.u = args.u.data;
  p.delta = args.delta.data;
  p.B = args.B.data;
  p.C = args.C.data;
  p.z = args.gated ? args.z.data : nullptr;
  p.A = static_cast<const float*>(args.A.data);
  p.D = static_cast<const float*>(args.D.data);
  p.delta_bias = static_cast<const float*>(args.delta_bias.data);
  p.delta0 = args.constant_gap ? static_cast<const float*>(args.delta0.data) : nullptr;
  p.order = static_cast<const int32_t*>(args.order.data);
  p.gap = static_cast<const int32_t*>(args.gap.data);
  p.y = args.y;
  p.scale = args.scale;
  p.seqlen = static_cast<int32_t>(shape.seqlen);
  p.directions = static_cast<int32_t>(shape.directions);
  p.d_inner = static_cast<int32_t>(shape.d_inner);
  p.d_state = static_cast<int32_t>(shape.d_state);
  p.softplus = args.delta_softplus != 0;
  p.by_step = args.params_by_step != 0;
  p.one_decay = shape.one_decay();
  p.wide_A = aligned_to_four(p.A, DType::kFloat32, shape);
  p.wide_B = aligned_to_four(p.B, args.u.dtype, shape);
  p.wide_C = aligned_to_four(p.C, args.u.dtype, shape);
  set_strides(shape, &p);
  return p;
}

ScanVariant choose(const ScanLaunch& scan) {
  const double warps = static_cast<double>(scan.batch) * ((scan.params.d_inner + 31) / 32);
  const double enough = fits_together(scan.params) ? kTogetherWarps : kThroughputWarps;
  return warps >= enough * scan.limits.sm_count ? ScanVariant::kThroughput : ScanVariant::kLatency;
}

Status run(const ScanLaunch& scan, ScanVariant variant) {
  if (variant == ScanVariant::kAuto) variant = choose(scan);
  if (variant == ScanVariant::kLatency) return launch_latency(scan);
  return fits_together(scan.params) ? launch_together(scan) : launch_throughput(scan);
}

}  // namespace

Status count_blocks(const ScanLaunch& scan, int64_t blocks_per_image, dim3* grid) {
  const int64_t most = INT32_MAX / blocks_per_image;
  if (scan.batch > most) {
    return Status::error(scan.name, ": batch=", scan.batch, " is more than ", most,
                         ", what one launch takes at this d_inner; split the batch");
  }
  *grid = dim3(static_cast<unsigned>(scan.batch * blocks_per_image));
  return {};
}

int64_t selective_scan_cuda_workspace(const SelectiveScanShape& shape, DType dtype,
                                      ScanVariant variant) {
  const int64_t throughput = throughput_workspace(shape, dtype);
  const int64_t latency = latency_workspace(shape);
  if (variant == ScanVariant::kThroughput) return throughput;
  if (variant == ScanVariant::kLatency) return latency;
  return throughput > latency ? throughput : latency;
}

Status selective_scan_cuda(const SelectiveScanArgs& args, ScanVariant variant,
                           const CudaLaunch& launch) {
  SelectiveScanShape shape;
  Status status = check(args, &shape);
  if (!status.ok() || shape.batch == 0) return status;
  status = check_strides(args.name, shape);
  if (!status.ok()) return status;
  status = check_workspace(args.name, launch,
                           selective_scan_cuda_workspace(shape, args.u.dtype, variant));
  if (!status.ok()) return status;
  ScanLaunch scan = {args.name,        args.u.dtype, shape.batch,      params_from(args, shape),
                     launch.workspace, {},           stream_of(launch)};
  status = device_limits(args.name, &scan.limits);
  return status.ok() ? run(scan, variant) : status;
}

}  // namespace vssm
