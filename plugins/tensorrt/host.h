// The TensorRT that loaded us: its version, and its logger for our messages. Loggers of TensorRT 10
// and 11 differ in their ABI, and no argument tells them apart: the library that an object's code
// is in does.
#ifndef VSSM_PLUGINS_TENSORRT_HOST_H_
#define VSSM_PLUGINS_TENSORRT_HOST_H_

#include "plugins/kernels/types.h"
#include "plugins/tensorrt/trt_abi.h"

namespace vssm::trt {

/// 10 or 11, or another for a TensorRT that we do not know; 0 where `library` (of dlopen, or null
/// for all of this process) is none.
[[nodiscard]] int32_t major_of(void* library);

/// TensorRT's ILoggerFinder, of whichever version.
void set_logger_finder(void* finder);
/// Who gives the ILogger of TensorRT `major`, where there is no finder. It may give null.
void set_logger_source(void* (*source)(), int32_t major);

/// Logs an error; to stderr where TensorRT has given no logger: it must not get lost. `node` is the
/// layer's name; it may be null.
void log_error(const char* node, const Status& status);

/// What a plugin's function returns: 0, or -1 after logging.
[[nodiscard]] int32_t report(const char* node, const Status& status);

}  // namespace vssm::trt

#endif  // VSSM_PLUGINS_TENSORRT_HOST_H_
