/* What training asks for besides vssm.h: scans and convolutions on several threads of the CPU, and
 * the gradients of both. Tensors, errors and return values are as in vssm.h. The numbers are the
 * same whatever `threads` is, which is at least 1 and counts the calling thread.
 */
#ifndef VSSM_PLUGINS_C_VSSM_TRAINING_H_
#define VSSM_PLUGINS_C_VSSM_TRAINING_H_

#include "plugins/c/vssm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* vssm_selective_scan on the CPU, on up to `threads` threads. */
VSSM_API int vssm_selective_scan_on_threads(const char* op, const vssm_tensor* inputs,
                                            int32_t input_count, const vssm_tensor* y,
                                            const vssm_scan_attributes* attributes, int32_t threads,
                                            char* error, size_t error_bytes);

/* vssm_token_conv on the CPU, on up to `threads` threads. */
VSSM_API int vssm_token_conv_on_threads(const char* op, const vssm_tensor* inputs,
                                        int32_t input_count, const vssm_tensor* y,
                                        const vssm_conv_attributes* attributes, int32_t threads,
                                        char* error, size_t error_bytes);

/* The gradients of a scan, from `dy`, the gradient by y: one for each input but order and gap, in
 * the inputs' order, of the input's shape. All in float32, the inputs too. */
VSSM_API int vssm_selective_scan_backward(const char* op, const vssm_tensor* inputs,
                                          int32_t input_count, const vssm_tensor* dy,
                                          const vssm_tensor* gradients, int32_t gradient_count,
                                          const vssm_scan_attributes* attributes, int32_t threads,
                                          char* error, size_t error_bytes);

/* The bytes that vssm_selective_scan_backward allocates while it runs: bytes[0] once, bytes[1] for
 * each thread. The inputs' data is not looked at. */
VSSM_API int vssm_selective_scan_backward_memory(const char* op, const vssm_tensor* inputs,
                                                 int32_t input_count,
                                                 const vssm_scan_attributes* attributes,
                                                 int64_t* bytes, char* error, size_t error_bytes);

/* The gradients of a convolution, from `dy`, the gradient by y: by x, weight and bias. All in
 * float32, the inputs too. */
VSSM_API int vssm_token_conv_backward(const char* op, const vssm_tensor* inputs,
                                      int32_t input_count, const vssm_tensor* dy,
                                      const vssm_tensor* gradients, int32_t gradient_count,
                                      const vssm_conv_attributes* attributes, int32_t threads,
                                      char* error, size_t error_bytes);

#ifdef __cplusplus
}
#endif

#endif /* VSSM_PLUGINS_C_VSSM_TRAINING_H_ */
