// The gated linear recurrence of `lru`, gates included, and its gradient. See lanes.h and native.py.
//
//     a = exp(-2 sigmoid(decay_gate) rate);   h = a h_before + sqrt(1 - a^2) sigmoid(input_gate) x
//
// decay_gate, input_gate and x are joined: `inputs` is [T, B, 3 D].
// The outer loop is over steps, the inner loop over the rows of a thread. So memory is read and written in order.

#include "gated_recurrence.h"

namespace {

template <class T>
void recur_backward(Sizes s, const T* const* in, const uint8_t* is_init, T* const* out, Part part) {
    const T *inputs = in[0], *rate = in[1], *h_0 = in[2], *initial = in[3], *states = in[4], *grad_states = in[5];
    // The carried gradient is the gradient of h_0 in the end. The caller sets it and `grad_initial` to zero.
    T *grad_inputs = out[0], *carry = out[1], *grad_initial = out[2], *grad_rate = out[3] + part.thread * s.channels;
    const int64_t D = s.channels;
    std::vector<Vec<T>> of_step((D + W<T> - 1) / W<T>);  // sums of one step: fewer digits are lost
    for (int64_t t = s.steps - 1; t >= 0; --t) {
        std::fill(of_step.begin(), of_step.end(), Vec<T>{});
        for (int64_t row = part.first; row < part.end; ++row) {
            // Gates are recomputed here, so the forward pass stores only the states.
            const int64_t at = (t * s.batch + row) * D, state = row * D;
            const bool begins = is_init[t * s.batch + row];
            const T* own = inputs + 3 * at;
            T* to = grad_inputs + 3 * at;
            const T* before = begins ? initial + state : t ? states + at - s.batch * D : h_0 + state;
            for (int64_t d = 0; d < D; d += W<T>) {
                const int k = int(std::min<int64_t>(W<T>, D - d));
                const Vec<T> rates = load<T>(rate + d, k), input = load<T>(own + 2 * D + d, k);
                const Gates<T> g(load<T>(own + d, k), load<T>(own + D + d, k), rates);
                const Vec<T> grad = load<T>(grad_states + at + d, k) + load<T>(carry + state + d, k);
                const Vec<T> through = grad * g.gate, to_x = through * g.power;
                store<T>(to + 2 * D + d, to_x, k);
                store<T>(to + D + d, to_x * input * (T(1) - g.gate), k);
                // a d/da (h a + sqrt(1 - a^2) v) = a (h - a v / sqrt(1 - a^2))
                // If a rounds to 1, the power is 0. The floor avoids a division by zero.
                const Vec<T> safe = g.power < T(1e-18) ? Vec<T>{} + T(1e-18) : g.power;
                const Vec<T> to_log = (grad * load<T>(before + d, k) - g.decay * through * input / safe) * g.decay *
                                      g.opening;
                store<T>(to + d, to_log * (T(1) - g.opening) * (rates * T(-2)), k);
                of_step[d / W<T>] -= T(2) * to_log;
                const Vec<T> passed = g.decay * grad;
                // At a reset the gradient goes to the initial state and does not reach the step before.
                if (begins) {
                    T* sum = grad_initial + state + d;
                    store<T>(sum, load<T>(sum, k) + passed, k);
                }
                store<T>(carry + state + d, begins ? Vec<T>{} : passed, k);
            }
        }
        for (int64_t d = 0; d < D; d += W<T>) {
            const int k = int(std::min<int64_t>(W<T>, D - d));
            store<T>(grad_rate + d, load<T>(grad_rate + d, k) + of_step[d / W<T>], k);
        }
    }
}

}  // namespace

INTERFACE(recur)
INTERFACE(recur_backward)
