// Norms of rows. See native.py.
//
// Norm over groups of neighbouring channels, with gradient:  v = x s;  y = v / sqrt(mean_group(v^2) + eps)
// A group of zeros gives zeros.
// Sum of two layer norms, while acting:  y = LayerNorm(a) + LayerNorm(b)

#include "norms.h"

namespace {

template <class T>
void normalise_backward(Groups s, T eps, const T* x, const T* scales, const T* grad_y, T* grad_x, int64_t first,
                        int64_t end) {
    for (int64_t at = first * s.channels; at < end * s.channels; at += s.size) {
        const T* own = scales ? scales + at % s.channels : nullptr;
        // The factor is recomputed, so the forward pass stores nothing but x.
        const T factor = loudness(x + at, own, s.size, eps);
        const T *v = x + at, *g = grad_y + at;
        const auto y = [=](int64_t i) { return v[i] * (own ? factor * own[i] : factor); };
        const T mean = total<T>(s.size, [=](int64_t i) { return g[i] * y(i); }) / T(s.size);
        for (int64_t i = 0; i < s.size; ++i)
            grad_x[at + i] = (own ? factor * own[i] : factor) * (g[i] - y(i) * mean);
    }
}

}  // namespace

#define INTERFACE(T, name)                                                                                            \
    extern "C" void cyborg_added_norms_##name(int64_t rows, int64_t size, int64_t threads, double eps,                \
                                              const T* const* inputs, T* y) {                                         \
        split(rows, threads, [=](int64_t, int64_t first, int64_t end) {                                               \
            added_norms<T>(size, T(eps), inputs, y, first, end);                                                      \
        });                                                                                                           \
    }                                                                                                                 \
    extern "C" void cyborg_norm_##name(const int64_t* sizes, int64_t threads, double eps, const T* x, const T* scales,\
                                       T* y) {                                                                        \
        const Groups s{sizes[0], sizes[1], sizes[2]};                                                                 \
        split(s.rows, threads, [=](int64_t, int64_t first, int64_t end) {                                             \
            normalise<T>(s, T(eps), x, scales, y, first, end);                                                        \
        });                                                                                                           \
    }                                                                                                                 \
    extern "C" void cyborg_norm_backward_##name(const int64_t* sizes, int64_t threads, double eps, const T* x,        \
                                                const T* scales, const T* grad_y, T* grad_x) {                        \
        const Groups s{sizes[0], sizes[1], sizes[2]};                                                                 \
        split(s.rows, threads, [=](int64_t, int64_t first, int64_t end) {                                             \
            normalise_backward<T>(s, T(eps), x, scales, grad_y, grad_x, first, end);                                  \
        });                                                                                                           \
    }
INTERFACE(float, float32)
INTERFACE(double, float64)
