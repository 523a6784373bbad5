// Rows copied by one block, from wherever each of them is.
#ifndef VSSM_PLUGINS_KERNELS_CUDA_ROWS_CUH_
#define VSSM_PLUGINS_KERNELS_CUDA_ROWS_CUH_

#include "plugins/kernels/cuda/common.cuh"
#include "plugins/kernels/cuda/rows.h"

namespace vssm {

// Holds a thread to 64 registers, and says how many blocks run at once, by which images are shared
// out. Two units of 16 bytes under way in so many threads are 32 KB an SM, about twice what 3 TB/s
// of an H100 take at a latency of 700 ns.
constexpr int kThreadsOfSm = 1024;

/// Copies source(0), source(1), ... to y's first `rows` rows, as one stream of units over all
/// threads. Two units a thread are under way at once; no division but before the loop.
template <typename Unit, typename Source>
__device__ void copy_units(const Source& source, char* target, int32_t row_bytes, int32_t rows) {
  constexpr int kUnderWay = 2;
  auto* y = reinterpret_cast<Unit*>(target);
  const int32_t units = row_bytes / static_cast<int32_t>(sizeof(Unit));
  const auto threads = static_cast<int32_t>(blockDim.x), thread = static_cast<int32_t>(threadIdx.x);
  const int32_t row_step = threads / units, column_step = threads % units;
  int32_t row = thread / units, column = thread % units;
  while (row < rows) {
    Unit value[kUnderWay];
    int32_t place[kUnderWay];
#pragma unroll
    for (int i = 0; i < kUnderWay; ++i) {
      place[i] = row < rows ? row * units + column : -1;
      if (row < rows) value[i] = reinterpret_cast<const Unit*>(source(row))[column];
      row += row_step;
      column -= units - column_step;  // in this order it cannot overflow
      if (column >= 0) {
        ++row;
      } else {
        column += units;
      }
    }
#pragma unroll
    for (int i = 0; i < kUnderWay; ++i) {
      if (place[i] >= 0) y[place[i]] = value[i];
    }
  }
}

/// The same, `unit` bytes at a time.
template <typename Source>
__device__ void copy_rows(const Source& source, char* y, int32_t row_bytes, int32_t unit,
                          int32_t rows) {
  if (row_bytes == 0) return;
  if (unit == 16) {
    copy_units<uint4>(source, y, row_bytes, rows);
  } else if (unit == 8) {
    copy_units<uint2>(source, y, row_bytes, rows);
  } else if (unit == 4) {
    copy_units<uint32_t>(source, y, row_bytes, rows);
  } else {
    copy_units<uint16_t>(source, y, row_bytes, rows);
  }
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CUDA_ROWS_CUH_
