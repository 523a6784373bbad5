// Threads of our own, for a host that lends none.
#ifndef VSSM_PLUGINS_C_THREADS_H_
#define VSSM_PLUGINS_C_THREADS_H_

#include "plugins/kernels/types.h"

namespace vssm::c {

/// Runs tasks on up to `*threads` threads, the calling one included, which are gone when a call
/// returns: a scan in training takes milliseconds, starting a thread some hundredths of one.
/// Where the system refuses a thread the others do its work.
ParallelFor on_threads(const int32_t* threads);

}  // namespace vssm::c

#endif  // VSSM_PLUGINS_C_THREADS_H_
