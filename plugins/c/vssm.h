/* The operators of vssm from C, or from any language that calls C: libvssm.so.
 *
 * An operator reads and writes memory that the caller owns: host memory with a null `launch` (the
 * CPU kernels; the call returns when they are done), device memory of the current CUDA device with
 * a launch (the work is enqueued on its stream; nothing is allocated and nothing waits, so that a
 * call may be captured in a CUDA graph). Tensors are contiguous, channels last. Inputs and outputs
 * stand in the order of the operator table, which vssm_operator_table() prints with every shape
 * and type; docs/operators.md says what is computed.
 *
 * Every call returns 0 on success. On failure it returns 1, has written and enqueued nothing, and
 * leaves a text in `error` (null, or `error_bytes` long; a longer text is cut): the value, the rule
 * it broke, the remedy. An error of CUDA's own may come after earlier work was enqueued. No call
 * throws. Calls from several threads are safe.
 */
#ifndef VSSM_PLUGINS_C_VSSM_H_
#define VSSM_PLUGINS_C_VSSM_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define VSSM_API __attribute__((visibility("default")))
#else
#define VSSM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Element types, in vssm_tensor.dtype. */
enum { VSSM_FLOAT32 = 0, VSSM_FLOAT16 = 1, VSSM_BFLOAT16 = 2, VSSM_INT32 = 3 };

/* A contiguous tensor; the first `rank` of `dims` count. `data` may be null where a dim is 0. */
typedef struct vssm_tensor {
  void* data;
  int32_t dtype;
  int32_t rank;
  int64_t dims[4];
} vssm_tensor;

/* Where CUDA work goes: a cudaStream_t of the current device (null: its default stream), and device
 * memory, aligned to 256 bytes, that no other work uses before this is done. */
typedef struct vssm_launch {
  void* stream;
  void* workspace;
  int64_t workspace_bytes;
} vssm_launch;

/* Attributes of SelectiveScan, GatedSelectiveScan and SelectiveScanConstantGap. */
typedef struct vssm_scan_attributes {
  int64_t delta_softplus; /* 1: delta passes through softplus */
  int64_t params_by_step; /* 1: delta, B and C belong to the step, not to the token */
  float scale;            /* of the sum over directions */
  int16_t variant;        /* CUDA only: 0 chooses, 1 throughput, 2 latency; 0 on the CPU */
  int16_t direction_axis; /* of u, delta, B and C: 2, which 0 means too; 1: (batch, K, seqlen, .) */
} vssm_scan_attributes;

/* Attributes of TokenGather and TokenGather1. */
typedef struct vssm_gather_attributes {
  int64_t num_keep;
  int64_t protected_position; /* -1: none */
} vssm_gather_attributes;

/* Attributes of TokenConv and TokenConv2D; the former reads its two alone. */
typedef struct vssm_conv_attributes {
  int64_t by_position; /* 1: the taps' distances count positions, 0: tokens of the list */
  int64_t activation;  /* 1: the sums go through silu */
  int64_t grid_height;
  int64_t grid_width;
  int64_t group; /* d_inner */
} vssm_conv_attributes;

/* Runs the scan operator named `op`: 9 inputs, or 10 for GatedSelectiveScan (z) and
 * SelectiveScanConstantGap (delta0); output y. On the CPU `order` must be permutations and `gap`
 * at least 1; on CUDA other values give meaningless results but touch no other memory. */
VSSM_API int vssm_selective_scan(const char* op, const vssm_tensor* inputs, int32_t input_count,
                                 const vssm_tensor* y, const vssm_scan_attributes* attributes,
                                 const vssm_launch* launch, char* error, size_t error_bytes);

/* The workspace, in bytes, that a CUDA launch of these inputs needs; their data is not looked at.
 * 0 where none is needed. */
VSSM_API int vssm_selective_scan_workspace(const char* op, const vssm_tensor* inputs,
                                           int32_t input_count,
                                           const vssm_scan_attributes* attributes, int64_t* bytes,
                                           char* error, size_t error_bytes);

/* Runs TokenGather (inputs score, position, x0, x1; outputs kept_position, y0, y1) or TokenGather1
 * (without x1 and y1). */
VSSM_API int vssm_token_gather(const char* op, const vssm_tensor* inputs, int32_t input_count,
                               const vssm_tensor* outputs, int32_t output_count,
                               const vssm_gather_attributes* attributes, const vssm_launch* launch,
                               char* error, size_t error_bytes);

VSSM_API int vssm_token_gather_workspace(const char* op, const vssm_tensor* inputs,
                                         int32_t input_count,
                                         const vssm_gather_attributes* attributes, int64_t* bytes,
                                         char* error, size_t error_bytes);

/* Runs the convolution named `op`, TokenConv or TokenConv2D (inputs x, weight, bias, position;
 * output y). On the CPU positions must ascend where they count, and be places of the grid where
 * there is one; on CUDA others give meaningless results but touch no other memory. */
VSSM_API int vssm_token_conv(const char* op, const vssm_tensor* inputs, int32_t input_count,
                             const vssm_tensor* y, const vssm_conv_attributes* attributes,
                             const vssm_launch* launch, char* error, size_t error_bytes);

VSSM_API int vssm_token_conv_workspace(const char* op, const vssm_tensor* inputs,
                                       int32_t input_count, const vssm_conv_attributes* attributes,
                                       int64_t* bytes, char* error, size_t error_bytes);

/* Runs TokenScatter (inputs base, x, position; output y, whose memory may be base's). On the CPU
 * positions must be distinct within an image and rows of base; on CUDA a token at another position
 * is left out, and of tokens that share one any is taken. */
VSSM_API int vssm_token_scatter(const char* op, const vssm_tensor* inputs, int32_t input_count,
                                const vssm_tensor* y, const vssm_launch* launch, char* error,
                                size_t error_bytes);

VSSM_API int vssm_token_scatter_workspace(const char* op, const vssm_tensor* inputs,
                                          int32_t input_count, int64_t* bytes, char* error,
                                          size_t error_bytes);

/* exp2 evaluations per second of one thread, with the CPU kernels' own code: the floor of a scan's
 * time. `isa`: "baseline", "avx2" or "avx512"; the best of the samples that fit into `seconds`
 * counts. Negative: this processor or this build lacks the instruction set. */
VSSM_API double vssm_exp2_rate(const char* isa, double seconds);

/* Multiplications per second of one thread, each with an addition: the floor of a scan with one
 * decay for all states. Otherwise like vssm_exp2_rate. */
VSSM_API double vssm_product_rate(const char* isa, double seconds);

/* softplus evaluations per second of one thread, one for each step of a channel: in a scan of one
 * state they take longer than its exponentials. Otherwise like vssm_exp2_rate. */
VSSM_API double vssm_softplus_rate(const char* isa, double seconds);

/* 1 where the CUDA kernels are in this library, 0 where it was built without; whether the machine
 * has a GPU is another question. */
VSSM_API int vssm_has_cuda(void);

/* "X.Y.Z" of the package; the text lives as long as the library. */
VSSM_API const char* vssm_version(void);

/* The operators, one a line: name, inputs, outputs, attributes, types. */
VSSM_API const char* vssm_operator_table(void);

#ifdef __cplusplus
}
#endif

#endif /* VSSM_PLUGINS_C_VSSM_H_ */
