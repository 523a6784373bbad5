// What every operator contract is made of: Status, Operand, ParallelFor, CudaLaunch. Standard
// library only.
#ifndef VSSM_PLUGINS_KERNELS_TYPES_H_
#define VSSM_PLUGINS_KERNELS_TYPES_H_

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "plugins/kernels/dtype.h"

namespace vssm {

/// Bytes of one element; 0 for a type that no operator takes.
[[nodiscard]] int64_t size_of(DType dtype);
/// "float32", ... as in the operator table.
[[nodiscard]] const char* name_of(DType dtype);

/// Success, or a message of the form `name=value`, the rule it broke, the remedy.
/// The text lives inside the object: making one neither allocates nor throws, so it may cross a
/// plugin boundary. Longer messages are cut.
class [[nodiscard]] Status {
 public:
  Status() = default;

  template <typename... Parts>
  static Status error(const Parts&... parts) {
    Status status;
    status.ok_ = false;
    (status.append(parts), ...);
    return status;
  }

  bool ok() const { return ok_; }
  const char* message() const { return text_; }

 private:
  void append(std::string_view text);
  void append(const char* text) { append(std::string_view(text)); }
  void append(double number);
  void append(int64_t number);
  void append(int32_t number) { append(static_cast<int64_t>(number)); }

  static constexpr size_t kCapacity = 480;
  bool ok_ = true;
  size_t size_ = 0;
  char text_[kCapacity] = "";
};

constexpr int kMaxRank = 4;

/// A contiguous tensor as the framework describes it. `check` of each operator looks at the
/// description and never at the data behind it.
struct Operand {
  const void* data = nullptr;
  DType dtype = DType::kOther;
  int rank = 0;                 // kMaxRank + 1 stands for "more than any operator takes"
  int64_t dims[kMaxRank] = {};  // the first `rank` count
};

/// How the host runs `task(argument, i)` for i in [0, count), in any order and on any threads.
/// The default runs them in this thread.
struct ParallelFor {
  using Task = void (*)(void* argument, size_t index);
  void (*run)(void* host, Task task, size_t count, void* argument) = nullptr;
  void* host = nullptr;

  void operator()(Task task, size_t count, void* argument) const {
    if (run != nullptr) {
      run(host, task, count, argument);
      return;
    }
    for (size_t i = 0; i < count; ++i) task(argument, i);
  }
};

/// Where a CUDA launcher puts its work. A launcher enqueues on `stream` of the current device and
/// returns: it allocates nothing, never synchronises, and may be captured in a CUDA graph. Every
/// pointer of its arguments is device memory, which it cannot look at: for order, gap and position
/// of any value it touches no memory outside its operands.
struct CudaLaunch {
  void* stream = nullptr;     // cudaStream_t
  void* workspace = nullptr;  // device memory, 256-byte aligned; see <operator>_cuda_workspace
  int64_t workspace_bytes = 0;
};

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_TYPES_H_
