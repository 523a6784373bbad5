// Runs a checked convolution over units of (image, some tokens).
#include <algorithm>

#include "plugins/kernels/cpu/conv_source.h"
#include "plugins/kernels/cpu/dispatch.h"

namespace vssm {
namespace {

constexpr int64_t kUnitTokens = 16;
// Larger on a grid, whose tokens share what is read of the taps: a square has many.
constexpr int64_t kUnitOnGrid = 32;
constexpr int64_t kTilesAtOnce = 16;
static_assert(kMaxConvSide * (kMaxConvSide + kTileColumns - 1) == kMaxWindow);

struct Job {
  const CpuKernels* kernels;
  ConvPlan plan;
  const ConvSource* source;
  const char* x;
  char* y;
  int64_t row_bytes;  // of x and y
  int64_t units;      // of an image
};

void run_token(const Job& job, int64_t image, int64_t k, int64_t t) {
  const ConvSource& source = *job.source;
  const TokenConvShape& shape = source.shape;
  ConvTap taps[kMaxConvWidth];
  int64_t count = 0;
  source.for_taps(image, k, t, [&](int64_t j, int64_t s) {
    taps[count++] = {job.x + (image * shape.seqlen + s) * job.row_bytes,
                     source.weight + (k * shape.width + j) * source.padded};
  });
  const int64_t row = (image * shape.directions + k) * shape.seqlen + t;
  job.kernels->conv_token(job.plan, taps, count, source.bias + k * source.padded,
                          job.y + row * job.row_bytes);
}

void run_unit(void* argument, size_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const TokenConvShape& shape = job.source->shape;
  const auto unit = static_cast<int64_t>(index);
  const int64_t image = unit / job.units, first = unit % job.units * kUnitTokens;
  const int64_t end = std::min(first + kUnitTokens, shape.seqlen);
  for (int64_t k = 0; k < shape.directions; ++k) {
    for (int64_t t = first; t < end; ++t) run_token(job, image, k, t);
  }
}

/// Goes through an image's tokens in their order, a tile of neighbouring columns at a time.
class Tiles {
 public:
  Tiles(const Job& job, int64_t image, int64_t first) : job_(job), token_(first) {
    const ConvSource& source = *job.source;
    if (source.position != nullptr) position_ = source.position + image * source.position_stride;
    first_row_ = image * source.shape.seqlen;
  }

  int64_t token() const { return token_; }

  /// The tile that begins with the next token, and no token from `end` on.
  void next(int64_t end, ConvTile* tile) {
    const int64_t side = job_.source->shape.side, columns = job_.source->grid_width;
    const int64_t first = place(token_), column = first % columns;
    const int64_t left = std::min(columns - column, int64_t{kTileColumns});
    std::fill_n(tile->y, kTileColumns, nullptr);
    for (; token_ < end && place(token_) - first < left; ++token_) {
      tile->y[place(token_) - first] = job_.y + (first_row_ + token_) * job_.row_bytes;
    }
    for (int64_t row = 0; row < side; ++row) {
      read_row(first + (row - side / 2) * columns, column, row, tile);
    }
  }

 private:
  /// One row of the window around the tile at `place_of_tile`, were it in that row.
  void read_row(int64_t place_of_tile, int64_t column, int64_t row, ConvTile* tile) {
    const ConvSource& source = *job_.source;
    const int64_t half = source.shape.side / 2, window = source.shape.side + kTileColumns - 1;
    const int64_t begin = place_of_tile - half;
    const int64_t from = std::max<int64_t>(half - column, 0);
    const int64_t to = std::min(source.grid_width - column + half, window);
    const void** x = tile->x + row * window;
    std::fill_n(x, window, nullptr);
    int64_t& next = next_[row];  // tiles go on to the right and down, and so does each row
    if (next < 0) next = first_from(begin + from);
    while (next < source.shape.seqlen && place(next) < begin + from) ++next;
    for (int64_t s = next; s < source.shape.seqlen && place(s) < begin + to; ++s) {
      x[place(s) - begin] = job_.x + (first_row_ + s) * job_.row_bytes;
    }
  }

  int64_t place(int64_t token) const { return position_ == nullptr ? token : position_[token]; }

  int64_t first_from(int64_t wanted) const {
    const int64_t seqlen = job_.source->shape.seqlen;
    if (position_ == nullptr) return std::clamp<int64_t>(wanted, 0, seqlen);
    return std::lower_bound(position_, position_ + seqlen, wanted) - position_;
  }

  const Job& job_;
  const int32_t* position_ = nullptr;
  int64_t first_row_;  // of the image in x and y
  int64_t token_;      // the next one
  int64_t next_[kMaxConvSide] = {-1, -1, -1, -1, -1, -1, -1};
};

void run_unit_on_grid(void* argument, size_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const ConvSource& source = *job.source;
  const auto unit = static_cast<int64_t>(index);
  const int64_t first = unit % job.units * kUnitOnGrid;
  const int64_t end = std::min(first + kUnitOnGrid, source.shape.seqlen);
  const ConvSquare square = {source.shape.side, source.padded, source.weight, source.bias};
  ConvTile some[kTilesAtOnce];
  Tiles tiles(job, unit / job.units, first);
  while (tiles.token() < end) {
    int64_t count = 0;
    while (count < kTilesAtOnce && tiles.token() < end) tiles.next(end, &some[count++]);
    job.kernels->conv_tiles(job.plan, square, some, count);
  }
}

}  // namespace

Status token_conv_cpu(const TokenConvArgs& args, const ParallelFor& parallel_for) {
  TokenConvShape shape;
  Status status = check(args, &shape);
  if (!status.ok()) return status;
  Job job = {};
  status = select_cpu_kernels(&job.kernels);
  if (status.ok()) status = check_values(args, shape);
  if (!status.ok()) return status;
  if (shape.batch == 0) return {};
  const ConvSource source(args, shape);
  if (source.memory == nullptr) return source.starved(args.name);
  job.source = &source;
  job.plan = {shape.d_inner, args.x.dtype, args.activation != 0};
  job.x = static_cast<const char*>(args.x.data);
  job.y = static_cast<char*>(args.y);
  job.row_bytes = shape.d_inner * size_of(args.x.dtype);
  const int64_t tokens = shape.side > 0 ? kUnitOnGrid : kUnitTokens;
  job.units = (shape.seqlen + tokens - 1) / tokens;
  parallel_for(shape.side > 0 ? run_unit_on_grid : run_unit,
               static_cast<size_t>(shape.batch * job.units), &job);
  return {};
}

}  // namespace vssm
