// Runs the threads of one block after another as fibers, and lets them wait for each other.
#ifndef VSSM_PLUGINS_KERNELS_CUDA_EMULATION_SCHEDULER_H_
#define VSSM_PLUGINS_KERNELS_CUDA_EMULATION_SCHEDULER_H_

#include <memory>
#include <vector>

#include "plugins/emulation/device.h"
#include "plugins/emulation/fiber.h"

namespace vssm::emulation {

enum class State { kReady, kAtBlockBarrier, kAtWarp, kReturned };

struct Thread {
  Fiber fiber;
  uint3 index;
  State state;
  int line;  // of the block barrier
  // Of the warp operation:
  WarpOperation operation;
  uint32_t mask;
  uint64_t value, result;
  int source;
};

class Scheduler {
 public:
  /// `seed` draws the order of blocks and of threads.
  Status run(const char* name, const Launch& launch, uint64_t seed);
  void wait_for_block(int line);
  uint64_t exchange(WarpOperation operation, uint32_t mask, uint64_t value, int source);
  void* dynamic_shared_memory() { return shared_.get(); }
  void meet_shared_memory(void* memory, size_t bytes);

 private:
  bool prepare(const Launch& launch, uint64_t seed);
  Status run_block(uint3 block);
  void run_ready_threads();
  void ready(size_t thread);
  void release_block_barrier();
  void release_warp(size_t first, uint32_t mask);
  bool all_lanes_ask(size_t first, uint32_t mask) const;
  Status stuck() const;
  size_t draw(size_t count);
  void suspend();
  static void run_thread(void* scheduler);

  const char* name_ = "";
  const Launch* launch_ = nullptr;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<size_t> ready_;
  std::vector<void*> met_;
  std::unique_ptr<unsigned char[]> shared_;
  size_t count_ = 0;             // threads of a block,
  size_t running_ = 0;           // of these, not returned yet,
  size_t at_block_barrier_ = 0;  // and of these, waiting for the others
  size_t current_ = 0;
  uint64_t random_ = 0;
};

}  // namespace vssm::emulation

#endif  // VSSM_PLUGINS_KERNELS_CUDA_EMULATION_SCHEDULER_H_
