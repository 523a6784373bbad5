// The rules of TokenConv; what it computes is in token_conv.h.
#include "plugins/kernels/token_conv.h"

#include "plugins/kernels/rules.h"

namespace vssm {
namespace {

void check_switches(const TokenConvArgs& args, Rules* rules) {
  rules->range("by_position", args.by_position, 0, 1, "it is a switch");
  rules->range("activation", args.activation, 0, 1, "it is a switch");
}

}  // namespace

Status check_attributes(const TokenConvArgs& args) {
  Rules rules(args.name);
  check_switches(args, &rules);
  return rules.status();
}

Status check(const TokenConvArgs& args, TokenConvShape* shape) {
  constexpr int64_t kMany = int64_t{1} << 31;
  Rules rules(args.name);
  rules.float_type("x", args.x, 3);
  rules.rank_and_type("weight", args.weight, 3, DType::kFloat32);
  rules.rank_and_type("bias", args.bias, 2, DType::kFloat32);
  rules.rank_and_type("position", args.position, 2, DType::kInt32);
  if (!rules.ok()) return rules.status();
  const int64_t *x = args.x.dims, *weight = args.weight.dims;
  *shape = {x[0], x[1], weight[0], x[2], weight[2]};
  check_switches(args, &rules);
  rules.range("batch", shape->batch, 0, kMany, "check the shape of x");
  // Less than 2^31 by what a tap can reach beyond.
  rules.range("seqlen", shape->seqlen, 1, kMany - 1 - kMaxConvWidth, "check the shape of x");
  rules.range("d_inner", shape->d_inner, 1, kMany, "check the shape of x");
  rules.range("K", shape->directions, 1, kMaxConvDirections, "one looks back, a second one ahead");
  rules.range("width", shape->width, 1, kMaxConvWidth,
              "run the file without this library (fallback body)");
  rules.size("weight", "d_inner", weight[1], shape->d_inner);
  rules.size("bias", "K", args.bias.dims[0], shape->directions);
  rules.size("bias", "d_inner", args.bias.dims[1], shape->d_inner);
  rules.shared("position", "batch", args.position.dims[0], shape->batch);
  rules.size("position", "seqlen", args.position.dims[1], shape->seqlen);
  Operand y = args.x;  // the largest
  y.rank = 4;
  y.dims[3] = shape->directions;
  rules.fits("y", y);
  rules.fits("weight", args.weight);
  return rules.status();
}

Status check(const TokenConvBackwardArgs& args, TokenConvShape* shape) {
  const TokenConvArgs& forward = args.forward;
  Status status = check(forward, shape);
  if (!status.ok()) return status;
  Rules rules(forward.name);
  rules.rank_and_type("x", forward.x, 3, DType::kFloat32);  // cast the inputs
  rules.rank_and_type("dy", args.dy, 4, DType::kFloat32);
  if (!rules.ok()) return rules.status();
  rules.size("dy", "batch", args.dy.dims[0], shape->batch);
  rules.size("dy", "K", args.dy.dims[1], shape->directions);
  rules.size("dy", "seqlen", args.dy.dims[2], shape->seqlen);
  rules.size("dy", "d_inner", args.dy.dims[3], shape->d_inner);
  return rules.status();
}

Status check_values(const TokenConvArgs& args, const TokenConvShape& shape) {
  if (args.by_position == 0) return {};
  const auto* position = static_cast<const int32_t*>(args.position.data);
  for (int64_t i = 1; i < args.position.dims[0] * shape.seqlen; ++i) {
    if (i % shape.seqlen == 0 || position[i - 1] < position[i]) continue;
    return Status::error(args.name, ": position[", i % shape.seqlen, "]=", position[i],
                         " is not above ", position[i - 1],
                         ", that of the token before; sort the tokens by position, or use "
                         "by_position=0");
  }
  return {};
}

}  // namespace vssm
