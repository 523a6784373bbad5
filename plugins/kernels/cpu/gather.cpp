#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <new>

#include "plugins/kernels/token_gather.h"

namespace vssm {
namespace {

Status check_x(const TokenGatherArgs& args, int i, const TokenGatherShape& shape) {
  const Operand& x = args.x[i];
  if (x.rank != 3) {
    return Status::error(args.name, ": rank(x", i, ")=", x.rank,
                         ", but it must be 3; give it the shape (batch, seqlen, width)");
  }
  if (x.dtype != DType::kFloat32 && x.dtype != DType::kFloat16 && x.dtype != DType::kBFloat16) {
    return Status::error(args.name, ": type(x", i, ")=", name_of(x.dtype),
                         " is none of float32, float16, bfloat16; cast it");
  }
  if (x.dims[0] != shape.batch || x.dims[1] != shape.seqlen) {
    return Status::error(args.name, ": shape(x", i, ")=(", x.dims[0], ", ", x.dims[1],
                         ", ...), but score has (", shape.batch, ", ", shape.seqlen,
                         "); gather rows of the tokens that were scored");
  }
  int64_t count = size_of(x.dtype);
  for (const int64_t size : {x.dims[0], x.dims[1], x.dims[2]}) {
    if (size < 0 || __builtin_mul_overflow(count, size, &count)) {
      return Status::error(args.name, ": the size of x", i, " overflows; use smaller batches");
    }
  }
  return {};
}

/// The key, and the slot below it: distinct among the slots of an image.
uint64_t rank_of(float score, bool is_protected, int64_t slot) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return (static_cast<uint64_t>(key_of(bits, is_protected)) << 32) |
         (0xFFFFFFFFU - static_cast<uint32_t>(slot));
}

struct Job {
  const TokenGatherArgs* args;
  TokenGatherShape shape;
  uint64_t* ranks;  // (batch, 2, seqlen): in slot order, and a copy to select in
};

void gather_image(void* argument, size_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const TokenGatherArgs& args = *job.args;
  const int64_t seqlen = job.shape.seqlen;
  const int64_t keep = args.num_keep;
  const auto image = static_cast<int64_t>(index);
  const float* score = static_cast<const float*>(args.score.data) + image * seqlen;
  const int32_t* position = static_cast<const int32_t*>(args.position.data) +
                            (args.position.dims[0] == 1 ? 0 : image * seqlen);
  uint64_t* ranks = job.ranks + image * 2 * seqlen;
  uint64_t* selected = ranks + seqlen;
  for (int64_t slot = 0; slot < seqlen; ++slot) {
    const bool is_protected =
        args.protected_position >= 0 && position[slot] == args.protected_position;
    ranks[slot] = selected[slot] = rank_of(score[slot], is_protected, slot);
  }
  std::nth_element(selected, selected + keep - 1, selected + seqlen, std::greater<uint64_t>());
  const uint64_t threshold = selected[keep - 1];
  int64_t row = image * keep;
  for (int64_t slot = 0; slot < seqlen; ++slot) {
    if (ranks[slot] < threshold) continue;
    args.kept_position[row] = position[slot];
    for (int i = 0; i < args.count; ++i) {
      const int64_t bytes = job.shape.width[i] * size_of(args.x[i].dtype);
      if (bytes == 0) continue;
      std::memcpy(static_cast<char*>(args.y[i]) + row * bytes,
                  static_cast<const char*>(args.x[i].data) + (image * seqlen + slot) * bytes,
                  static_cast<size_t>(bytes));
    }
    ++row;
  }
}

}  // namespace

Status check_num_keep(const TokenGatherArgs& args, int64_t seqlen) {
  if (args.num_keep >= 1 && (seqlen < 0 || args.num_keep <= seqlen)) return {};
  constexpr const char* kRemedy =
      "the tokens of this layer; derive it from keep_ratio with PruneSchedule.num_keep()";
  if (seqlen < 0) {
    return Status::error(args.name, ": num_keep=", args.num_keep, " is outside [1, seqlen], ",
                         kRemedy);
  }
  return Status::error(args.name, ": num_keep=", args.num_keep, " is outside [1, ", seqlen, "], ",
                       kRemedy);
}

Status check_attributes(const TokenGatherArgs& args, int64_t seqlen) {
  if (args.protected_position < -1) {
    return Status::error(args.name, ": protected_position=", args.protected_position,
                         " is below -1; give an original place, or -1 for none");
  }
  return check_num_keep(args, seqlen);
}

Status check(const TokenGatherArgs& args, TokenGatherShape* shape) {
  if (args.score.rank != 2 || args.score.dtype != DType::kFloat32) {
    return Status::error(args.name, ": score has rank ", args.score.rank, " and type ",
                         name_of(args.score.dtype), ", but it must be float32 (batch, seqlen)");
  }
  if (args.position.rank != 2 || args.position.dtype != DType::kInt32) {
    return Status::error(args.name, ": position has rank ", args.position.rank, " and type ",
                         name_of(args.position.dtype),
                         ", but it must be int32 (1 or batch, seqlen)");
  }
  *shape = {args.score.dims[0], args.score.dims[1], {0, 0}};
  if (shape->seqlen > INT32_MAX) {
    return Status::error(args.name, ": seqlen=", shape->seqlen, " is more than ",
                         int64_t{INT32_MAX}, "; split the sequence");
  }
  const Status status = check_attributes(args, shape->seqlen);
  if (!status.ok()) return status;
  if ((args.position.dims[0] != 1 && args.position.dims[0] != shape->batch) ||
      args.position.dims[1] != shape->seqlen) {
    return Status::error(args.name, ": shape(position)=(", args.position.dims[0], ", ",
                         args.position.dims[1], ") is neither (1, ", shape->seqlen, ") nor (",
                         shape->batch, ", ", shape->seqlen, "); give each scored token its place");
  }
  for (int i = 0; i < args.count; ++i) {
    const Status x_status = check_x(args, i, *shape);
    if (!x_status.ok()) return x_status;
    shape->width[i] = args.x[i].dims[2];
  }
  return {};
}

Status token_gather_cpu(const TokenGatherArgs& args, const ParallelFor& parallel_for) {
  Job job = {&args, {}, nullptr};
  const Status status = check(args, &job.shape);
  if (!status.ok() || job.shape.batch == 0) return status;
  int64_t count = 2 * static_cast<int64_t>(sizeof(uint64_t));
  if (__builtin_mul_overflow(count, job.shape.batch, &count) ||
      __builtin_mul_overflow(count, job.shape.seqlen, &count)) {
    return Status::error(args.name, ": batch=", job.shape.batch, " is too large; split the batch");
  }
  const auto ranks_count = static_cast<size_t>(2 * job.shape.batch * job.shape.seqlen);
  const std::unique_ptr<uint64_t[]> ranks(new (std::nothrow) uint64_t[ranks_count]);
  if (ranks == nullptr) {
    return Status::error(args.name, ": no memory for ", count, " bytes of ranks; split the batch");
  }
  job.ranks = ranks.get();
  parallel_for(gather_image, static_cast<size_t>(job.shape.batch), &job);
  return {};
}

}  // namespace vssm
