// Long short-term memory, forward pass. The formula is in lstm.cpp.

#pragma once

#include "multiply.h"

namespace {

// Address of a row's state before step t: the initial state at a reset, else the state of step t - 1 or the first one.
template <class T> INLINE const T* before(const T* now, const T* first, const T* initial, bool begins, int64_t t,
                                          int64_t step, int64_t at, int64_t state) {
    return begins ? initial + state : t ? now + at - step : first + state;
}

// A step of one row, given the sums of its gates [4 H] and its cell. With `kept` the gates overwrite their sums,
// because the gradient needs them.
template <class T, bool kept>
INLINE void cell_step(int64_t H, T* own, const T* before, T* cell, T* hidden) {
    for (int64_t d = 0; d < H; d += W<T>) {
        const int k = int(std::min<int64_t>(W<T>, H - d));
        const Vec<T> i = sigmoid<T>(load<T>(own + d, k)), f = sigmoid<T>(load<T>(own + H + d, k));
        const Vec<T> g = tanh<T>(load<T>(own + 2 * H + d, k)), o = sigmoid<T>(load<T>(own + 3 * H + d, k));
        const Vec<T> c = f * load<T>(before + d, k) + i * g;
        store<T>(cell + d, c, k);
        store<T>(hidden + d, o * tanh<T>(c), k);
        if (kept) {
            store<T>(own + d, i, k);
            store<T>(own + H + d, f, k);
            store<T>(own + 2 * H + d, g, k);
            store<T>(own + 3 * H + d, o, k);
        }
    }
}

// out: hidden, cell, and for the gradient `gates` and `previous_h`. Without a gradient the last two are null pointers,
// and one buffer is reused for all steps.
template <class T>
void lstm(Sizes s, const T* const* in, const uint8_t* is_init, T* const* out, Part part) {
    const T *gates_x = in[0], *weight = in[1], *h_0 = in[2], *c_0 = in[3], *initial_h = in[4], *initial_c = in[5];
    T *hidden = out[0], *cell = out[1];
    const int64_t first = part.first, end = part.end;
    const int64_t H = s.channels, rows = end - first, step = s.batch * H;
    const Room<T> gates_room(out[2] ? 0 : rows * 4 * H), previous_room(out[3] ? 0 : rows * H);
    for (int64_t t = 0; t < s.steps; ++t) {
        T* gates = out[2] ? out[2] + (t * s.batch + first) * 4 * H : gates_room.data();
        T* previous = out[3] ? out[3] + t * step + first * H : previous_room.data();
        std::memcpy(gates, gates_x + (t * s.batch + first) * 4 * H, rows * 4 * H * sizeof(T));
        for (int64_t row = first; row < end; ++row) {
            const bool begins = is_init[t * s.batch + row];
            const T* from = before(hidden, h_0, initial_h, begins, t, step, t * step + row * H, row * H);
            std::memcpy(previous + (row - first) * H, from, H * sizeof(T));
        }
        multiply<T>(previous, weight, gates, rows, H, 4 * H);
        for (int64_t row = first; row < end; ++row) {
            const int64_t at = t * step + row * H;
            const T* c = before(cell, c_0, initial_c, is_init[t * s.batch + row], t, step, at, row * H);
            T* own = gates + (row - first) * 4 * H;
            if (out[2]) cell_step<T, true>(H, own, c, cell + at, hidden + at);
            else cell_step<T, false>(H, own, c, cell + at, hidden + at);
        }
    }
}

}  // namespace
