// The rules of TokenConv and TokenConv2D; what they compute is in token_conv.h.
#include "plugins/kernels/token_conv.h"

#include "plugins/kernels/rules.h"

namespace vssm {
namespace {

void check_switches(const TokenConvArgs& args, Rules* rules) {
  rules->range("by_position", args.by_position, 0, 1, "it is a switch");
  rules->range("activation", args.activation, 0, 1, "it is a switch");
  if (!args.on_grid) return;
  rules->range("grid_height", args.grid_height, 1, INT32_MAX, "give the grid's rows");
  rules->range("grid_width", args.grid_width, 1, INT32_MAX, "give the grid's columns");
  if (!rules->ok()) return;  // their product may be beyond any integer
  rules->range("grid_height * grid_width", args.grid_height * args.grid_width, 1, INT32_MAX,
               "positions are int32");
}

/// What lines and grids have in common.
void check_shared(const TokenConvArgs& args, const TokenConvShape& shape, Rules* rules) {
  constexpr int64_t kMany = int64_t{1} << 31;
  check_switches(args, rules);
  rules->range("batch", shape.batch, 0, kMany, "check the shape of x");
  // Less than 2^31 by what a tap can reach beyond.
  rules->range("seqlen", shape.seqlen, 1, kMany - 1 - kMaxConvWidth, "check the shape of x");
  rules->range("d_inner", shape.d_inner, 1, kMany, "check the shape of x");
  rules->shared("position", "batch", args.position.dims[0], shape.batch);
  rules->size("position", "seqlen", args.position.dims[1], shape.seqlen);
  rules->fits("weight", args.weight);
}

Status check_on_line(const TokenConvArgs& args, TokenConvShape* shape, Rules rules) {
  rules.rank_and_type("bias", args.bias, 2, DType::kFloat32);
  if (!rules.ok()) return rules.status();
  const int64_t *x = args.x.dims, *weight = args.weight.dims;
  *shape = {x[0], x[1], weight[0], x[2], weight[2], 0};
  check_shared(args, *shape, &rules);
  rules.range("K", shape->directions, 1, kMaxConvDirections, "one looks back, a second one ahead");
  rules.range("width", shape->width, 1, kMaxConvWidth,
              "run the file without this library (fallback body)");
  rules.size("weight", "d_inner", weight[1], shape->d_inner);
  rules.size("bias", "K", args.bias.dims[0], shape->directions);
  rules.size("bias", "d_inner", args.bias.dims[1], shape->d_inner);
  return rules.status();
}

Status check_on_grid(const TokenConvArgs& args, TokenConvShape* shape, Rules rules) {
  rules.rank_and_type("bias", args.bias, 1, DType::kFloat32);
  if (!rules.ok()) return rules.status();
  const int64_t *x = args.x.dims, *weight = args.weight.dims;
  *shape = {x[0], x[1], 1, x[2], weight[1] * weight[1], weight[1]};
  check_shared(args, *shape, &rules);
  rules.range("side", weight[1], 1, kMaxConvSide,
              "run the file without this library (fallback body)");
  rules.size("weight", "d_inner", weight[0], shape->d_inner);
  rules.size("weight", "side", weight[2], weight[1]);
  rules.size("bias", "d_inner", args.bias.dims[0], shape->d_inner);
  rules.range("group", args.group, shape->d_inner, shape->d_inner, "it is d_inner");
  if (!rules.ok()) return rules.status();
  const int64_t places = args.grid_height * args.grid_width;
  if (args.by_position == 0) {
    rules.range("seqlen", shape->seqlen, places, places,
                "all tokens of the grid are there, or use by_position=1");
  } else {
    rules.range("seqlen", shape->seqlen, 1, places, "no two tokens share a place on the grid");
  }
  if (!rules.ok() || shape->side % 2 == 1) return rules.status();
  return Status::error(args.name, ": side=", shape->side,
                       " is even, so that no tap is its centre; give an odd one");
}

}  // namespace

Status check_attributes(const TokenConvArgs& args) {
  Rules rules(args.name);
  check_switches(args, &rules);
  return rules.status();
}

Status check(const TokenConvArgs& args, TokenConvShape* shape) {
  Rules rules(args.name);
  rules.float_type("x", args.x, 3);
  rules.rank_and_type("weight", args.weight, 3, DType::kFloat32);
  rules.rank_and_type("position", args.position, 2, DType::kInt32);
  const Status status =
      args.on_grid ? check_on_grid(args, shape, rules) : check_on_line(args, shape, rules);
  if (!status.ok()) return status;
  rules.fits("y", y_of(args, *shape));  // the largest
  return rules.status();
}

Operand y_of(const TokenConvArgs& args, const TokenConvShape& shape) {
  Operand y = {nullptr, args.x.dtype, 3, {shape.batch, shape.seqlen, shape.d_inner}};
  if (args.on_grid) return y;
  return {nullptr, y.dtype, 4, {shape.batch, shape.directions, shape.seqlen, shape.d_inner}};
}

Status check(const TokenConvBackwardArgs& args, TokenConvShape* shape) {
  const TokenConvArgs& forward = args.forward;
  Status status = check(forward, shape);
  if (!status.ok()) return status;
  Rules rules(forward.name);
  rules.rank_and_type("x", forward.x, 3, DType::kFloat32);  // cast the inputs
  const Operand y = y_of(forward, *shape);
  rules.rank_and_type("dy", args.dy, y.rank, DType::kFloat32);
  if (!rules.ok()) return rules.status();
  const char* const axes[] = {"batch", "K", "seqlen", "d_inner"};
  for (int i = 0; i < y.rank; ++i) {
    rules.size("dy", axes[i == 0 ? 0 : i + 4 - y.rank], args.dy.dims[i], y.dims[i]);
  }
  return rules.status();
}

Status check_values(const TokenConvArgs& args, const TokenConvShape& shape) {
  if (args.by_position == 0) return {};
  const auto* position = static_cast<const int32_t*>(args.position.data);
  for (int64_t i = 0; i < args.position.dims[0] * shape.seqlen; ++i) {
    const bool off = position[i] < 0 || position[i] >= args.grid_height * args.grid_width;
    if (args.on_grid && off) {
      return Status::error(args.name, ": position[", i % shape.seqlen, "]=", position[i],
                           " is outside [0, ", args.grid_height * args.grid_width,
                           "), the places of the grid; give original positions");
    }
    if (i % shape.seqlen == 0 || position[i - 1] < position[i]) continue;
    return Status::error(args.name, ": position[", i % shape.seqlen, "]=", position[i],
                         " is not above ", position[i - 1],
                         ", that of the token before; sort the tokens by position, or use "
                         "by_position=0");
  }
  return {};
}

}  // namespace vssm
