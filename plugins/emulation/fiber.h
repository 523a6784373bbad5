// A function that can be left in the middle and taken up again: one emulated CUDA thread.
#ifndef VSSM_PLUGINS_KERNELS_CUDA_EMULATION_FIBER_H_
#define VSSM_PLUGINS_KERNELS_CUDA_EMULATION_FIBER_H_

#include <cstddef>

namespace vssm::emulation {

/// Not for several threads at once: whoever resumes fibers holds a lock.
class Fiber {
 public:
  using Body = void (*)(void* argument);

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  /// Makes the next resume() call body(argument). What ran here before is forgotten where it stood:
  /// its destructors do not run. False when there is no memory for a stack.
  [[nodiscard]] bool start(Body body, void* argument);
  /// Runs until the body suspends or returns.
  void resume();
  /// Called inside the body: goes back to who resumed.
  void suspend();

 private:
  [[noreturn]] static void run();
  void leave();

  char* stack_ = nullptr;
  Body body_ = nullptr;
  void* argument_ = nullptr;
  void* inside_ = nullptr;      // where the body stands
  void* outside_ = nullptr;     // where who resumed it stands
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

}  // namespace vssm::emulation

#endif  // VSSM_PLUGINS_KERNELS_CUDA_EMULATION_FIBER_H_
