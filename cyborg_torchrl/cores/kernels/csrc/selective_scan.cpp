// The selective scan of Mamba-1 and its gradient for CPUs. This is plain C++ behind a C interface, called with pointers
// (native.py). It is built without torch's headers, so it works with every version of torch. There is one build for
// each instruction set. native.py loads the build for the set that torch uses.
//
// The lanes of a vector are W neighbouring channels, a tile. Loops run over the numbers of the state.
// The forward pass stores the states before every `length`-th step. The backward pass recomputes each such chunk.

#include "lanes.h"

namespace {

template <class T> struct Inputs {
    const T *u, *delta, *a, *b, *c, *h_0, *initial;  // [T, B, D] x 2, [N, D], [T, B, N] x 2, [B, N, D] x 2
    explicit Inputs(const T* const* in)
        : u(in[0]), delta(in[1]), a(in[2]), b(in[3]), c(in[4]), h_0(in[5]), initial(in[6]) {}
};

// NS: the number of state numbers if it is a constant, else 0. A constant lets the compiler unroll the loops over n.
//
// Rows are the outer loop and time is inside: the state of one tile stays in registers or the first-level cache.
//
// out: y [T, B, D], the last state [B, N, D], and for the gradient the states before every `length`-th step.
template <class T, int NS>
void forward_rows(Sizes s, Inputs<T> in, const uint8_t* is_init, T* const* out, Part part) {
    T *y = out[0], *last = out[1], *starts = out[2];
    const int64_t N = NS ? NS : s.numbers, D = s.channels;
    constexpr T log2e = T(1.4426950408889634074);
    const Room<Vec<T>> room(2 * N);
    Vec<T>*h = room.data(), *a2 = h + N;
    for (int64_t row = part.first; row < part.end; ++row)
        for (int64_t d = 0; d < D; d += W<T>) {
            const int lanes = int(std::min<int64_t>(W<T>, D - d));
            const T *initial = in.initial + row * N * D + d, *h_0 = in.h_0 + row * N * D + d;
            for (int64_t n = 0; n < N; ++n) {
                // exp(delta a) = exp2(delta a log2(e)): the factor is applied once, not at every step.
                a2[n] = load<T>(in.a + n * D + d, lanes) * log2e;
                h[n] = load<T>(h_0 + n * D, lanes);
            }
            for (int64_t t = 0; t < s.steps; ++t) {
                if (starts && t % s.length == 0) {
                    T* to = starts + ((t / s.length) * s.batch + row) * N * D + d;
                    for (int64_t n = 0; n < N; ++n) store<T>(to + n * D, h[n], lanes);
                }
                const int64_t at = t * s.batch + row, soon = at + AHEAD * s.batch;
                if (t + AHEAD < s.steps) prefetch(in.delta + soon * D + d), prefetch(in.u + soon * D + d);
                if (is_init[at])
                    for (int64_t n = 0; n < N; ++n) h[n] = load<T>(initial + n * D, lanes);
                const Vec<T> delta = load<T>(in.delta + at * D + d, lanes);
                const Vec<T> written = delta * load<T>(in.u + at * D + d, lanes);
                const T *b = in.b + at * N, *c = in.c + at * N;
                Vec<T> read{};
#pragma GCC unroll 4
                for (int64_t n = 0; n < N; ++n) {
                    h[n] = exp2<T>(delta * a2[n]) * h[n] + written * b[n];
                    read += h[n] * c[n];
                }
                store<T>(y + at * D + d, read, lanes);
            }
            for (int64_t n = 0; n < N; ++n) store<T>(last + row * N * D + n * D + d, h[n], lanes);
        }
}

// Chunks run from the last to the first. Each is recomputed forward from its stored state, then run backward. `carry`
// is the gradient of the state between chunks.
//
// of_y, of_last: gradients of the results. out: gradients of the inputs, with one of A for each thread.
template <class T, int NS>
void backward_rows(Sizes s, Inputs<T> in, const uint8_t* is_init, const T* starts, const T* of_y, const T* of_last,
                   T* const* out, Part part) {
    T *grad_u = out[0], *grad_delta = out[1], *grad_a = out[2] + part.thread * s.numbers * s.channels;
    T *grad_b = out[3], *grad_c = out[4], *grad_h_0 = out[5], *grad_initial = out[6];
    const int64_t N = NS ? NS : s.numbers, D = s.channels, L = s.length;
    const int64_t tiles = (D + W<T> - 1) / W<T>, chunks = (s.steps + L - 1) / L;
    constexpr T log2e = T(1.4426950408889634074);
    // For one chunk: the states before each step and after the last, the decays, and the gradients of B and C summed
    // over tiles. All of it must fit into the cache, which limits the length of a chunk.
    const Room<Vec<T>> room((L + 1) * N + 3 * L * N + 2 * tiles * N + 2 * N);
    Vec<T>* states = room.data();
    Vec<T>*decay = states + (L + 1) * N, *sum_b = decay + L * N, *sum_c = sum_b + L * N;
    Vec<T>*carry = sum_c + L * N, *sum_a = carry + tiles * N, *a = sum_a + tiles * N, *partial = a + N;
    std::fill(sum_a, sum_a + tiles * N, Vec<T>{});
    for (int64_t row = part.first; row < part.end; ++row) {
        for (int64_t k = 0; k < tiles; ++k)
            for (int64_t n = 0; n < N; ++n) {
                const int lanes = int(std::min<int64_t>(W<T>, D - k * W<T>));
                carry[k * N + n] = load<T>(of_last + row * N * D + n * D + k * W<T>, lanes);
            }
        for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
            const int64_t begin = chunk * L, steps = std::min(L, s.steps - begin);
            std::fill(sum_b, sum_b + steps * N, Vec<T>{});
            std::fill(sum_c, sum_c + steps * N, Vec<T>{});
            for (int64_t k = 0; k < tiles; ++k) {
                const int64_t d = k * W<T>;
                const int lanes = int(std::min<int64_t>(W<T>, D - d));
                const T* initial = in.initial + row * N * D + d;
                const T* from = starts + (chunk * s.batch + row) * N * D + d;
                for (int64_t n = 0; n < N; ++n) {
                    a[n] = load<T>(in.a + n * D + d, lanes);
                    states[n] = load<T>(from + n * D, lanes);
                    partial[n] = Vec<T>{};
                }
                for (int64_t i = 0; i < steps; ++i) {
                    const int64_t at = (begin + i) * s.batch + row, soon = (at + AHEAD * s.batch) * D + d;
                    if (begin + i + AHEAD < s.steps) prefetch(in.delta + soon), prefetch(in.u + soon), prefetch(of_y + soon);
                    Vec<T>*h = states + i * N, *next = h + N, *kept = decay + i * N, *into = sum_c + i * N;
                    if (is_init[at])  // overwrite the state before a reset: no later code reads it
                        for (int64_t n = 0; n < N; ++n) h[n] = load<T>(initial + n * D, lanes);
                    const Vec<T> delta = load<T>(in.delta + at * D + d, lanes);
                    const Vec<T> written = delta * load<T>(in.u + at * D + d, lanes);
                    const Vec<T> grad_y = load<T>(of_y + at * D + d, lanes);
                    const T* b = in.b + at * N;
#pragma GCC unroll 4
                    for (int64_t n = 0; n < N; ++n) {
                        kept[n] = exp2<T>(delta * (a[n] * log2e));
                        next[n] = kept[n] * h[n] + written * b[n];
                        into[n] += next[n] * grad_y;
                    }
                }
                // The backward pass through the same steps, with their states and decays still in the cache.
                Vec<T>* carried = carry + k * N;
                for (int64_t i = steps - 1; i >= 0; --i) {
                    const int64_t at = (begin + i) * s.batch + row;
                    const Vec<T>*h = states + i * N, *kept = decay + i * N;
                    Vec<T>* into = sum_b + i * N;
                    const Vec<T> delta = load<T>(in.delta + at * D + d, lanes), u = load<T>(in.u + at * D + d, lanes);
                    const Vec<T> written = delta * u, grad_y = load<T>(of_y + at * D + d, lanes);
                    const T *b = in.b + at * N, *c = in.c + at * N;
                    Vec<T> grad_written{}, to_delta{};
#pragma GCC unroll 4
                    for (int64_t n = 0; n < N; ++n) {
                        const Vec<T> grad = carried[n] + grad_y * c[n];
                        into[n] += grad * written;
                        grad_written += grad * b[n];
                        carried[n] = kept[n] * grad;
                        const Vec<T> exponent = carried[n] * h[n];
                        to_delta += exponent * a[n];
                        partial[n] += exponent * delta;
                    }
                    store<T>(grad_u + at * D + d, grad_written * delta, lanes);
                    store<T>(grad_delta + at * D + d, to_delta + grad_written * u, lanes);
                    if (is_init[at])
                        for (int64_t n = 0; n < N; ++n) {
                            T* to = grad_initial + row * N * D + n * D + d;
                            store<T>(to, load<T>(to, lanes) + carried[n], lanes);
                            carried[n] = Vec<T>{};
                        }
                }
                for (int64_t n = 0; n < N; ++n) sum_a[k * N + n] += partial[n];
            }
            // B and C are shared by all channels: add the lanes only once per chunk.
            for (int64_t i = 0; i < steps; ++i)
                for (int64_t n = 0; n < N; ++n) {
                    const int64_t at = ((begin + i) * s.batch + row) * N + n;
                    grad_b[at] = sum<T>(sum_b[i * N + n]);
                    grad_c[at] = sum<T>(sum_c[i * N + n]);
                }
        }
        for (int64_t k = 0; k < tiles; ++k)
            for (int64_t n = 0; n < N; ++n) {
                const int lanes = int(std::min<int64_t>(W<T>, D - k * W<T>));
                store<T>(grad_h_0 + row * N * D + n * D + k * W<T>, carry[k * N + n], lanes);
            }
    }
    for (int64_t k = 0; k < tiles; ++k)
        for (int64_t n = 0; n < N; ++n) {
            const int lanes = int(std::min<int64_t>(W<T>, D - k * W<T>));
            store<T>(grad_a + n * D + k * W<T>, sum_a[k * N + n], lanes);
        }
}

template <class T>
void scan_forward(Sizes s, const T* const* in, const uint8_t* is_init, T* const* out, Part part) {
    // The usual number is a constant, so that the compiler can unroll the loops.
    if (s.numbers == 16) forward_rows<T, 16>(s, Inputs<T>(in), is_init, out, part);
    else forward_rows<T, 0>(s, Inputs<T>(in), is_init, out, part);
}

// in: the inputs of the scan, the stored states, and the gradients of y and of the last state
template <class T>
void scan_backward(Sizes s, const T* const* in, const uint8_t* is_init, T* const* out, Part part) {
    if (s.numbers == 16) backward_rows<T, 16>(s, Inputs<T>(in), is_init, in[7], in[8], in[9], out, part);
    else backward_rows<T, 0>(s, Inputs<T>(in), is_init, in[7], in[8], in[9], out, part);
}

}  // namespace

// Version of this interface. Raise it, and INTERFACE in native.py, with every change of a function's arguments.
extern "C" int64_t cyborg_interface() { return 15; }
INTERFACE(scan_forward)
INTERFACE(scan_backward)
