// The rules that operators' operands have in common, with their messages.
#ifndef VSSM_PLUGINS_KERNELS_RULES_H_
#define VSSM_PLUGINS_KERNELS_RULES_H_

#include <cmath>
#include <cstdint>

#include "plugins/kernels/types.h"

namespace vssm {

/// Follows the rules from operand to operand and keeps the first message.
class Rules {
 public:
  explicit Rules(const char* op) : op_(op) {}

  void rank_and_type(const char* name, const Operand& operand, int rank, DType dtype) {
    if (!status_.ok()) return;
    if (operand.rank != rank) {
      status_ = Status::error(op_, ": rank(", name, ")=", operand.rank, ", but it must be ", rank,
                              "; give ", name, " the shape that the operator table has");
    } else if (operand.dtype != dtype) {
      status_ = Status::error(op_, ": type(", name, ")=", name_of(operand.dtype),
                              ", but it must be ", name_of(dtype), "; cast ", name);
    }
  }

  /// Any float type; returns it.
  DType float_type(const char* name, const Operand& operand, int rank) {
    const bool half = operand.dtype == DType::kFloat16 || operand.dtype == DType::kBFloat16;
    rank_and_type(name, operand, rank, half ? operand.dtype : DType::kFloat32);
    return operand.dtype;
  }

  void size(const char* name, const char* axis, int64_t value, int64_t expected) {
    if (!status_.ok() || value == expected) return;
    status_ = Status::error(op_, ": ", axis, "(", name, ")=", value, ", but the other inputs have ",
                            expected, "; give ", name, " the shape that the operator table has");
  }

  void shared(const char* name, const char* axis, int64_t value, int64_t full) {
    if (!status_.ok() || value == full || value == 1) return;
    status_ = Status::error(op_, ": ", axis, "(", name, ")=", value, " is neither 1 (shared) nor ",
                            full, "; slice or repeat ", name, " along this axis");
  }

  void range(const char* name, int64_t value, int64_t low, int64_t high, const char* remedy) {
    if (!status_.ok() || (value >= low && value <= high)) return;
    status_ =
        Status::error(op_, ": ", name, "=", value, " is outside [", low, ", ", high, "]; ", remedy);
  }

  void fits(const char* name, const Operand& operand) {
    int64_t count = 8;  // bytes of the widest element
    for (int i = 0; i < operand.rank; ++i) {
      if (!status_.ok()) return;
      if (__builtin_mul_overflow(count, operand.dims[i], &count)) {
        status_ = Status::error(op_, ": the size of ", name, " overflows; use smaller batches");
      }
    }
  }

  void finite(const char* name, double value) {
    if (!status_.ok() || std::isfinite(value)) return;
    status_ = Status::error(op_, ": ", name, "=", value, " is not finite; correct the attribute");
  }

  const Status& status() const { return status_; }
  bool ok() const { return status_.ok(); }

 private:
  const char* op_;
  Status status_;
};

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_RULES_H_
