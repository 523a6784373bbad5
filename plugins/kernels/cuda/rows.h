// How the rows that a kernel moves are shared out over a GPU.
#ifndef VSSM_PLUGINS_KERNELS_CUDA_ROWS_H_
#define VSSM_PLUGINS_KERNELS_CUDA_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace vssm {

constexpr int64_t kMaxRowBytes = 1 << 30;

/// Bytes of one access: the widest, up to 16, that all rows start at.
inline int32_t plan_unit(std::initializer_list<const void*> tensors, int64_t row_bytes) {
  auto all = static_cast<uintptr_t>(row_bytes);
  for (const void* tensor : tensors) all |= reinterpret_cast<uintptr_t>(tensor);
  int32_t unit = 16;
  while (unit > 2 && all % static_cast<uintptr_t>(unit) != 0) unit /= 2;
  return unit;
}

/// Of the `count` rows that each image gets, those that one block copies: enough blocks to fill the
/// GPU once, unless a block would be left with too little to be worth what it does first, or with
/// more than it can list or count in 31 bits.
inline int32_t plan_rows(int64_t batch, int32_t count, int64_t row_bytes, int64_t resident_blocks) {
  constexpr int64_t kListed = 8192;          // 32 KB of shared memory
  constexpr int64_t kWorthwhile = 16 << 10;  // bytes; by reckoning, not measured
  const int64_t most = std::min(kListed, kMaxRowBytes / std::max<int64_t>(row_bytes, 1));
  const int64_t chunks = std::max<int64_t>(resident_blocks / batch, 1);
  const int64_t to_fill = (count + chunks - 1) / chunks;
  const int64_t worthwhile = kWorthwhile / std::max<int64_t>(row_bytes, 1) + 1;
  const int64_t rows = std::min(std::max(to_fill, worthwhile), most);
  return static_cast<int32_t>(std::min<int64_t>(rows, count));
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CUDA_ROWS_H_
