// What both libraries tell of themselves.
#include <string>

#include "plugins/kernels/op_table.h"

#define VSSM_EXPORT extern "C" __attribute__((visibility("default")))

/// The text of vssm.ops.spec.describe_table(), from the C++ side.
VSSM_EXPORT const char* vssm_operator_table() {
  static const std::string text = vssm::describe_table();
  return text.c_str();
}

VSSM_EXPORT const char* vssm_version() { return VSSM_VERSION; }
