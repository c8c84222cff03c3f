// Long short-term memory, given the input's part of its gates, and its gradient. See multiply.h and native.py.
//
//     i, f, o = sigmoid(gates_x + h W);   g = tanh(...);   c = f c_before + i g;   h = o tanh(c)

#include "lstm.h"

namespace {

// In the end carry_h and carry_c are the gradients of h_0 and c_0. The caller sets all four states to zero.
template <class T>
void lstm_backward(Sizes s, const T* const* in, const uint8_t* is_init, T* const* out, Part part) {
    const T *grad_hidden = in[0], *grad_cell = in[1], *weight = in[2], *gates = in[3], *cell = in[4], *c_0 = in[5],
            *initial_c = in[6];
    T *grad_gates = out[0], *carry_h = out[1], *carry_c = out[2], *grad_initial_h = out[3], *grad_initial_c = out[4];
    const int64_t first = part.first, end = part.end;
    const int64_t H = s.channels, rows = end - first, step = s.batch * H;
    for (int64_t t = s.steps - 1; t >= 0; --t) {
        for (int64_t row = first; row < end; ++row) {
            const int64_t at = t * step + row * H, state = row * H, gate = (t * s.batch + row) * 4 * H;
            const T* c = before(cell, c_0, initial_c, is_init[t * s.batch + row], t, step, at, state);
            for (int64_t d = 0; d < H; d += W<T>) {
                const int k = int(std::min<int64_t>(W<T>, H - d));
                const Vec<T> i = load<T>(gates + gate + d, k), f = load<T>(gates + gate + H + d, k);
                const Vec<T> g = load<T>(gates + gate + 2 * H + d, k), o = load<T>(gates + gate + 3 * H + d, k);
                // tanh(c) is recomputed: this needs less memory than a stored copy.
                const Vec<T> squashed = tanh<T>(load<T>(cell + at + d, k));
                const Vec<T> grad_h = load<T>(grad_hidden + at + d, k) + load<T>(carry_h + state + d, k);
                const Vec<T> grad_c = load<T>(grad_cell + at + d, k) + load<T>(carry_c + state + d, k) +
                                      grad_h * o * (T(1) - squashed * squashed);
                store<T>(grad_gates + gate + d, grad_c * g * i * (T(1) - i), k);
                store<T>(grad_gates + gate + H + d, grad_c * load<T>(c + d, k) * f * (T(1) - f), k);
                store<T>(grad_gates + gate + 2 * H + d, grad_c * i * (T(1) - g * g), k);
                store<T>(grad_gates + gate + 3 * H + d, grad_h * squashed * o * (T(1) - o), k);
                store<T>(carry_c + state + d, grad_c * f, k);
            }
        }
        // h reaches earlier steps only through the gates, so the product replaces carry_h.
        T* own = carry_h + first * H;
        std::memset(own, 0, rows * H * sizeof(T));
        multiply<T>(grad_gates + (t * s.batch + first) * 4 * H, weight, own, rows, 4 * H, H);
        for (int64_t row = first; row < end; ++row)
            if (is_init[t * s.batch + row])
                for (int64_t d = row * H; d < (row + 1) * H; ++d) {
                    grad_initial_h[d] += carry_h[d];
                    grad_initial_c[d] += carry_c[d];
                    carry_h[d] = carry_c[d] = T(0);
                }
    }
}

}  // namespace

INTERFACE(lstm)
INTERFACE(lstm_backward)
