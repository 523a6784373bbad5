// The families of operators under the same names: an adapter does the same with the nodes of each.
//
// Of every family: Args and Shape, its structs; args_of, the arguments of an operator of the table;
// each_attribute, which calls visit(name, pointer); inputs, in the order of the table; output, the
// description of one, and write_to, its memory; check_attributes; and the ways to run it.
#ifndef VSSM_PLUGINS_KERNELS_FAMILIES_H_
#define VSSM_PLUGINS_KERNELS_FAMILIES_H_

#include <array>

#include "plugins/kernels/op_table.h"
#include "plugins/kernels/selective_scan.h"
#include "plugins/kernels/token_conv.h"
#include "plugins/kernels/token_gather.h"
#include "plugins/kernels/token_scatter.h"

namespace vssm {

struct ScanFamily {
  using Args = SelectiveScanArgs;
  using Shape = SelectiveScanShape;
  static constexpr Family kFamily = Family::kSelectiveScan;
  /// Of the CUDA kernels; 0 lets them choose.
  static constexpr std::array<int32_t, 2> kVariants = {static_cast<int32_t>(kScanVariants[0]),
                                                       static_cast<int32_t>(kScanVariants[1])};
  static_assert(sizeof(kScanVariants) / sizeof(kScanVariants[0]) == kVariants.size());

  static Args args_of(const OperatorSpec& spec) {
    Args args;
    args.name = spec.name;
    args.gated = spec.inputs[9].name == "z";
    args.constant_gap = spec.inputs[9].name == "delta0";
    return args;
  }
  template <typename Visit>
  static void each_attribute(Args* args, const Visit& visit) {
    visit("delta_softplus", &args->delta_softplus);
    visit("params_by_step", &args->params_by_step);
    visit("scale", &args->scale);
    visit("direction_axis", &args->direction_axis);
  }
  static std::array<Operand*, 10> inputs(Args* args) {
    return {&args->u,          &args->delta,
            &args->A,          &args->B,
            &args->C,          &args->D,
            &args->delta_bias, &args->order,
            &args->gap,        args->gated ? &args->z : &args->delta0};
  }
  static Operand output(const Args& args, const Shape& shape, int) {
    return {nullptr, args.u.dtype, 3, {shape.batch, shape.seqlen, shape.d_inner}};
  }
  static void write_to(Args* args, int, void* data) { args->y = data; }

  static Status check_attributes(const Args& args, int64_t) { return vssm::check_attributes(args); }
  static Status run(const Args& args, const ParallelFor& parallel_for) {
    return selective_scan_cpu(args, parallel_for);
  }
  static int64_t workspace(const Args& args, const Shape& shape, int32_t variant) {
    return selective_scan_cuda_workspace(shape, args.u.dtype, static_cast<ScanVariant>(variant));
  }
  static Status launch(const Args& args, int32_t variant, const CudaLaunch& launch) {
    return selective_scan_cuda(args, static_cast<ScanVariant>(variant), launch);
  }
};

struct GatherFamily {
  using Args = TokenGatherArgs;
  using Shape = TokenGatherShape;
  static constexpr Family kFamily = Family::kTokenGather;
  static constexpr std::array<int32_t, 0> kVariants = {};

  static Args args_of(const OperatorSpec& spec) {
    Args args;
    args.name = spec.name;
    args.count = spec.variable_count;
    return args;
  }
  template <typename Visit>
  static void each_attribute(Args* args, const Visit& visit) {
    visit("num_keep", &args->num_keep);
    visit("protected_position", &args->protected_position);
  }
  static std::array<Operand*, 4> inputs(Args* args) {
    return {&args->score, &args->position, &args->x[0], &args->x[1]};
  }
  static Operand output(const Args& args, const Shape& shape, int i) {
    if (i == 0) return {nullptr, DType::kInt32, 2, {shape.batch, args.num_keep}};
    return {nullptr, args.x[i - 1].dtype, 3, {shape.batch, args.num_keep, shape.width[i - 1]}};
  }
  static void write_to(Args* args, int i, void* data) {
    if (i == 0) {
      args->kept_position = static_cast<int32_t*>(data);
    } else {
      args->y[i - 1] = data;
    }
  }

  /// `seqlen` is -1 where it is not known.
  static Status check_attributes(const Args& args, int64_t seqlen) {
    return vssm::check_attributes(args, seqlen);
  }
  static Status run(const Args& args, const ParallelFor& parallel_for) {
    return token_gather_cpu(args, parallel_for);
  }
  static int64_t workspace(const Args&, const Shape& shape, int32_t) {
    return token_gather_cuda_workspace(shape);
  }
  static Status launch(const Args& args, int32_t, const CudaLaunch& launch) {
    return token_gather_cuda(args, launch);
  }
};

struct ConvFamily {
  using Args = TokenConvArgs;
  using Shape = TokenConvShape;
  static constexpr Family kFamily = Family::kTokenConv;
  static constexpr std::array<int32_t, 0> kVariants = {};

  static Args args_of(const OperatorSpec& spec) {
    Args args;
    args.name = spec.name;
    args.on_grid = is_on_grid(spec);
    return args;
  }
  template <typename Visit>
  static void each_attribute(Args* args, const Visit& visit) {
    visit("by_position", &args->by_position);
    visit("activation", &args->activation);
    if (!args->on_grid) return;
    visit("grid_height", &args->grid_height);
    visit("grid_width", &args->grid_width);
    visit("group", &args->group);
  }
  static std::array<Operand*, 4> inputs(Args* args) {
    return {&args->x, &args->weight, &args->bias, &args->position};
  }
  static Operand output(const Args& args, const Shape& shape, int) { return y_of(args, shape); }
  static void write_to(Args* args, int, void* data) { args->y = data; }

  static Status check_attributes(const Args& args, int64_t) { return vssm::check_attributes(args); }
  static Status run(const Args& args, const ParallelFor& parallel_for) {
    return token_conv_cpu(args, parallel_for);
  }
  static int64_t workspace(const Args&, const Shape& shape, int32_t) {
    return token_conv_cuda_workspace(shape);
  }
  static Status launch(const Args& args, int32_t, const CudaLaunch& launch) {
    return token_conv_cuda(args, launch);
  }
};

struct ScatterFamily {
  using Args = TokenScatterArgs;
  using Shape = TokenScatterShape;
  static constexpr Family kFamily = Family::kTokenScatter;
  static constexpr std::array<int32_t, 0> kVariants = {};

  static Args args_of(const OperatorSpec& spec) {
    Args args;
    args.name = spec.name;
    return args;
  }
  template <typename Visit>
  static void each_attribute(Args*, const Visit&) {}
  static std::array<Operand*, 3> inputs(Args* args) {
    return {&args->base, &args->x, &args->position};
  }
  static Operand output(const Args& args, const Shape& shape, int) {
    return {nullptr, args.base.dtype, 3, {shape.batch, shape.full_seqlen, shape.width}};
  }
  static void write_to(Args* args, int, void* data) { args->y = data; }

  static Status check_attributes(const Args&, int64_t) { return {}; }
  static Status run(const Args& args, const ParallelFor& parallel_for) {
    return token_scatter_cpu(args, parallel_for);
  }
  static int64_t workspace(const Args&, const Shape& shape, int32_t) {
    return token_scatter_cuda_workspace(shape);
  }
  static Status launch(const Args& args, int32_t, const CudaLaunch& launch) {
    return token_scatter_cuda(args, launch);
  }
};

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_FAMILIES_H_
