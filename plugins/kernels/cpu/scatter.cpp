// TokenScatter moves rows and computes nothing: memcpy brings the vector instructions of every
// processor, so there is one kernel for all of them.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "plugins/kernels/rules.h"
#include "plugins/kernels/token_scatter.h"

namespace vssm {
namespace {

constexpr int32_t kBase = -1;

struct Job {
  const TokenScatterArgs* args;
  TokenScatterShape shape;
  int32_t* sources;  // (1 or batch, full_seqlen): the row of x that a place shows, or kBase
};

/// All of it before anything is written: a refused call leaves y as it was.
Status read_sources(const Job& job) {
  const TokenScatterArgs& args = *job.args;
  const int64_t full_seqlen = job.shape.full_seqlen, seqlen = job.shape.seqlen;
  const int64_t images = args.position.dims[0];
  const auto* position = static_cast<const int32_t*>(args.position.data);
  std::fill_n(job.sources, images * full_seqlen, kBase);
  for (int64_t i = 0; i < images * seqlen; ++i) {
    const int64_t image = i / seqlen, token = i % seqlen;
    if (position[i] < 0 || position[i] >= full_seqlen) {
      return Status::error(args.name, ": position[", token, "]=", position[i], " is outside [0, ",
                           full_seqlen - 1, "], the rows of base; give original positions");
    }
    int32_t& source = job.sources[image * full_seqlen + position[i]];
    if (source != kBase) {
      return Status::error(args.name, ": position[", token, "]=", position[i], " is that of token ",
                           source, " too; give each token its own");
    }
    source = static_cast<int32_t>(token);
  }
  return {};
}

/// Rows that lie side by side in x or in base, too, move as one.
void scatter_image(void* argument, size_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const TokenScatterArgs& args = *job.args;
  const int64_t full_seqlen = job.shape.full_seqlen;
  const int64_t row_bytes = job.shape.width * size_of(args.x.dtype);
  const auto image = static_cast<int64_t>(index);
  const int32_t* sources = job.sources + (args.position.dims[0] == 1 ? 0 : image * full_seqlen);
  const char* x = static_cast<const char*>(args.x.data) + image * job.shape.seqlen * row_bytes;
  const char* base = static_cast<const char*>(args.base.data) + image * full_seqlen * row_bytes;
  char* y = static_cast<char*>(args.y) + image * full_seqlen * row_bytes;
  for (int64_t place = 0, end = 0; place < full_seqlen; place = end) {
    const int64_t first = sources[place];
    for (end = place + 1; end < full_seqlen; ++end) {
      if (sources[end] != (first == kBase ? kBase : first + end - place)) break;
    }
    const char* from = first == kBase ? base + place * row_bytes : x + first * row_bytes;
    char* to = y + place * row_bytes;
    if (from != to) std::memcpy(to, from, static_cast<size_t>((end - place) * row_bytes));
  }
}

}  // namespace

Status check(const TokenScatterArgs& args, TokenScatterShape* shape) {
  Rules rules(args.name);
  const DType dtype = rules.float_type("base", args.base, 3);
  rules.rank_and_type("x", args.x, 3, dtype);
  rules.rank_and_type("position", args.position, 2, DType::kInt32);
  if (!rules.ok()) return rules.status();
  const int64_t *base = args.base.dims, *x = args.x.dims;
  *shape = {base[0], base[1], x[1], base[2]};
  rules.range("batch", shape->batch, 0, INT32_MAX, "check the shape of base");
  rules.range("full_seqlen", shape->full_seqlen, 1, INT32_MAX, "check the shape of base");
  rules.range("seqlen", shape->seqlen, 1, shape->full_seqlen,
              "no two tokens share a row of base: give fewer tokens, or the base that they are of");
  rules.range("d", shape->width, 1, INT32_MAX, "check the shape of base");
  rules.size("x", "batch", x[0], shape->batch);
  rules.size("x", "d", x[2], shape->width);
  rules.shared("position", "batch", args.position.dims[0], shape->batch);
  rules.size("position", "seqlen", args.position.dims[1], shape->seqlen);
  rules.fits("base", args.base);
  return rules.status();
}

Status token_scatter_cpu(const TokenScatterArgs& args, const ParallelFor& parallel_for) {
  Job job = {&args, {}, nullptr};
  Status status = check(args, &job.shape);
  if (!status.ok() || job.shape.batch == 0) return status;
  const int64_t count = args.position.dims[0] * job.shape.full_seqlen;
  const std::unique_ptr<int32_t[]> sources(new (std::nothrow) int32_t[static_cast<size_t>(count)]);
  if (sources == nullptr) {
    return Status::error(args.name, ": no memory for ", count, " places; split the batch");
  }
  job.sources = sources.get();
  status = read_sources(job);
  if (status.ok()) parallel_for(scatter_image, static_cast<size_t>(job.shape.batch), &job);
  return status;
}

}  // namespace vssm
