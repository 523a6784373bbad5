// How a gather is spread over a GPU: what the kernel is told, and how many blocks take part.
#ifndef VSSM_PLUGINS_KERNELS_CUDA_GATHER_H_
#define VSSM_PLUGINS_KERNELS_CUDA_GATHER_H_

#include <algorithm>
#include <cstdint>

#include "plugins/kernels/token_gather.h"

namespace vssm {

/// One tensor whose rows are gathered, in accesses of `unit` bytes: the widest, up to 16, that the
/// rows of x and y all start at.
struct RowCopy {
  const char* x;
  char* y;
  int64_t row_bytes;
  int32_t unit;
};

struct GatherTask {
  const float* score;
  const int32_t* position;
  int64_t position_stride;  // from image to image; 0 where they share
  int64_t protected_position;
  int32_t* kept_position;
  int32_t seqlen, num_keep;
  int32_t chunks;  // blocks that share an image: each repeats the selection, which is small beside
  int32_t rows;    // the rows, and copies this many of them
  int32_t count;
  RowCopy copies[2];
};

inline RowCopy plan_copy(const Operand& x, void* y, int64_t row_bytes) {
  RowCopy copy = {static_cast<const char*>(x.data), static_cast<char*>(y), row_bytes, 16};
  const auto all = reinterpret_cast<uintptr_t>(x.data) | reinterpret_cast<uintptr_t>(y) |
                   static_cast<uintptr_t>(row_bytes);
  while (copy.unit > 2 && all % static_cast<uintptr_t>(copy.unit) != 0) copy.unit /= 2;
  return copy;
}

constexpr int64_t kMaxRowBytes = 1 << 30;

/// Rows of an image that one block copies: enough blocks to fill the GPU once, unless a block
/// would be left with too little to be worth its selection, or with more than it can list or count
/// in 31 bits.
inline int32_t plan_rows(int64_t batch, int32_t num_keep, int64_t row_bytes,
                         int64_t resident_blocks) {
  constexpr int64_t kListed = 8192;          // 32 KB of shared memory
  constexpr int64_t kWorthwhile = 16 << 10;  // bytes; by reckoning, not measured
  const int64_t most = std::min(kListed, kMaxRowBytes / std::max<int64_t>(row_bytes, 1));
  const int64_t chunks = std::max<int64_t>(resident_blocks / batch, 1);
  const int64_t to_fill = (num_keep + chunks - 1) / chunks;
  const int64_t worthwhile = kWorthwhile / std::max<int64_t>(row_bytes, 1) + 1;
  const int64_t rows = std::min(std::max(to_fill, worthwhile), most);
  return static_cast<int32_t>(std::min<int64_t>(rows, num_keep));
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CUDA_GATHER_H_
