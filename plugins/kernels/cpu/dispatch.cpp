#include "plugins/kernels/cpu/dispatch.h"

#include <cstdlib>
#include <cstring>

#ifdef VSSM_X86_KERNELS
#include <cpuid.h>
#endif

namespace vssm {
namespace {

#ifdef VSSM_X86_KERNELS
// Not every compiler's __builtin_cpu_supports knows f16c.
bool has_f16c() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1U << 29)) != 0;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

struct Candidates {
  const CpuKernels* best_first[3] = {};
  int count = 0;
  Candidates() {
#ifdef VSSM_X86_KERNELS
    __builtin_cpu_init();
    if (has_avx512()) best_first[count++] = &kAvx512Kernels;
    if (has_avx2()) best_first[count++] = &kAvx2Kernels;
#endif
    best_first[count++] = &kBaselineKernels;
  }
};

const Candidates& candidates() {
  static const Candidates found;
  return found;
}

}  // namespace

const CpuKernels* find_cpu_kernels(const char* name) {
  const Candidates& found = candidates();
  for (int i = 0; i < found.count; ++i) {
    if (std::strcmp(found.best_first[i]->name, name) == 0) return found.best_first[i];
  }
  return nullptr;
}

Status select_cpu_kernels(const CpuKernels** kernels) {
  const char* wanted = std::getenv("VSSM_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    *kernels = candidates().best_first[0];
    return {};
  }
  *kernels = find_cpu_kernels(wanted);
  if (*kernels != nullptr) return {};
  const bool known = std::strcmp(wanted, "avx512") == 0 || std::strcmp(wanted, "avx2") == 0;
  return Status::error("VSSM_CPU_ISA=", wanted,
                       known ? " is an instruction set that this processor or this build lacks"
                             : " is none of avx512, avx2, baseline",
                       "; unset it to use the best one here, which is ",
                       candidates().best_first[0]->name);
}

}  // namespace vssm
