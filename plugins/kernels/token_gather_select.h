// Which tokens a gather keeps, as arithmetic on keys; for the CPU and the CUDA kernel.
#ifndef VSSM_PLUGINS_KERNELS_TOKEN_GATHER_SELECT_H_
#define VSSM_PLUGINS_KERNELS_TOKEN_GATHER_SELECT_H_

#include <cstdint>

#include "plugins/kernels/host_device.h"

namespace vssm {

/// A number that is larger the sooner a token is kept: NaN (0) below -inf, -0 equal to +0, the
/// protected token above +inf (0xFF800000). Tokens of the same key are kept from the lower slot.
VSSM_HOST_DEVICE uint32_t key_of(uint32_t score_bits, bool is_protected) {
  constexpr uint32_t kSign = 0x80000000U;
  if (is_protected) return 0xFFFFFFFFU;
  if ((score_bits & ~kSign) > 0x7F800000U) return 0;
  if (score_bits == kSign) score_bits = 0;
  return (score_bits & kSign) != 0 ? ~score_bits : score_bits | kSign;
}

/// Finds the num_keep-th largest key, bit by bit from the highest, by counting: while not done,
/// count the keys that are at least candidate() and tell take(). Each key must be able to count
/// itself, but none needs to know another.
class ThresholdSearch {
 public:
  VSSM_HOST_DEVICE explicit ThresholdSearch(int32_t num_keep) : num_keep_(num_keep) {}

  VSSM_HOST_DEVICE bool done() const { return bit_ == 0; }
  VSSM_HOST_DEVICE uint32_t candidate() const { return threshold_ | bit_; }
  VSSM_HOST_DEVICE void take(int32_t count) {
    if (count >= num_keep_) threshold_ = candidate();
    bit_ = count == num_keep_ ? 0 : bit_ >> 1;  // exactly those: lower bits would change nothing
  }
  /// Keys above are kept, keys below are not, of equal ones as many as are missing.
  VSSM_HOST_DEVICE uint32_t threshold() const { return threshold_; }

 private:
  int32_t num_keep_;
  uint32_t threshold_ = 0;
  uint32_t bit_ = 0x80000000U;
};

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_TOKEN_GATHER_SELECT_H_
