// The entry points of libvssm_tensorrt.so, which TensorRT itself loads: registry.load_library,
// trtexec --dynamicPlugins, setPluginsToSerialize, Triton. It needs no library of TensorRT's.
#include "plugins/tensorrt/creator.h"
#include "plugins/tensorrt/host.h"

#define VSSM_EXPORT extern "C" __attribute__((visibility("default")))

/// `finder` is an ILoggerFinder of the TensorRT that calls.
VSSM_EXPORT void setLoggerFinder(void* finder) { vssm::trt::set_logger_finder(finder); }

VSSM_EXPORT vssm::trt::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  return vssm::trt::creators(&count);
}
