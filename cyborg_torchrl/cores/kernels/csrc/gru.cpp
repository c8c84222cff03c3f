// The gated recurrent unit, given the input's part of its gates, and its gradient. See multiply.h and native.py.
//
//     r, u = sigmoid(gates_x + h W + b);   n = tanh(gates_x + r (h W + b));   h := h + u (n - h)

#include "multiply.h"

namespace {

// out: states, and for the gradient `kept` (r, u, n, and h W + b of n) and `previous` (the state before each step).
// Without a gradient the last two are null pointers, and one buffer is reused for all steps.
template <class T>
void gru(Sizes s, const T* const* in, const uint8_t* is_init, T* const* out, Part part) {
    const T *gates_x = in[0], *weight = in[1], *bias = in[2], *h_0 = in[3], *initial = in[4];
    T* states = out[0];
    const int64_t first = part.first, end = part.end;
    const int64_t H = s.channels, rows = end - first, step = s.batch * H;
    std::vector<T> gates(rows * 3 * H), room(out[2] ? 0 : rows * H);
    for (int64_t t = 0; t < s.steps; ++t) {
        T* previous = out[2] ? out[2] + t * step + first * H : room.data();
        for (int64_t row = first; row < end; ++row) {
            const T* from = is_init[t * s.batch + row] ? initial + row * H
                            : t ? states + (t - 1) * step + row * H : h_0 + row * H;
            std::memcpy(previous + (row - first) * H, from, H * sizeof(T));
            std::memcpy(gates.data() + (row - first) * 3 * H, bias, 3 * H * sizeof(T));
        }
        // One product for all rows of the thread: each row of the weight is loaded once for several rows of states.
        multiply<T>(previous, weight, gates.data(), rows, H, 3 * H);
        for (int64_t row = first; row < end; ++row) {
            const T *x = gates_x + (t * s.batch + row) * 3 * H, *own = gates.data() + (row - first) * 3 * H;
            T* kept = out[1] ? out[1] + (t * s.batch + row) * 4 * H : nullptr;
            for (int64_t d = 0; d < H; d += W<T>) {
                const int k = int(std::min<int64_t>(W<T>, H - d));
                const Vec<T> r = sigmoid<T>(load<T>(x + d, k) + load<T>(own + d, k));
                const Vec<T> u = sigmoid<T>(load<T>(x + H + d, k) + load<T>(own + H + d, k));
                const Vec<T> from_h = load<T>(own + 2 * H + d, k), h = load<T>(previous + (row - first) * H + d, k);
                const Vec<T> n = tanh<T>(load<T>(x + 2 * H + d, k) + r * from_h);
                // This form keeps small changes of slow units, which (1 - u) h + u n would round away.
                store<T>(states + t * step + row * H + d, h + u * (n - h), k);
                if (kept) {
                    store<T>(kept + d, r, k);
                    store<T>(kept + H + d, u, k);
                    store<T>(kept + 2 * H + d, n, k);
                    store<T>(kept + 3 * H + d, from_h, k);
                }
            }
        }
    }
}

// In the end `carry` is the gradient of h_0. The caller sets it and `grad_initial` to zero.
template <class T>
void gru_backward(Sizes s, const T* const* in, const uint8_t* is_init, T* const* out, Part part) {
    const T *grad_states = in[0], *weight = in[1], *kept = in[2], *previous = in[3];
    T *grad_gates_x = out[0], *grad_gates_h = out[1], *carry = out[2], *grad_initial = out[3];
    const int64_t first = part.first, end = part.end;
    const int64_t H = s.channels, rows = end - first, step = s.batch * H;
    for (int64_t t = s.steps - 1; t >= 0; --t) {
        for (int64_t row = first; row < end; ++row) {
            const int64_t at = t * step + row * H, gate = (t * s.batch + row) * 3 * H;
            const T* own = kept + (t * s.batch + row) * 4 * H;
            for (int64_t d = 0; d < H; d += W<T>) {
                const int k = int(std::min<int64_t>(W<T>, H - d));
                const Vec<T> r = load<T>(own + d, k), u = load<T>(own + H + d, k), n = load<T>(own + 2 * H + d, k);
                const Vec<T> grad = load<T>(grad_states + at + d, k) + load<T>(carry + row * H + d, k);
                const Vec<T> to_n = grad * u * (T(1) - n * n);
                const Vec<T> to_r = to_n * load<T>(own + 3 * H + d, k) * r * (T(1) - r);
                const Vec<T> to_u = grad * (n - load<T>(previous + at + d, k)) * u * (T(1) - u);
                store<T>(grad_gates_x + gate + d, to_r, k);
                store<T>(grad_gates_x + gate + H + d, to_u, k);
                store<T>(grad_gates_x + gate + 2 * H + d, to_n, k);
                store<T>(grad_gates_h + gate + d, to_r, k);
                store<T>(grad_gates_h + gate + H + d, to_u, k);
                store<T>(grad_gates_h + gate + 2 * H + d, to_n * r, k);
                store<T>(carry + row * H + d, grad * (T(1) - u), k);
            }
        }
        // `carry` already has the direct part of the gradient. The product adds the part through the gates.
        multiply<T>(grad_gates_h + (t * s.batch + first) * 3 * H, weight, carry + first * H, rows, 3 * H, H);
        for (int64_t row = first; row < end; ++row)
            if (is_init[t * s.batch + row])
                for (int64_t d = row * H; d < (row + 1) * H; ++d) {
                    grad_initial[d] += carry[d];
                    carry[d] = T(0);
                }
    }
}

}  // namespace

INTERFACE(gru)
INTERFACE(gru_backward)
