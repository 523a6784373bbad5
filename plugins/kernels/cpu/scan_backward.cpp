// Runs a checked backward pass over units of (image, group of blocks of channels), then adds up the
// rows of what units share.
#include <algorithm>
#include <atomic>

#include "plugins/kernels/cpu/aligned.h"
#include "plugins/kernels/cpu/dispatch.h"
#include "plugins/kernels/cpu/kernels.h"
#include "plugins/kernels/selective_scan_backward.h"

namespace vssm {
namespace {

// Blocks of a unit: the gradients of B and C are a sum over channels, which costs a unit once a
// step; but each unit after the first of an image holds a copy of the two.
constexpr int64_t kGroup = 8;
void divide(const SelectiveScanShape& shape, BackwardPlan* plan) {
  plan->blocks = (shape.d_inner + kChannels - 1) / kChannels;
  const int64_t most = std::max(kGroup, shape.d_state / 8);
  plan->groups = (plan->blocks + most - 1) / most;
  plan->blocks_per_group = (plan->blocks + plan->groups - 1) / plan->groups;
  plan->groups = (plan->blocks + plan->blocks_per_group - 1) / plan->blocks_per_group;
  plan->chunk = kBackwardChunk;
  const int64_t chunks = (shape.seqlen + plan->chunk - 1) / plan->chunk;
  const int64_t states = shape.d_state * kChannels;
  const int64_t group = plan->blocks_per_group;
  const int64_t steps = std::min(plan->chunk, shape.seqlen);
  int64_t end = 0;
  const auto take = [&end](int64_t count) {
    end += count;
    return end - count;
  };
  plan->starts = take(chunks * group * states);
  plan->carry = take(group * states);
  plan->sums_of_A = take(group * states);
  plan->sums = take(group * 3 * kChannels);
  plan->decays = take(steps * states);
  plan->states = take((steps + 1) * states);
  plan->lanes_of_B = take(steps * states);
  plan->lanes_of_C = take(steps * states);
  plan->scratch = end;
}

/// Sizes of the shared gradients' rows; the rows but the first of each lie in `memory`, in turn.
/// Returns the floats of all of them.
int64_t lay_out(const SelectiveScanShape& shape, BackwardPlan* plan, float* memory) {
  const int64_t tokens = shape.batch * shape.seqlen;
  int64_t end = 0;
  const auto place = [&end, memory](BackwardPlan::Rows* rows, int64_t size, int64_t count) {
    rows->size = size;
    rows->rest = memory == nullptr ? nullptr : memory + end;
    end += size * std::max<int64_t>(count - 1, 0);
  };
  place(&plan->dB, tokens * shape.Kb * shape.d_state, plan->groups);
  place(&plan->dC, tokens * shape.Kc * shape.d_state, plan->groups);
  place(&plan->dA, shape.Ka * shape.d_inner * shape.decays, shape.batch);
  place(&plan->dD, shape.Ks * shape.d_inner, shape.batch);
  place(&plan->ddelta_bias, shape.Kd * shape.d_inner, shape.batch);
  place(&plan->ddelta0, shape.Kd * shape.d_inner, shape.batch);
  return end;
}

struct Job {
  const CpuKernels* kernels;
  BackwardPlan plan;
  std::atomic<bool> starved{false};
};

void run_unit(void* argument, size_t index) {
  Job& job = *static_cast<Job*>(argument);
  const auto unit = static_cast<int64_t>(index);
  const Floats scratch = allocate(job.plan.scratch);
  if (scratch == nullptr) {
    job.starved = true;
    return;
  }
  const int64_t groups = job.plan.groups;
  job.kernels->backward_unit(job.plan, unit / groups, unit % groups, scratch.get());
}

/// In the order of the rows, whatever thread wrote them.
void add_up(const BackwardPlan::Rows& rows, int64_t count) {
  for (int64_t row = 0; row + 1 < count && rows.first != nullptr; ++row) {
    const float* source = rows.rest + row * rows.size;
    for (int64_t i = 0; i < rows.size; ++i) rows.first[i] += source[i];
  }
}

BackwardPlan plan_from(const SelectiveScanBackwardArgs& args, const SelectiveScanShape& shape) {
  BackwardPlan plan = {};
  plan.scan = plan_from(args.forward, shape);
  plan.dy = static_cast<const float*>(args.dy.data);
  plan.du = args.du;
  plan.ddelta = args.ddelta;
  plan.dz = args.forward.gated ? args.dz : nullptr;
  plan.dB.first = args.dB;
  plan.dC.first = args.dC;
  plan.dA.first = args.dA;
  plan.dD.first = args.dD;
  plan.ddelta_bias.first = args.ddelta_bias;
  plan.ddelta0.first = args.forward.constant_gap ? args.ddelta0 : nullptr;
  divide(shape, &plan);
  return plan;
}

/// The gradients of no image at all: those of what images share are zero.
void clear_shared(const BackwardPlan& plan) {
  for (const auto* rows : {&plan.dA, &plan.dD, &plan.ddelta_bias, &plan.ddelta0}) {
    if (rows->first != nullptr) std::fill_n(rows->first, rows->size, 0.0F);
  }
}

}  // namespace

BackwardMemory selective_scan_backward_cpu_memory(const SelectiveScanShape& shape) {
  BackwardPlan plan = {};
  divide(shape, &plan);
  constexpr auto kSize = static_cast<int64_t>(sizeof(float));
  return {lay_out(shape, &plan, nullptr) * kSize, plan.scratch * kSize};
}

Status check(const SelectiveScanBackwardArgs& args, SelectiveScanShape* shape) {
  const char* name = args.forward.name;
  Status status = check(args.forward, shape);
  if (!status.ok()) return status;
  if (args.forward.u.dtype != DType::kFloat32) {
    return Status::error(name, ": type(u)=", name_of(args.forward.u.dtype),
                         ", but gradients are computed in float32; cast the inputs");
  }
  const Operand& dy = args.dy;
  if (dy.dtype != DType::kFloat32 || dy.rank != 3 || dy.dims[0] != shape->batch ||
      dy.dims[1] != shape->seqlen || dy.dims[2] != shape->d_inner) {
    return Status::error(name, ": dy of type ", name_of(dy.dtype), " and rank ", dy.rank,
                         " is not float32 (batch, seqlen, d_inner)=(", shape->batch, ", ",
                         shape->seqlen, ", ", shape->d_inner, "); give it the type and shape of y");
  }
  return {};
}

Status selective_scan_backward_cpu(const SelectiveScanBackwardArgs& args,
                                   const ParallelFor& parallel_for) {
  SelectiveScanShape shape;
  Status status = check(args, &shape);
  if (!status.ok()) return status;
  Job job;
  status = select_cpu_kernels(&job.kernels);
  if (!status.ok()) return status;
  status = check_values(args.forward, shape);
  if (!status.ok()) return status;
  job.plan = plan_from(args, shape);
  const int64_t count = lay_out(shape, &job.plan, nullptr);
  const Floats rows = allocate(std::max<int64_t>(count, 1));
  if (rows == nullptr) {
    return Status::error(args.forward.name, ": no memory for ", count * 4,
                         " bytes of partial gradients; run smaller batches");
  }
  lay_out(shape, &job.plan, rows.get());
  if (shape.batch == 0) {
    clear_shared(job.plan);
    return {};
  }
  parallel_for(run_unit, static_cast<size_t>(shape.batch * job.plan.groups), &job);
  if (job.starved) {
    return Status::error(args.forward.name, ": no memory for ", job.plan.scratch * 4,
                         " bytes of scratch a thread; use fewer threads");
  }
  add_up(job.plan.dB, job.plan.groups);
  add_up(job.plan.dC, job.plan.groups);
  const BackwardPlan::Rows of_images[] = {job.plan.dA, job.plan.dD, job.plan.ddelta_bias,
                                          job.plan.ddelta0};
  for (const auto& shared : of_images) add_up(shared, shape.batch);
  return {};
}

}  // namespace vssm
