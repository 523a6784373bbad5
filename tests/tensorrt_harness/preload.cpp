// A program that is linked with TensorRT and asks it for one of our creators; a test runs it with
// LD_PRELOAD. The function that answers stands two behind registerCreator in the registry.
#include <cstdio>
#include <cstring>

#include "plugins/tensorrt/host_abi.h"

namespace {

template <typename Registry>
size_t register_slot() {
  const auto function = &Registry::registerCreator;
  size_t words[2];  // how GCC and Clang keep a pointer to a virtual function: one past its offset
  std::memcpy(words, &function, sizeof(words));
  return words[0] / sizeof(void*);
}

}  // namespace

extern "C" void* getPluginRegistry();
extern "C" int getInferLibVersion();

int main() {
  using Get = void* (*)(void*, const char* name, const char* version, const char* space);
  void* const registry = getPluginRegistry();
  const size_t slot = getInferLibVersion() / 10000 == 10 ? register_slot<vssm::trt::Registry10>()
                                                         : register_slot<vssm::trt::Registry11>();
  const auto get = (*static_cast<Get* const*>(registry))[slot + 2];
  std::puts(get(registry, "TokenGather", "1", "vssm") != nullptr ? "found" : "absent");
}
