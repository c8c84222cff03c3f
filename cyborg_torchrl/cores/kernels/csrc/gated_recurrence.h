// The gated linear recurrence, forward pass. The formula is in gated_recurrence.cpp.

#pragma once

#include "multiply.h"

namespace {

template <class T> struct Gates {
    // loss = decay - 1. From it 1 - decay^2 = -loss (loss + 2) has no cancellation, even if decay is almost 1.
    Vec<T> loss, decay, opening, gate, power;
    INLINE Gates(Vec<T> decay_gate, Vec<T> input_gate, Vec<T> rate) {
        opening = sigmoid<T>(decay_gate);
        gate = sigmoid<T>(input_gate);
        loss = expm1<T>(opening * (rate * T(-2)));
        decay = loss + T(1);
        power = sqrt<T>(-loss * (loss + T(2)));
    }
};

template <class T>
void recur(Sizes s, const T* const* in, const uint8_t* is_init, T* const* out, Part part) {
    const T *inputs = in[0], *rate = in[1], *h_0 = in[2], *initial = in[3];
    T* states = out[0];
    const int64_t D = s.channels;
    for (int64_t t = 0; t < s.steps; ++t)
        for (int64_t row = part.first; row < part.end; ++row) {
            const int64_t at = (t * s.batch + row) * D;
            const T* own = inputs + 3 * at;
            // `states` holds the state before this step already, so the recurrence needs no other memory.
            const T* before = is_init[t * s.batch + row] ? initial + row * D
                              : t ? states + at - s.batch * D : h_0 + row * D;
            for (int64_t d = 0; d < D; d += W<T>) {
                const int k = int(std::min<int64_t>(W<T>, D - d));
                const Gates<T> g(load<T>(own + d, k), load<T>(own + D + d, k), load<T>(rate + d, k));
                const Vec<T> drive = g.power * g.gate * load<T>(own + 2 * D + d, k);
                store<T>(states + at + d, g.decay * load<T>(before + d, k) + drive, k);
            }
        }
}

}  // namespace
