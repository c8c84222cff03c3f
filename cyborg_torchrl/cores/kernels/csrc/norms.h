// Norms of rows, forward pass. The formulas are in group_norm.cpp.

#pragma once

#include "lanes.h"

namespace {

// Four independent sums: an addition does not wait for the result of the previous one.
template <class T, class Term> INLINE T total(int64_t size, Term term) {
    T sums[4] = {0, 0, 0, 0};
    int64_t i = 0;
    for (; i + 4 <= size; i += 4)
        for (int k = 0; k < 4; ++k) sums[k] += term(i + k);
    for (; i < size; ++i) sums[0] += term(i);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The inverse root mean square of a group, and 0 for a group of zeros: there the slope would be 1 / sqrt(eps).
template <class T> INLINE T loudness(const T* x, const T* scales, int64_t size, T eps) {
    const T mean = scales ? total<T>(size, [=](int64_t i) { const T v = x[i] * scales[i]; return v * v; }) / T(size)
                          : total<T>(size, [=](int64_t i) { return x[i] * x[i]; }) / T(size);
    return mean == T(0) ? T(0) : T(1) / std::sqrt(mean + eps);
}

template <class T>
INLINE void normalise_groups(int64_t size, Sizes s, const T* x, const T* scales, T* y, Part part) {
    for (int64_t at = part.first * s.channels; at < part.end * s.channels; at += size) {
        const T* own = scales ? scales + at % s.channels : nullptr;
        const T factor = loudness(x + at, own, size, T(s.eps));
        for (int64_t i = 0; i < size; ++i) y[at + i] = x[at + i] * (own ? factor * own[i] : factor);
    }
}

// in: x and its scales, if there are any. s.numbers: channels in a group.
template <class T>
void norm(Sizes s, const T* const* in, const uint8_t*, T* const* out, Part part) {
    const T *x = in[0], *scales = in[1];
    // The usual lengths are constants, so that the compiler can unroll the loops.
    if (s.numbers == 8 && !scales) normalise_groups<T>(8, s, x, nullptr, out[0], part);
    else if (s.numbers == 4 && !scales) normalise_groups<T>(4, s, x, nullptr, out[0], part);
    else normalise_groups<T>(s.numbers, s, x, scales, out[0], part);
}

template <class T> INLINE Vec<T> less_mean(const T* x, int64_t d, int k, T mean) {
    Vec<T> v = load<T>(x + d, k) - mean;
    for (int i = k; i < W<T>; ++i) v[i] = 0;  // beyond the end
    return v;
}

// Mean and inverse standard deviation. Two passes: the mean of squares minus the square of the mean would cancel.
template <class T> INLINE void moments(const T* x, int64_t size, T eps, T& mean, T& scale) {
    Vec<T> total{}, squares{};
    for (int64_t d = 0; d < size; d += W<T>) total += load<T>(x + d, int(std::min<int64_t>(W<T>, size - d)));
    mean = sum<T>(total) / T(size);
    for (int64_t d = 0; d < size; d += W<T>) {
        const Vec<T> v = less_mean<T>(x, d, int(std::min<int64_t>(W<T>, size - d)), mean);
        squares += v * v;
    }
    scale = T(1) / std::sqrt(sum<T>(squares) / T(size) + eps);
}

// in: a, the weight and bias of its norm, then b, the weight and bias of its norm
template <class T>
void added_norms(Sizes s, const T* const* in, const uint8_t*, T* const* out, Part part) {
    const int64_t size = s.channels;
    T* y = out[0];
    for (int64_t row = part.first; row < part.end; ++row) {
        const T *a = in[0] + row * size, *b = in[3] + row * size;
        T mean_a, scale_a, mean_b, scale_b;
        moments<T>(a, size, T(s.eps), mean_a, scale_a);
        moments<T>(b, size, T(s.eps), mean_b, scale_b);
        for (int64_t d = 0; d < size; d += W<T>) {
            const int k = int(std::min<int64_t>(W<T>, size - d));
            const Vec<T> of_a = (load<T>(a + d, k) - mean_a) * scale_a * load<T>(in[1] + d, k) + load<T>(in[2] + d, k);
            const Vec<T> of_b = (load<T>(b + d, k) - mean_b) * scale_b * load<T>(in[4] + d, k) + load<T>(in[5] + d, k);
            store<T>(y + row * size + d, of_a + of_b, k);
        }
    }
}

}  // namespace
