// Norms of rows. See native.py.
//
// Norm over groups of neighbouring channels, with gradient:  v = x s;  y = v / sqrt(mean_group(v^2) + eps)
// A group of zeros gives zeros.
// Sum of two layer norms, while acting:  y = LayerNorm(a) + LayerNorm(b)

#include "norms.h"

namespace {

// in: x, the gradient of y, and the scales, if there are any
template <class T>
void norm_backward(Sizes s, const T* const* in, const uint8_t*, T* const* out, Part part) {
    const T *x = in[0], *grad_y = in[1], *scales = in[2];
    T* grad_x = out[0];
    const int64_t size = s.numbers;
    for (int64_t at = part.first * s.channels; at < part.end * s.channels; at += size) {
        const T* own = scales ? scales + at % s.channels : nullptr;
        // The factor is recomputed, so the forward pass stores nothing but x.
        const T factor = loudness(x + at, own, size, T(s.eps));
        const T *v = x + at, *g = grad_y + at;
        const auto y = [=](int64_t i) { return v[i] * (own ? factor * own[i] : factor); };
        const T mean = total<T>(size, [=](int64_t i) { return g[i] * y(i); }) / T(size);
        for (int64_t i = 0; i < size; ++i)
            grad_x[at + i] = (own ? factor * own[i] : factor) * (g[i] - y(i) * mean);
    }
}

}  // namespace

INTERFACE(norm)
INTERFACE(norm_backward)
INTERFACE(added_norms)
