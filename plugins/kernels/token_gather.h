// Contract of TokenGather and TokenGather1, and the selection as arithmetic on keys, which the CPU
// and the CUDA kernel share.
#ifndef VSSM_PLUGINS_KERNELS_TOKEN_GATHER_H_
#define VSSM_PLUGINS_KERNELS_TOKEN_GATHER_H_

#include <cstdint>

#include "plugins/kernels/host_device.h"
#include "plugins/kernels/types.h"

namespace vssm {

/// Keeps the token whose position is `protected_position` and the highest scores, in ascending slot
/// order. Equal scores keep the lower slot, -0 equals +0, NaN ranks below -inf, the protected token
/// above +inf; if no slot holds it, scores alone decide. Positions are distinct within an image.
/// Source of the selection: Zhan et al., arXiv:2409.18962.
struct TokenGatherArgs {
  const char* name = "TokenGather";  // the operator's, for messages
  int count = 2;                     // tensors whose rows are gathered: 1 or 2
  Operand score;                     // float32 (batch, seqlen)
  Operand position;                  // int32 (1 or batch, seqlen)
  Operand x[2];                      // (batch, seqlen, d0), (batch, seqlen, d1), any float type
  int64_t num_keep = 0;
  int64_t protected_position = -1;   // -1: none
  int32_t* kept_position = nullptr;  // (batch, num_keep), overwritten
  void* y[2] = {nullptr, nullptr};   // (batch, num_keep, d), of the type of x, overwritten
};

struct TokenGatherShape {
  int64_t batch, seqlen;
  int64_t width[2];  // d0, d1
};

/// The rule on num_keep alone, for who knows no shapes yet; `seqlen` is -1 where it is not known.
Status check_num_keep(const TokenGatherArgs& args, int64_t seqlen);

/// The rules on all attributes, likewise.
Status check_attributes(const TokenGatherArgs& args, int64_t seqlen);

/// Every rule on ranks, sizes, types and attributes, once, for every adapter. Reads no data.
Status check(const TokenGatherArgs& args, TokenGatherShape* shape);

/// Checks, then runs.
Status token_gather_cpu(const TokenGatherArgs& args, const ParallelFor& parallel_for);

/// Device memory that a launch needs at this shape; never less for larger sizes.
int64_t token_gather_cuda_workspace(const TokenGatherShape& shape);

/// Checks, then launches. Built where there is a CUDA compiler (VSSM_CUDA).
Status token_gather_cuda(const TokenGatherArgs& args, const CudaLaunch& launch);

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

#endif  // VSSM_PLUGINS_KERNELS_TOKEN_GATHER_H_
