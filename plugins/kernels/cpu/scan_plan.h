// From a checked call to what the CPU kernels take.
#ifndef VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_CPU_PLAN_H_
#define VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_CPU_PLAN_H_

#include "plugins/kernels/cpu/kernels.h"
#include "plugins/kernels/selective_scan.h"

namespace vssm {

/// `blocks_per_unit` is left to the caller; B and C must be float32 before the kernels run.
ScanPlan plan_from(const SelectiveScanArgs& args, const SelectiveScanShape& shape);

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_SELECTIVE_SCAN_CPU_PLAN_H_
