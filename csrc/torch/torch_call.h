/* One call of an operator through torch's stable shim: its tensors, its error, its result. */
#ifndef QK_TORCH_CALL_H
#define QK_TORCH_CALL_H

#include <stddef.h>
#include <stdio.h>

#include "qk.h"
#include "torch/torch_shim.h"

extern torch_shim qk_shim;

/* The meaning of an operator's cells: that of torch 2.10. Later ones translate. */
static const uint64_t qk_abi_version = (uint64_t)2 << 56 | (uint64_t)10 << 48;

enum { QK_MAX_DIMS = 64, QK_MAX_TENSORS = 8, QK_MESSAGE = 400 };

typedef struct qk_tensor {
    const char *name;
    tensor_handle handle; /* owned */
    void *data;
    int64_t *sizes, dim;
    qk_dtype dtype;
} qk_tensor;

typedef struct qk_call {
    qk_tensor tensors[QK_MAX_TENSORS];
    size_t count;
    char message[QK_MESSAGE]; /* empty: no error */
} qk_call;

/* Checks give 1, or 0 and a message. */
#define QK_FAIL(call, ...) (snprintf((call)->message, QK_MESSAGE, __VA_ARGS__), 0)

/* QK_DTYPES for a type that no argument of ours may have. */
qk_dtype qk_dtype_of_torch(int64_t torch_dtype);

/* The cell's tensor is the call's from here on. */
void qk_take(qk_call *c, const char *name, uint64_t cell);
/* Look at all tensors: on the CPU, made contiguous, of known sizes. */
int qk_open_tensors(qk_call *c);
int qk_check_float(qk_call *c, const qk_tensor *t);
int qk_check_vector(qk_call *c, const qk_tensor *t, int64_t length);
/* A new tensor like `input`, but with `columns` columns; its address goes to *data. */
int qk_make_output(qk_call *c, const qk_tensor *input, int64_t columns, int64_t torch_dtype,
                   tensor_handle *output, void **data);
size_t qk_rows_of(const qk_tensor *input);
/* Hand the output over, or keep nothing of it. */
int qk_return_output(qk_call *c, uint64_t *stack, tensor_handle output, qk_status status);
/* Free the inputs; then report the error, if any. The report is a C++ exception: it must be last.
 */
void qk_finish(qk_call *c, const char *name);

/* The operators of packed weights (torch_packed.c). */
void qk_torch_packed(uint64_t *stack, uint64_t arguments, uint64_t results);
void qk_torch_packed_backward(uint64_t *stack, uint64_t arguments, uint64_t results);

#endif
