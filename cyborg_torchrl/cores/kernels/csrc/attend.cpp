// One query attends to the last steps of its row. The formula is in attention.py, the call in window_attention.py.

#include "norms.h"

namespace {

// in: q [rows, D]; keys [rows, D, C] and values [rows, C, D], from the oldest step on; bias by distance [heads, steps];
// age [rows / heads]. s.steps: the steps of a row, the newest last. s.numbers: C. s.length: heads. s.eps: 1 / sqrt(D).
template <class T>
INLINE void attend_rows(int64_t size, Sizes s, const T* const* in, T* out, Part part) {
    const Room<T> room(2 * s.steps);
    T *weights = room.data(), *by_age = weights + s.steps;
    for (int64_t row = part.first; row < part.end; ++row) {
        const int64_t at = row * size * s.numbers;
        const T *q = in[0] + row * size, *k = in[1] + at, *v = in[2] + at;
        const T* bias = in[3] + row % s.length * s.steps;
        for (int64_t j = 0; j < s.steps; ++j) by_age[j] = bias[s.steps - 1 - j];
        // Steps before the start of the episode are left out.
        const int64_t first = std::max<int64_t>(0, s.steps - int64_t(in[4][row / s.length]));
        Vec<T> best = Vec<T>{} - INFINITY;
        int64_t j = first;
        for (; j + W<T> <= s.steps; j += W<T>) {
            for (int i = 0; i < W<T>; ++i) prefetch(v + (j + i) * size);  // the values come next
            Vec<T> products{};
            for (int64_t i = 0; i < size; ++i) products += load<T>(k + i * s.numbers + j, W<T>) * q[i];
            products = products * T(s.eps) + load<T>(by_age + j, W<T>);
            best = products > best ? products : best;
            store<T>(weights + j, products, W<T>);
        }
        T highest = best[0];
        for (int i = 1; i < W<T>; ++i) highest = std::max<T>(highest, best[i]);
        for (; j < s.steps; ++j) {
            const T product = total<T>(size, [=](int64_t i) { return k[i * s.numbers + j] * q[i]; });
            weights[j] = product * T(s.eps) + by_age[j];
            highest = std::max(highest, weights[j]);
        }
        Vec<T> sums{};
        for (j = first; j < s.steps; j += W<T>) {
            const int lanes = int(std::min<int64_t>(W<T>, s.steps - j));
            Vec<T> power = expm1<T>(load<T>(weights + j, lanes) - highest) + T(1);
            for (int i = lanes; i < W<T>; ++i) power[i] = 0;
            sums += power;
            store<T>(weights + j, power, lanes);
        }
        const T scale = T(1) / sum<T>(sums);
        T* read = out + row * size;
        for (int64_t i = 0; i < size; i += W<T>) {
            const int lanes = int(std::min<int64_t>(W<T>, size - i));
            Vec<T> even{}, odd{};  // two sums: an addition does not wait for the one before
            for (j = first; j + 1 < s.steps; j += 2) {
                even += load<T>(v + j * size + i, lanes) * weights[j];
                odd += load<T>(v + (j + 1) * size + i, lanes) * weights[j + 1];
            }
            if (j < s.steps) even += load<T>(v + j * size + i, lanes) * weights[j];
            store<T>(read + i, (even + odd) * scale, lanes);
        }
    }
}

template <class T> void attend(Sizes s, const T* const* in, const uint8_t*, T* const* out, Part part) {
    // The usual sizes are constants, so that the compiler can unroll the loops.
    if (s.channels == 16) attend_rows<T>(16, s, in, out[0], part);
    else if (s.channels == 32) attend_rows<T>(32, s, in, out[0], part);
    else attend_rows<T>(s.channels, s, in, out[0], part);
}

}  // namespace

INTERFACE(attend)
