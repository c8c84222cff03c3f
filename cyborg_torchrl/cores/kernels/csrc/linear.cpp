// The gradient of a linear map's weight, summed over all rows of a sequence. See multiply.h and native.py.
//
// torch's libraries copy both matrices first, since their rows are what is summed over; here they are read as they lie.

#include "multiply.h"

#define INTERFACE(T, name)                                                                                            \
    extern "C" void cyborg_grad_weight_##name(int64_t rows, int64_t out, int64_t in, int64_t threads, const T* grad,  \
                                              const T* x, T* grad_weight) {                                           \
        split(out, threads, [=](int64_t, int64_t first, int64_t end) {                                                \
            multiply_transposed<T>(grad, x, grad_weight, out, rows, in, first, end);                                  \
        });                                                                                                           \
    }
INTERFACE(float, float32)
INTERFACE(double, float64)
