/* torch's stable C shim, declared here as far as it is used: no torch header, no C++, nothing to
 * link. torch_ops.c looks the functions up in the libtorch_cpu that Python has loaded. */
#ifndef QK_TORCH_SHIM_H
#define QK_TORCH_SHIM_H

#include <stdbool.h>
#include <stdint.h>

typedef struct tensor_object *tensor_handle;
typedef struct library_object *library_handle;
typedef void (*stable_kernel)(uint64_t *stack, uint64_t arguments, uint64_t results);

/* Functions that return int32_t return 0 for success. */
#define SHIM(F)                                                                                    \
    F(int32_t, aoti_torch_library_init_fragment,                                                   \
      (const char *space, const char *file, uint32_t line, library_handle *library))               \
    F(int32_t, aoti_torch_library_init_impl,                                                       \
      (const char *space, const char *key, const char *file, uint32_t line,                        \
       library_handle *library))                                                                   \
    F(int32_t, aoti_torch_library_def, (library_handle library, const char *schema))               \
    F(int32_t, torch_library_impl,                                                                 \
      (library_handle library, const char *name, stable_kernel kernel, uint64_t version))          \
    F(int32_t, torch_call_dispatcher,                                                              \
      (const char *name, const char *overload, uint64_t *stack, uint64_t version))                 \
    F(int32_t, aoti_torch_delete_tensor_object, (tensor_handle tensor))                            \
    F(int32_t, aoti_torch_get_data_ptr, (tensor_handle tensor, void **data))                       \
    F(int32_t, aoti_torch_get_dim, (tensor_handle tensor, int64_t * dim))                          \
    F(int32_t, aoti_torch_get_sizes, (tensor_handle tensor, int64_t * *sizes))                     \
    F(int32_t, aoti_torch_get_dtype, (tensor_handle tensor, int32_t * dtype))                      \
    F(int32_t, aoti_torch_get_device_type, (tensor_handle tensor, int32_t * type))                 \
    F(int32_t, aoti_torch_is_contiguous, (tensor_handle tensor, bool *is_contiguous))              \
    F(int32_t, aoti_torch_empty_strided,                                                           \
      (int64_t dim, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device,   \
       int32_t index, tensor_handle *tensor))                                                      \
    F(int32_t, aoti_torch_device_type_cpu, (void))                                                 \
    F(int32_t, aoti_torch_memory_format_contiguous_format, (void))                                 \
    F(int32_t, aoti_torch_dtype_float32, (void))                                                   \
    F(int32_t, aoti_torch_dtype_float64, (void))                                                   \
    F(int32_t, aoti_torch_dtype_float16, (void))                                                   \
    F(int32_t, aoti_torch_dtype_bfloat16, (void))                                                  \
    F(int32_t, aoti_torch_dtype_int8, (void))                                                      \
    F(int32_t, aoti_torch_dtype_uint8, (void))                                                     \
    F(void, aoti_torch_check,                                                                      \
      (bool condition, const char *function, const char *file, uint32_t line,                      \
       const char *message))                                                                       \
    F(int32_t, torch_parallel_for,                                                                 \
      (int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t, int64_t, void *),            \
       void *context))                                                                             \
    F(int32_t, torch_get_num_threads, (uint32_t * threads))

#define DECLARE(type, name, arguments) type(*name) arguments;
typedef struct torch_shim {
    SHIM(DECLARE)
} torch_shim;
#undef DECLARE

#endif
