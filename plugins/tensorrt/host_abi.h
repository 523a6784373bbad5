// The objects of TensorRT that changed between 10 and 11: the registry lost four functions for old
// creators, so that all that follow moved up, and loggers became versioned interfaces, which put
// four functions before theirs. `getInferLibVersion` of the library that an object is from tells
// which it is. Declared from TensorRT's documentation; trt_abi_check.cpp compares with the SDK's.
#ifndef VSSM_PLUGINS_TENSORRT_HOST_ABI_H_
#define VSSM_PLUGINS_TENSORRT_HOST_ABI_H_

#include "plugins/tensorrt/trt_abi.h"

namespace vssm::trt {

/// IPluginRegistry of TensorRT 10. What is never called has no signature.
class Registry10 {
 public:
  virtual void unused_0() = 0;
  virtual void unused_1() = 0;
  virtual void unused_2() = 0;

 protected:
  virtual ~Registry10() = default;

 public:
  virtual void unused_5() = 0;
  virtual void unused_6() = 0;
  virtual void unused_7() = 0;
  virtual void unused_8() = 0;
  virtual void unused_9() = 0;
  virtual void unused_10() = 0;
  virtual void unused_11() = 0;
  virtual bool registerCreator(IPluginCreatorInterface& creator,
                               const AsciiChar* pluginNamespace) noexcept = 0;
};

/// IPluginRegistry of TensorRT 11.
class Registry11 {
 protected:
  virtual ~Registry11() = default;

 public:
  virtual void unused_2() = 0;
  virtual void unused_3() = 0;
  virtual void unused_4() = 0;
  virtual void unused_5() = 0;
  virtual void unused_6() = 0;
  virtual void unused_7() = 0;
  virtual bool registerCreator(IPluginCreatorInterface& creator,
                               const AsciiChar* pluginNamespace) noexcept = 0;
};

enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3 };

/// ILogger and ILoggerFinder of TensorRT 10.
class Logger10 {
 public:
  virtual void log(Severity severity, const AsciiChar* text) noexcept = 0;
  virtual ~Logger10() = default;
};

class LoggerFinder10 {
 public:
  virtual Logger10* findLogger() = 0;

 protected:
  virtual ~LoggerFinder10() = default;
};

/// The same of TensorRT 11.
class Logger11 : public IVersionedInterface {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILogger", 1, 0}; }
  virtual void log(Severity severity, const AsciiChar* text) noexcept = 0;
};

class LoggerFinder11 : public IVersionedInterface {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILoggerFinder", 1, 0}; }
  virtual Logger11* findLogger() = 0;
};

}  // namespace vssm::trt

#endif  // VSSM_PLUGINS_TENSORRT_HOST_ABI_H_
