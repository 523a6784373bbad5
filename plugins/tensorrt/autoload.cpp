// libvssm_tensorrt_autoload.so registers the creators by itself when it is loaded, for who opens
// libraries without asking them anything: trtexec --staticPlugins, polygraphy --plugins,
// LD_PRELOAD. It looks for TensorRT's registry in the process and links nothing of TensorRT's.
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstring>

#include "plugins/tensorrt/creator.h"
#include "plugins/tensorrt/host.h"
#include "plugins/tensorrt/host_abi.h"

namespace vssm::trt {
namespace {

constexpr size_t kMaxHosts = 8;

/// Paths of TensorRT's libraries in this process: libnvinfer, libnvinfer_lean, ...
struct Hosts {
  char paths[kMaxHosts][1024];
  size_t count = 0;
};

/// Python loads libraries so that no global look-up finds them: go through the list of all.
int visit(dl_phdr_info* info, size_t, void* argument) {
  Hosts& hosts = *static_cast<Hosts*>(argument);
  const char* const slash = std::strrchr(info->dlpi_name, '/');
  const char* const file = slash == nullptr ? info->dlpi_name : slash + 1;
  // Plugin libraries have the prefix too, and lead to the registry of the library that they need.
  if (std::strncmp(file, "libnvinfer", 10) != 0 || std::strstr(file, "plugin") != nullptr) return 0;
  if (hosts.count == kMaxHosts || std::strlen(info->dlpi_name) >= sizeof(hosts.paths[0])) return 0;
  std::strcpy(hosts.paths[hosts.count++], info->dlpi_name);
  return 0;
}

template <typename Registry>
int register_in(void* registry) {
  int32_t count = 0;
  IPluginCreatorInterface* const* const list = creators(&count);
  int refused = 0;
  for (int32_t i = 0; i < count; ++i) {
    const auto& creator = *static_cast<IPluginCreatorV3One*>(list[i]);
    const bool done =
        static_cast<Registry*>(registry)->registerCreator(*list[i], creator.getPluginNamespace());
    refused += done ? 0 : 1;
  }
  return refused;
}

/// Registers in one TensorRT; an error says what the user can do instead.
Status register_all(void* registry, int32_t major) {
  if (major != 10 && major != 11) {
    return Status::error("autoload: TensorRT=", major, " has a registry that is unknown here, ",
                         "which knows 10 and 11; load libvssm_tensorrt.so with loadLibrary");
  }
  const int refused =
      major == 10 ? register_in<Registry10>(registry) : register_in<Registry11>(registry);
  if (refused == 0) return {};
  return Status::error("autoload: TensorRT refused ", refused,
                       " of the creators, which it has already; load one of libvssm_tensorrt.so "
                       "and libvssm_tensorrt_autoload.so, and load it once");
}

/// The registry of a library, and its logger for us; null where it has none.
void* registry_of(void* library) {
  using Get = void* (*)();
  const auto registry = reinterpret_cast<Get>(dlsym(library, "getPluginRegistry"));
  const auto logger = reinterpret_cast<Get>(dlsym(library, "getLogger"));
  if (registry == nullptr) return nullptr;
  if (logger != nullptr) set_logger_source(logger, major_of(library));
  return registry();
}

__attribute__((constructor)) void register_at_load() {
  Hosts hosts;
  dl_iterate_phdr(visit, &hosts);
  void* done[kMaxHosts] = {};  // a library may answer with the registry that another has
  size_t count = 0;
  for (size_t i = 0; i < hosts.count; ++i) {
    void* const library = dlopen(hosts.paths[i], RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) continue;
    void* const registry = registry_of(library);
    if (registry != nullptr && std::find(done, done + count, registry) == done + count) {
      done[count++] = registry;
      const Status status = register_all(registry, major_of(library));
      if (!status.ok()) log_error(nullptr, status);
    }
    dlclose(library);  // gives back the reference that dlopen took
  }
  if (count > 0) return;
  log_error(nullptr, Status::error("autoload: no TensorRT in this process yet; load it first, or "
                                   "load libvssm_tensorrt.so with loadLibrary"));
}

}  // namespace
}  // namespace vssm::trt
