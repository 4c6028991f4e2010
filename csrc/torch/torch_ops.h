/* The torch operators, registered through torch's stable C shim found at run time. */
#ifndef QK_TORCH_OPS_H
#define QK_TORCH_OPS_H

/* Look the shim up in libtorch_cpu (its path; already loaded by torch), register the operators
 * and hand torch's threads to qk_parallel_for. 1: done (a second call does nothing);
 * 0: this torch has no such symbols, nothing was registered. */
int qk_register_torch(const char *libtorch_cpu);

#endif
