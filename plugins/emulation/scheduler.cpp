#include "plugins/emulation/scheduler.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace vssm::emulation {
namespace {

constexpr int kPoison = 0xFF;  // NaN in every float type, -1 in integers

}  // namespace

/// splitmix64 (Steele, Lea and Flood, 2014).
size_t Scheduler::draw(size_t count) {
  uint64_t x = random_ += 0x9E3779B97F4A7C15U;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
  return static_cast<size_t>((x ^ (x >> 31)) % count);
}

bool Scheduler::prepare(const Launch& launch, uint64_t seed) {
  launch_ = &launch;
  random_ = seed;
  count_ = size_t{launch.block.x} * launch.block.y * launch.block.z;
  shared_.reset(new (std::nothrow) unsigned char[launch.shared_bytes]);
  while (threads_.size() < count_) threads_.push_back(std::make_unique<Thread>());
  blockDim = launch.block;
  gridDim = launch.grid;
  return shared_ != nullptr;
}

Status Scheduler::run(const char* name, const Launch& launch, uint64_t seed) {
  name_ = name;
  if (!prepare(launch, seed)) return Status::error(name, ": no memory to emulate shared memory");
  std::vector<uint32_t> order(size_t{launch.grid.x} * launch.grid.y * launch.grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<uint32_t>(i);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
  for (const uint32_t i : order) {
    const uint32_t x = i % launch.grid.x, rest = i / launch.grid.x;
    const Status status = run_block({x, rest % launch.grid.y, rest / launch.grid.y});
    if (!status.ok()) return status;
  }
  return {};
}

Status Scheduler::run_block(uint3 block) {
  blockIdx = block;
  std::memset(shared_.get(), kPoison, launch_->shared_bytes);
  met_.clear();
  ready_.clear();
  running_ = count_;
  at_block_barrier_ = 0;
  for (size_t i = 0; i < count_; ++i) {
    const auto flat = static_cast<unsigned>(i);
    const unsigned row = flat / blockDim.x;
    threads_[i]->index = {flat % blockDim.x, row % blockDim.y, row / blockDim.y};
    if (!threads_[i]->fiber.start(run_thread, this)) {
      return Status::error(name_, ": no memory to emulate ", static_cast<int64_t>(count_),
                           " threads");
    }
    ready(i);
  }
  run_ready_threads();
  for (size_t i = 0; i < count_; ++i) {
    if (threads_[i]->state != State::kReturned) return stuck();
  }
  return {};
}

void Scheduler::run_ready_threads() {
  while (!ready_.empty()) {
    const size_t pick = draw(ready_.size());
    current_ = ready_[pick];
    ready_[pick] = ready_.back();
    ready_.pop_back();
    threadIdx = threads_[current_]->index;
    threads_[current_]->fiber.resume();
  }
}

void Scheduler::run_thread(void* argument) {
  auto& self = *static_cast<Scheduler*>(argument);
  self.launch_->thread(self.launch_->argument);
  self.threads_[self.current_]->state = State::kReturned;
  --self.running_;
  // Who waited for this thread waits no longer.
  self.release_block_barrier();
  const size_t first = self.current_ / 32 * 32;
  for (size_t i = first; i < std::min(first + 32, self.count_); ++i) {
    if (self.threads_[i]->state == State::kAtWarp) {
      self.release_warp(first, self.threads_[i]->mask);
    }
  }
}

void Scheduler::ready(size_t thread) {
  threads_[thread]->state = State::kReady;
  ready_.push_back(thread);
}

void Scheduler::suspend() { threads_[current_]->fiber.suspend(); }

void Scheduler::wait_for_block(int line) {
  threads_[current_]->state = State::kAtBlockBarrier;
  threads_[current_]->line = line;
  ++at_block_barrier_;
  release_block_barrier();
  suspend();
}

/// Lets all go on if each thread that has not returned stands at the same barrier.
void Scheduler::release_block_barrier() {
  if (at_block_barrier_ != running_) return;
  int line = -1;
  for (size_t i = 0; i < count_; ++i) {
    const Thread& thread = *threads_[i];
    if (thread.state != State::kAtBlockBarrier) continue;
    if (line != -1 && thread.line != line) return;
    line = thread.line;
  }
  at_block_barrier_ = 0;
  for (size_t i = 0; i < count_; ++i) {
    if (threads_[i]->state == State::kAtBlockBarrier) ready(i);
  }
}

uint64_t Scheduler::exchange(WarpOperation operation, uint32_t mask, uint64_t value, int source) {
  Thread& self = *threads_[current_];
  self.state = State::kAtWarp;
  self.operation = operation;
  self.mask = mask;
  self.value = value;
  self.source = source;
  release_warp(current_ / 32 * 32, mask);
  suspend();
  return self.result;
}

/// Whether each lane of the mask that has not returned asks for the same; a lane that asks without
/// being in its own mask waits for ever.
bool Scheduler::all_lanes_ask(size_t first, uint32_t mask) const {
  const Thread* asked = nullptr;
  for (size_t i = 0; i < 32 && first + i < count_; ++i) {
    if ((mask >> i & 1U) == 0) continue;
    const Thread& thread = *threads_[first + i];
    if (thread.state == State::kReturned) continue;
    if (thread.state != State::kAtWarp || thread.mask != mask) return false;
    if (asked != nullptr && thread.operation != asked->operation) return false;
    asked = &thread;
  }
  return asked != nullptr;
}

void Scheduler::release_warp(size_t first, uint32_t mask) {
  if (!all_lanes_ask(first, mask)) return;
  uint64_t values[32];
  uint64_t ballot = 0;
  std::fill(values, values + 32, ~uint64_t{0});
  for (size_t i = 0; i < 32 && first + i < count_; ++i) {
    const Thread& thread = *threads_[first + i];
    if ((mask >> i & 1U) == 0 || thread.state != State::kAtWarp) continue;
    values[i] = thread.value;
    ballot |= (thread.value & 1U) << i;
  }
  for (size_t i = 0; i < 32 && first + i < count_; ++i) {
    Thread& thread = *threads_[first + i];
    if ((mask >> i & 1U) == 0 || thread.state != State::kAtWarp) continue;
    thread.result =
        thread.operation == WarpOperation::kBallot ? ballot : values[thread.source & 31];
    ready(first + i);
  }
}

Status Scheduler::stuck() const {
  const auto place = [](const Thread& thread) {
    constexpr const char* kNames[] = {"__syncwarp", "a shuffle", "a vote"};
    return thread.state == State::kAtBlockBarrier ? "__syncthreads"
                                                  : kNames[static_cast<int>(thread.operation)];
  };
  // Some thread waits, and some other waits elsewhere: name the first of each.
  const Thread* one = nullptr;
  const Thread* other = nullptr;
  for (size_t i = 0; i < count_; ++i) {
    const Thread& thread = *threads_[i];
    if (thread.state == State::kReturned) continue;
    if (one == nullptr) one = &thread;
    const bool same = thread.state == one->state &&
                      (thread.state == State::kAtBlockBarrier ? thread.line == one->line
                                                              : thread.mask == one->mask);
    if (!same && other == nullptr) other = &thread;
  }
  if (other == nullptr) other = one;
  const auto x = [](unsigned value) { return static_cast<int64_t>(value); };
  return Status::error(name_, ": the threads of block (", x(blockIdx.x), ", ", x(blockIdx.y), ", ",
                       x(blockIdx.z), ") wait for each other: threadIdx.x=", x(one->index.x),
                       " at ", place(*one), ", threadIdx.x=", x(other->index.x), " at ",
                       place(*other),
                       "; all of them must reach the same barrier or warp operation");
}

void Scheduler::meet_shared_memory(void* memory, size_t bytes) {
  if (std::find(met_.begin(), met_.end(), memory) != met_.end()) return;
  met_.push_back(memory);
  std::memset(memory, kPoison, bytes);
}

}  // namespace vssm::emulation
