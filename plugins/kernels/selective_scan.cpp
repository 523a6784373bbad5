// The rules of the three scan operators; what they compute is in selective_scan.h.
#include "plugins/kernels/selective_scan.h"

#include <memory>
#include <new>

#include "plugins/kernels/rules.h"

namespace vssm {
namespace {

void check_ranks(const SelectiveScanArgs& args, Rules* rules) {
  const DType dtype = rules->float_type("u", args.u, 4);
  rules->rank_and_type("delta", args.delta, 4, dtype);
  rules->rank_and_type("A", args.A, 3, DType::kFloat32);
  rules->rank_and_type("B", args.B, 4, dtype);
  rules->rank_and_type("C", args.C, 4, dtype);
  rules->rank_and_type("D", args.D, 2, DType::kFloat32);
  rules->rank_and_type("delta_bias", args.delta_bias, 2, DType::kFloat32);
  rules->rank_and_type("order", args.order, 3, DType::kInt32);
  rules->rank_and_type("gap", args.gap, 3, DType::kInt32);
  if (args.gated) rules->rank_and_type("z", args.z, 3, dtype);
  if (args.constant_gap) rules->rank_and_type("delta0", args.delta0, 2, DType::kFloat32);
}

/// Of u, delta, B and C.
int token_axis(const SelectiveScanArgs& args) { return args.direction_axis == 1 ? 2 : 1; }

SelectiveScanShape read_shape(const SelectiveScanArgs& args) {
  SelectiveScanShape shape = {};
  const int tokens = token_axis(args), axis = 3 - tokens;
  shape.batch = args.u.dims[0];
  shape.seqlen = args.u.dims[tokens];
  shape.directions_outside = axis == 1;
  shape.directions = args.order.dims[1];
  shape.d_inner = args.u.dims[3];
  shape.d_state = args.B.dims[3];
  shape.decays = args.A.dims[2];
  shape.Ku = args.u.dims[axis];
  shape.Kd = args.delta.dims[axis];
  shape.Ka = args.A.dims[0];
  shape.Kb = args.B.dims[axis];
  shape.Kc = args.C.dims[axis];
  shape.Ks = args.D.dims[0];
  shape.order_per_image = args.order.dims[0] != 1;
  shape.gap_per_image = args.gap.dims[0] != 1;
  return shape;
}

void check_switches(const SelectiveScanArgs& args, Rules* rules) {
  rules->range("delta_softplus", args.delta_softplus, 0, 1, "it is a switch");
  rules->range("params_by_step", args.params_by_step, 0, 1, "it is a switch");
  rules->range("direction_axis", args.direction_axis, 1, 2, "it is an axis of u, delta, B and C");
  rules->finite("scale", args.scale);
}

void check_ranges(const SelectiveScanShape& shape, Rules* rules) {
  constexpr int64_t kMany = int64_t{1} << 31;
  rules->range("batch", shape.batch, 0, kMany, "check the shape of u");
  rules->range("seqlen", shape.seqlen, 1, kMany - 1, "a scan needs at least one token");
  rules->range("directions", shape.directions, 1, 1 << 20, "give order a row for each direction");
  rules->range("d_inner", shape.d_inner, 1, kMany, "check the shape of u");
  rules->range(
      "d_state", shape.d_state, 1, kMaxDState,
      "run the file without this library (fallback body), or raise kMaxDState and rebuild");
}

void check_sizes(const SelectiveScanArgs& args, const SelectiveScanShape& s, Rules* rules) {
  const int tokens = token_axis(args);
  rules->shared("u", "Ku", s.Ku, s.directions);
  rules->shared("delta", "Kd", s.Kd, s.directions);
  rules->shared("A", "Ka", s.Ka, s.directions);
  rules->shared("B", "Kb", s.Kb, s.directions);
  rules->shared("C", "Kc", s.Kc, s.directions);
  rules->shared("D", "Ks", s.Ks, s.directions);
  rules->size("delta", "batch", args.delta.dims[0], s.batch);
  rules->size("delta", "seqlen", args.delta.dims[tokens], s.seqlen);
  rules->size("delta", "d_inner", args.delta.dims[3], s.d_inner);
  rules->size("A", "d_inner", args.A.dims[1], s.d_inner);
  rules->shared("A", "d_state", s.decays, s.d_state);
  rules->size("B", "batch", args.B.dims[0], s.batch);
  rules->size("B", "seqlen", args.B.dims[tokens], s.seqlen);
  rules->size("C", "batch", args.C.dims[0], s.batch);
  rules->size("C", "seqlen", args.C.dims[tokens], s.seqlen);
  rules->size("C", "d_state", args.C.dims[3], s.d_state);
  rules->size("D", "d_inner", args.D.dims[1], s.d_inner);
  rules->size("delta_bias", "Kd", args.delta_bias.dims[0], s.Kd);
  rules->size("delta_bias", "d_inner", args.delta_bias.dims[1], s.d_inner);
  rules->shared("order", "batch", args.order.dims[0], s.batch);
  rules->size("order", "seqlen", args.order.dims[2], s.seqlen);
  rules->shared("gap", "batch", args.gap.dims[0], s.batch);
  rules->size("gap", "directions", args.gap.dims[1], s.directions);
  rules->size("gap", "seqlen", args.gap.dims[2], s.seqlen);
  if (args.gated) {
    rules->size("z", "batch", args.z.dims[0], s.batch);
    rules->size("z", "seqlen", args.z.dims[1], s.seqlen);
    rules->size("z", "d_inner", args.z.dims[2], s.d_inner);
  }
  if (args.constant_gap) {
    rules->size("delta0", "Kd", args.delta0.dims[0], s.Kd);
    rules->size("delta0", "d_inner", args.delta0.dims[1], s.d_inner);
  }
}

/// One direction of one image. `seen` has seqlen bytes.
Status check_order(const char* op, const int32_t* order, int64_t seqlen, char* seen) {
  for (int64_t t = 0; t < seqlen; ++t) seen[t] = 0;
  for (int64_t t = 0; t < seqlen; ++t) {
    if (order[t] < 0 || order[t] >= seqlen) {
      return Status::error(op, ": order[", t, "]=", order[t], " is outside [0, ", seqlen - 1,
                           "]; order must name each token of the layer once");
    }
    if (seen[order[t]] != 0) {
      return Status::error(op, ": order[", t, "]=", order[t],
                           " is there twice in one direction; order must be a permutation");
    }
    seen[order[t]] = 1;
  }
  return {};
}

Status check_gap(const char* op, const int32_t* gap, int64_t seqlen) {
  int32_t lowest = 1;
  for (int64_t t = 1; t < seqlen; ++t) lowest = gap[t] < lowest ? gap[t] : lowest;
  if (lowest >= 1 && gap[0] >= 0) return {};
  int64_t t = 0;
  while (t == 0 ? gap[t] >= 0 : gap[t] >= 1) ++t;
  return Status::error(op, ": gap[", t, "]=", gap[t], " is below ", t == 0 ? 0 : 1,
                       "; a step stands for at least its own place (0 only at the first step)");
}

}  // namespace

Status check_attributes(const SelectiveScanArgs& args) {
  Rules rules(args.name);
  check_switches(args, &rules);
  return rules.status();
}

Status check(const SelectiveScanArgs& args, SelectiveScanShape* shape) {
  Rules rules(args.name);
  check_ranks(args, &rules);
  if (!rules.ok()) return rules.status();
  *shape = read_shape(args);
  check_ranges(*shape, &rules);
  check_switches(args, &rules);
  check_sizes(args, *shape, &rules);
  rules.fits("u", args.u);
  rules.fits("delta", args.delta);
  rules.fits("A", args.A);
  rules.fits("B", args.B);
  rules.fits("C", args.C);
  rules.fits("order", args.order);
  return rules.status();
}

Status check_values(const SelectiveScanArgs& args, const SelectiveScanShape& shape) {
  const std::unique_ptr<char[]> seen(new (std::nothrow) char[static_cast<size_t>(shape.seqlen)]);
  if (seen == nullptr) {
    return Status::error(args.name, ": no memory to check order; seqlen=", shape.seqlen);
  }
  const auto* order = static_cast<const int32_t*>(args.order.data);
  const int64_t order_rows = args.order.dims[0] * shape.directions;
  for (int64_t row = 0; row < order_rows; ++row) {
    const Status status =
        check_order(args.name, order + row * shape.seqlen, shape.seqlen, &seen[0]);
    if (!status.ok()) return status;
  }
  const auto* gap = static_cast<const int32_t*>(args.gap.data);
  const int64_t gap_rows = args.gap.dims[0] * shape.directions;
  for (int64_t row = 0; row < gap_rows; ++row) {
    const Status status = check_gap(args.name, gap + row * shape.seqlen, shape.seqlen);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace vssm
