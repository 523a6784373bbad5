#include "plugins/c/threads.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <system_error>
#include <thread>

namespace vssm::c {
namespace {

constexpr size_t kMost = 256;

void run(void* host, ParallelFor::Task task, size_t count, void* argument) {
  const auto threads = static_cast<size_t>(*static_cast<const int32_t*>(host));
  const size_t others = std::min({threads, count, kMost}) - std::min<size_t>(count, 1);
  std::atomic<size_t> next{0};
  const auto work = [&next, task, count, argument] {
    for (size_t i = next++; i < count; i = next++) task(argument, i);
  };
  std::array<std::thread, kMost> started;
  size_t running = 0;
  try {
    for (; running < others; ++running) started[running] = std::thread(work);
  } catch (const std::system_error&) {  // no more threads: fewer do the same
  }
  work();
  for (size_t i = 0; i < running; ++i) started[i].join();
}

}  // namespace

ParallelFor on_threads(const int32_t* threads) { return {run, const_cast<int32_t*>(threads)}; }

}  // namespace vssm::c
