#include "plugins/tensorrt/host.h"

#include <dlfcn.h>

#include <cstdio>
#include <mutex>

#include "plugins/tensorrt/host_abi.h"

namespace vssm::trt {
namespace {

struct LogTarget {
  void* finder = nullptr;
  void* (*source)() = nullptr;
  int32_t major = 0;
};

std::mutex g_mutex;  // messages are rare: a lock is cheaper than to prove that none is needed
LogTarget g_target;

/// The library whose code the object runs, from its table of virtual functions.
int32_t major_behind(const void* object) {
  Dl_info info = {};
  if (dladdr(*static_cast<void* const*>(object), &info) == 0) return 0;
  void* const library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  const int32_t major = library == nullptr ? 0 : major_of(library);
  if (library != nullptr) dlclose(library);  // gives back the reference that dlopen took
  return major != 0 ? major : major_of(nullptr);
}

template <typename Logger>
bool log_with(void* logger, const char* text) {
  if (logger == nullptr) return false;
  static_cast<Logger*>(logger)->log(Severity::kERROR, text);
  return true;
}

bool log_to_host(const char* text) {
  LogTarget to;
  {
    const std::lock_guard<std::mutex> lock(g_mutex);
    to = g_target;
  }
  if (to.major == 10) {
    auto* const finder = static_cast<LoggerFinder10*>(to.finder);
    return log_with<Logger10>(finder == nullptr ? to.source() : finder->findLogger(), text);
  }
  if (to.major == 11) {
    auto* const finder = static_cast<LoggerFinder11*>(to.finder);
    return log_with<Logger11>(finder == nullptr ? to.source() : finder->findLogger(), text);
  }
  return false;
}

void set_target(const LogTarget& target) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_target = target;
}

}  // namespace

int32_t major_of(void* library) {
  using Version = int32_t (*)();
  const auto version = reinterpret_cast<Version>(
      dlsym(library == nullptr ? RTLD_DEFAULT : library, "getInferLibVersion"));
  return version == nullptr ? 0 : version() / 10000;  // 101601 is 10.16.1
}

void set_logger_finder(void* finder) {
  set_target({finder, nullptr, finder == nullptr ? 0 : major_behind(finder)});
}

void set_logger_source(void* (*source)(), int32_t major) { set_target({nullptr, source, major}); }

void log_error(const char* node, const Status& status) {
  char text[640];
  const bool named = node != nullptr && node[0] != '\0';
  std::snprintf(text, sizeof(text), "vssm: %s%.120s%s%s", named ? "node " : "", named ? node : "",
                named ? ": " : "", status.message());
  try {  // another's functions: TensorRT does not promise that findLogger throws nothing
    if (log_to_host(text)) return;
  } catch (...) {
  }
  std::fprintf(stderr, "%s\n", text);
}

int32_t report(const char* node, const Status& status) {
  if (status.ok()) return 0;
  log_error(node, status);
  return -1;
}

}  // namespace vssm::trt
