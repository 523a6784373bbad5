// Descriptors of the C ABI into the kernels' structs. In vssm.cpp; used by vssm_training.cpp too.
#ifndef VSSM_PLUGINS_C_READ_H_
#define VSSM_PLUGINS_C_READ_H_

#include "plugins/c/vssm.h"
#include "plugins/kernels/op_table.h"
#include "plugins/kernels/selective_scan.h"
#include "plugins/kernels/token_conv.h"

namespace vssm::c {

/// The ABI's return value; writes the message of a failure to `error`.
int report(const Status& status, char* error, size_t error_bytes);

/// `with_data`: whether the memory must be there already.
Status read_tensor(const OperatorSpec& spec, std::string_view name, const vssm_tensor& tensor,
                   bool with_data, Operand* operand);

/// Attributes and inputs, not yet checked against each other.
Status read_scan(const char* op, const vssm_tensor* inputs, int32_t count,
                 const vssm_scan_attributes* attributes, bool with_data, const OperatorSpec** spec,
                 SelectiveScanArgs* args);

Status read_conv(const char* op, const vssm_tensor* inputs, int32_t count,
                 const vssm_conv_attributes* attributes, bool with_data, const OperatorSpec** spec,
                 TokenConvArgs* args);

}  // namespace vssm::c

#endif  // VSSM_PLUGINS_C_READ_H_
