// What the kernel of TokenGather is told.
#ifndef VSSM_PLUGINS_KERNELS_CUDA_GATHER_H_
#define VSSM_PLUGINS_KERNELS_CUDA_GATHER_H_

#include <cstdint>

namespace vssm {

/// One tensor whose rows are gathered, in accesses of `unit` bytes.
struct RowCopy {
  const char* x;
  char* y;
  int32_t row_bytes, unit;
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

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CUDA_GATHER_H_
