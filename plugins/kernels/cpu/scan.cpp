// Runs a checked scan over units of (image, block of channels), or a long list part by part.
#include <algorithm>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#include "plugins/kernels/cpu/aligned.h"
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

/// Wide units where memory counts, as even in number and size as they get; with one decay for all
/// states as wide as their states leave room.
int64_t blocks_per_unit(const SelectiveScanShape& shape) {
  if (shape.decays > 1) return 1;
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

// Elements of an image's u, delta and y from which its list is long: 10 MB of float32, more than
// the caches next to a core. At 7 MB parts cost as much as they save.
constexpr int64_t kLong = 2'500'000;
// Those of a part in one direction, of which two lie in these caches: a part and, on its way, the
// next. Half as many and twice as many were up to 5 % slower in some shape.
constexpr int64_t kPart = 65536;

bool is_long(const SelectiveScanShape& shape) {
  return shape.seqlen >= kLong / ((shape.Ku + shape.Kd + 1) * shape.d_inner);
}

/// Who runs which blocks of an image. `threads` is how many have come, less those that found no
/// share; `turns` counts the parts of each block that are done, in all directions, and is ~turn
/// while a thread is at the next one.
class LongImage {
 public:
  struct Run {
    int64_t first, blocks, turn;
  };

  void begin(int64_t* turns, int64_t blocks, int64_t end) {
    turns_ = turns;
    blocks_ = unfinished_ = blocks;
    end_ = end;
    std::fill(turns, turns + blocks, 0);
  }

  /// -1 where all is done.
  int64_t threads() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return unfinished_ == 0 ? -1 : threads_;
  }

  /// The number of a new thread.
  int64_t join() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return threads_++;
  }

  /// Puts back `run`, which is done, and takes the next part of blocks that lie side by side in
  /// this thread's share: no blocks if it has to wait. Returns false where there is no share for
  /// it; for the thread with the number 0 there is one until all is done.
  bool next(int64_t thread, Run* run) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t turn = run->turn + 1;
    for (int64_t i = 0; i < run->blocks; ++i) turns_[run->first + i] = turn;
    if (turn == end_) unfinished_ -= run->blocks;
    *run = {};
    if (unfinished_ == 0) return false;
    const int64_t share = (unfinished_ + threads_ - 1) / threads_;
    if (thread * share >= unfinished_) {
      threads_ = std::min(threads_, thread);
      return false;
    }
    int64_t place = 0;  // among those that are not finished
    for (int64_t block = 0; block < blocks_; ++block) {
      if (turns_[block] == end_) continue;
      const bool own = place++ / share == thread;
      if (!own || turns_[block] < 0) continue;
      const bool beside = run->blocks > 0 && block == run->first + run->blocks;
      if (beside && turns_[block] == run->turn) {
        ++run->blocks;
      } else if (run->blocks == 0 || turns_[block] < run->turn) {
        *run = {block, 1, turns_[block]};
      }
    }
    for (int64_t i = 0; i < run->blocks; ++i) turns_[run->first + i] = ~run->turn;
    return true;
  }

 private:
  std::mutex mutex_;
  int64_t threads_ = 0, unfinished_ = 0, blocks_ = 0, end_ = 0;
  int64_t* turns_ = nullptr;
};

/// A long list goes through memory once a direction: part by part, and in each one block of
/// channels after the other. If each block went through the whole list, it would read one line of a
/// token where many lie side by side, and go through all pages anew. Several threads at an image
/// share its blocks and keep those that they have: a line that another core has written or called
/// for comes more slowly than one from memory. No number depends on who takes what, and the scratch
/// does not depend on the length.
/// us a token (D 384, N 16, K 2; Xeon, model 207, AVX-512, one thread) with 1,024, 4,096, 16,384
/// and 262,144 tokens: 2.5, 3.0, 3.3 and 3.4 by units, four blocks wide from 8,192 on;
/// so 2.5, 2.6, 2.8 and 2.6. One state, 65,536 tokens: 2.3 and 1.1.
struct LongJob {
  const CpuKernels* kernels;
  const ScanPlan* plan;
  int64_t blocks, steps, parts;  // of an image; of a part; of a direction
  float* memory;                 // of each block of each image
  std::mutex joining;
  std::unique_ptr<LongImage[]> images;

  /// The unfinished image with the fewest threads, or -1; one without threads if there is one.
  int64_t join(int64_t* thread) {
    const std::lock_guard<std::mutex> lock(joining);
    int64_t best = -1, fewest = 0;
    for (int64_t i = 0; i < plan->batch; ++i) {
      const int64_t threads = images[i].threads();
      if (threads < 0 || (best >= 0 && threads >= fewest)) continue;
      best = i;
      fewest = threads;
    }
    if (best >= 0) *thread = images[best].join();
    return best;
  }

  void scan(int64_t image, const LongImage::Run& run) const {
    ScanPart part = {};
    part.image = image;
    part.first = run.first;
    part.blocks = run.blocks;
    part.direction = run.turn / parts;
    part.from = run.turn % parts * steps;
    part.to = std::min(part.from + steps, plan->seqlen);
    part.memory = memory + (image * blocks + run.first) * floats_of_part(plan->d_state);
    kernels->scan_part(*plan, part);
  }
};

/// One of the threads; whoever finds no share in the emptiest image is not needed at all.
void run_parts(void* argument, size_t) {
  LongJob& job = *static_cast<LongJob*>(argument);
  int64_t thread = 0;
  for (int64_t i = job.join(&thread); i >= 0; i = job.join(&thread)) {
    LongImage::Run run = {0, 0, -1};
    while (job.images[i].next(thread, &run)) {
      if (run.blocks > 0) {
        job.scan(i, run);
      } else {  // what has become this thread's share is still another's
        std::this_thread::yield();
      }
    }
    if (job.images[i].threads() >= 0) return;
  }
}

Status scan_long(const CpuKernels* kernels, const ScanPlan& plan, const char* name,
                 const ParallelFor& parallel_for) {
  LongJob job = {};
  job.kernels = kernels;
  job.plan = &plan;
  job.blocks = (plan.d_inner + kChannels - 1) / kChannels;
  job.steps = std::clamp<int64_t>(kPart / (3 * plan.d_inner) / kChannels, 2, 16) * kChannels;
  job.parts = (plan.seqlen + job.steps - 1) / job.steps;
  const auto images = static_cast<size_t>(plan.batch);
  const size_t places = images * static_cast<size_t>(job.blocks);
  const int64_t floats = static_cast<int64_t>(places) * floats_of_part(plan.d_state);
  const Floats memory = allocate(floats);
  job.memory = memory.get();
  job.images.reset(new (std::nothrow) LongImage[images]);
  const std::unique_ptr<int64_t[]> turns(new (std::nothrow) int64_t[places]);
  if (memory == nullptr || job.images == nullptr || turns == nullptr) {
    return Status::error(name, ": no memory for ", floats * 4,
                         " bytes of states; run smaller batches");
  }
  for (int64_t i = 0; i < plan.batch; ++i) {
    job.images[i].begin(turns.get() + i * job.blocks, job.blocks, plan.directions * job.parts);
  }
  parallel_for(run_parts, places, &job);
  return {};
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
  if (is_long(shape) && !job.plan.together()) {
    return scan_long(job.kernels, job.plan, args.name, parallel_for);
  }
  parallel_for(run_unit, static_cast<size_t>(shape.batch * job.units), &job);
  return {};
}

}  // namespace vssm
