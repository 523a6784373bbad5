// The device that kernels see: its settings, and one launch at a time.
#include "plugins/emulation/device.h"

#include <atomic>
#include <mutex>

#include "plugins/emulation/scheduler.h"

#define VSSM_EXPORT extern "C" __attribute__((visibility("default")))

namespace vssm::emulation {
namespace {

constexpr unsigned kMaxThreads = 1024;

std::atomic<uint64_t> seed = 0;
std::atomic<int> sm_count = Device().sm_count;
std::atomic<int> shared_limit = Device().shared_bytes;

std::mutex launch_mutex;  // fibers and threadIdx are global
Scheduler scheduler;

Status check_launch(const char* name, const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool fits = threads >= 1 && threads <= kMaxThreads && block.z <= 64 && grid.x >= 1 &&
                    grid.x <= INT32_MAX && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 &&
                    grid.z <= 65535;
  if (fits && launch.shared_bytes <= static_cast<size_t>(shared_limit)) return {};
  const auto x = [](unsigned value) { return static_cast<int64_t>(value); };
  return Status::error(name, ": grid (", x(grid.x), ", ", x(grid.y), ", ", x(grid.z), "), block (",
                       x(block.x), ", ", x(block.y), ", ", x(block.z), ") or ",
                       static_cast<int64_t>(launch.shared_bytes),
                       " bytes of shared memory exceed what a device takes");
}

}  // namespace

void wait_for_block(int line) { scheduler.wait_for_block(line); }

uint64_t exchange(WarpOperation operation, uint32_t mask, uint64_t value, int source) {
  return scheduler.exchange(operation, mask, value, source);
}

void* dynamic_shared_memory() { return scheduler.dynamic_shared_memory(); }

void meet_shared_memory(void* memory, size_t bytes) { scheduler.meet_shared_memory(memory, bytes); }

Status run(const char* name, const Launch& launch) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  const Status status = check_launch(name, launch);
  return status.ok() ? scheduler.run(name, launch, seed) : status;
}

Device device() { return {sm_count, shared_limit}; }

}  // namespace vssm::emulation

/// Chooses the order in which blocks and threads run.
VSSM_EXPORT void vssm_emulation_set_seed(uint64_t value) { vssm::emulation::seed = value; }

/// Makes the emulated device a smaller or larger one.
VSSM_EXPORT void vssm_emulation_set_device(int32_t sm_count, int32_t shared_bytes) {
  vssm::emulation::sm_count = sm_count;
  vssm::emulation::shared_limit = shared_bytes;
}
