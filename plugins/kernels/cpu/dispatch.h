// Which instruction set's kernels run.
#ifndef VSSM_PLUGINS_KERNELS_CPU_DISPATCH_H_
#define VSSM_PLUGINS_KERNELS_CPU_DISPATCH_H_

#include "plugins/kernels/cpu/kernels.h"
#include "plugins/kernels/types.h"

namespace vssm {

/// The best kernels this processor runs, or those that the environment variable VSSM_CPU_ISA names
/// (avx512, avx2, baseline; read at every call, so that a test or a benchmark can change it).
/// Refuses a name it does not know and a set that the processor lacks.
Status select_cpu_kernels(const CpuKernels** kernels);

/// The kernels of that name, or null when this build or this processor lacks them.
[[nodiscard]] const CpuKernels* find_cpu_kernels(const char* name);

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CPU_DISPATCH_H_
