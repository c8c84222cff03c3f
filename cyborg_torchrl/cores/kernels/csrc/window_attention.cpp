// Attention of a sequence to the last steps, and its gradient. The formula is in cores/attention.py, the calls in
// window_attention.py.
//
// Each query reads only the steps of its episode and window. Lanes are steps, or the numbers of a key. QUERIES neighbours
// share what they load. Weights are not kept for the gradient, but computed again from the logarithm of their sum, as in
// FlashAttention (Dao et al. 2022).

#include "norms.h"

namespace {

constexpr int QUERIES = 4;

// Transposes x [rows, columns] to y [columns, stride].
template <class T> void transpose(const T* x, int64_t rows, int64_t columns, T* y, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) y[j * stride + i] = x[i * columns + j];
}

// Numbers for all distances of one head, the farthest step first, with room on both sides: QUERIES neighbours read all
// steps that one of them reads.
template <class T> int64_t padded(int64_t window) { return window + W<T> + 2 * QUERIES; }

// The queries from t on that are computed at once, and the steps [first, end) that they read, counted from the oldest
// key. age: steps of the episode at each query. window: with the present step.
struct Block {
    int64_t count, first, end;
    template <class T> Block(const T* age, int64_t t, int64_t steps, int64_t window) {
        const auto is_same_episode = [&](int64_t r) { return age[t + r] == age[t] + T(r); };
        count = t + QUERIES <= steps && is_same_episode(QUERIES - 1) ? QUERIES : 1;
        first = t + std::max<int64_t>(0, window - int64_t(age[t]));
        end = t + count - 1 + window;
    }
};

// R sums of weights[j] rows[j], times scales. weights: [R, room]. rows: [steps, size].
template <class T, int R>
INLINE void weighted_sums(int64_t size, int64_t steps, const T* weights, int64_t room, const T* rows, const T* scales,
                          T* out) {
    for (int64_t i = 0; i < size; i += W<T>) {
        const int lanes = int(std::min<int64_t>(W<T>, size - i));
        Vec<T> sums[R] = {};
        for (int64_t j = 0; j < steps; ++j) {
            const Vec<T> row = load<T>(rows + j * size + i, lanes);
            for (int r = 0; r < R; ++r) sums[r] += row * weights[r * room + j];
        }
        for (int r = 0; r < R; ++r) store<T>(out + r * size + i, sums[r] * scales[r], lanes);
    }
}

// A row's keys, [size, stride], and what is added to products by distance, see `padded`. Vectors end behind the last step.
template <class T> struct Keys { int64_t size, stride; const T *keys, *by_age; T scale; };

// Products of R queries with the steps from `at` on, -infinity outside of a query's window. t: the first query.
template <class T, int R>
INLINE void multiply(const Keys<T>& k, const T* q, int64_t t, int64_t at, Vec<T> (&products)[R]) {
    for (int r = 0; r < R; ++r) products[r] = Vec<T>{};
    for (int64_t i = 0; i < k.size; ++i) {
        const Vec<T> key = load<T>(k.keys + i * k.stride + at, W<T>);
        for (int r = 0; r < R; ++r) products[r] += key * q[r * k.size + i];
    }
    for (int r = 0; r < R; ++r) products[r] = products[r] * k.scale + load<T>(k.by_age + at - t - r, W<T>);
}

template <class T, int R>
INLINE void attend_block(const Keys<T>& k, Block b, int64_t t, const T* q, const T* values, T* weights, int64_t room,
                         T* read, T* log_sum) {
    Vec<T> best[R], products[R];
    for (int r = 0; r < R; ++r) best[r] = Vec<T>{} - INFINITY;
    for (int64_t at = b.first; at < b.end; at += W<T>) {
        multiply<T, R>(k, q, t, at, products);
        for (int r = 0; r < R; ++r) {
            best[r] = products[r] > best[r] ? products[r] : best[r];
            store<T>(weights + r * room + at - b.first, products[r], W<T>);
        }
    }
    T inverse[R];
    for (int r = 0; r < R; ++r) {
        T highest = best[r][0];
        for (int i = 1; i < W<T>; ++i) highest = std::max<T>(highest, best[r][i]);
        Vec<T> sums{};
        for (T* at = weights + r * room; at < weights + r * room + b.end - b.first; at += W<T>) {
            const Vec<T> power = expm1<T>(load<T>(at, W<T>) - highest) + T(1);
            sums += power;
            store<T>(at, power, W<T>);
        }
        inverse[r] = T(1) / sum<T>(sums);
        log_sum[r] = highest - std::log(inverse[r]);
    }
    weighted_sums<T, R>(k.size, b.end - b.first, weights, room, values + b.first * k.size, inverse, read);
}

// in: q [rows, T, D]; keys [rows, D, K]; values [rows, K, D]; bias by distance [heads, K - T + 1]; age [rows / heads, T].
// out: read [rows, T, D]; log_sum [rows, T]. s.numbers: K. s.length: heads. s.eps: 1 / sqrt(D).
template <class T> INLINE void attend_rows(int64_t size, Sizes s, const T* const* in, T* const* out, Part part) {
    const int64_t steps = s.numbers, window = steps - s.steps + 1, stride = steps + W<T>, room = padded<T>(window);
    const Room<T> memory(size * stride + (QUERIES + 1) * room);
    T *keys = memory.data(), *weights = keys + size * stride, *by_age = weights + QUERIES * room + QUERIES;
    std::fill(keys, weights, T(0));
    std::fill(by_age - QUERIES, by_age + room - QUERIES, T(-INFINITY));
    const Keys<T> k{size, stride, keys, by_age, T(s.eps)};
    for (int64_t row = part.first; row < part.end; ++row) {
        for (int64_t i = 0; i < size; ++i)
            std::memcpy(keys + i * stride, in[1] + (row * size + i) * steps, steps * sizeof(T));
        for (int64_t j = 0; j < window; ++j) by_age[j] = in[3][row % s.length * window + window - 1 - j];
        const T *age = in[4] + row / s.length * s.steps, *values = in[2] + row * steps * size;
        for (int64_t t = 0; t < s.steps;) {
            const Block b(age, t, s.steps, window);
            const int64_t at = row * s.steps + t;
            const T* q = in[0] + at * size;
            T *read = out[0] + at * size, *log_sum = out[1] + at;
            if (b.count == QUERIES) attend_block<T, QUERIES>(k, b, t, q, values, weights, room, read, log_sum);
            else attend_block<T, 1>(k, b, t, q, values, weights, room, read, log_sum);
            t += b.count;
        }
    }
}

// What a block of queries reads and writes in the backward pass, besides the keys. [size, stride]: values, and gradients
// of keys and values. [steps, size]: by_step, the keys. By distance: grad_by_age.
template <class T> struct Backward {
    const T *q, *grad, *read, *log_sum, *values, *by_step;
    T *grad_q, *grad_keys, *grad_values, *grad_by_age, *slopes;
};

template <class T, int R>
INLINE void attend_block_backward(const Keys<T>& k, Block b, int64_t t, const Backward<T>& x, int64_t room) {
    const int64_t size = k.size, stride = k.stride;
    T means[R], scales[R];
    for (int r = 0; r < R; ++r) {
        means[r] = total<T>(size, [&](int64_t i) { return x.grad[r * size + i] * x.read[r * size + i]; });
        scales[r] = k.scale;
    }
    for (int64_t at = b.first; at < b.end; at += W<T>) {
        Vec<T> weights[R], slopes[R] = {};
        multiply<T, R>(k, x.q, t, at, weights);
        for (int64_t i = 0; i < size; ++i) {
            const Vec<T> value = load<T>(x.values + i * stride + at, W<T>);
            for (int r = 0; r < R; ++r) slopes[r] += value * x.grad[r * size + i];
        }
        for (int r = 0; r < R; ++r) {
            weights[r] = expm1<T>(weights[r] - x.log_sum[r]) + T(1);
            slopes[r] = weights[r] * (slopes[r] - means[r]);
            store<T>(x.slopes + r * room + at - b.first, slopes[r], W<T>);
            T* by_age = x.grad_by_age + at - t - r;
            store<T>(by_age, load<T>(by_age, W<T>) + slopes[r], W<T>);
            slopes[r] *= k.scale;
        }
        for (int64_t i = 0; i < size; ++i) {
            T *of_key = x.grad_keys + i * stride + at, *of_value = x.grad_values + i * stride + at;
            Vec<T> key = load<T>(of_key, W<T>), value = load<T>(of_value, W<T>);
            for (int r = 0; r < R; ++r) {
                key += slopes[r] * x.q[r * size + i];
                value += weights[r] * x.grad[r * size + i];
            }
            store<T>(of_key, key, W<T>);
            store<T>(of_value, value, W<T>);
        }
    }
    weighted_sums<T, R>(size, b.end - b.first, x.slopes, room, x.by_step + b.first * size, scales, x.grad_q);
}

// in: the gradient of read, then q, keys, values, bias, age, read and log_sum as above. out: gradients of q, keys and
// values, and of bias [threads, heads, K - T + 1], which is added to.
template <class T> INLINE void attend_rows_backward(int64_t size, Sizes s, const T* const* in, T* const* out, Part part) {
    const int64_t steps = s.numbers, window = steps - s.steps + 1, stride = steps + W<T>, all = size * stride;
    const int64_t room = padded<T>(window);
    const Room<T> memory(5 * all + (QUERIES + 2) * room);
    T *keys = memory.data(), *values = keys + all, *grad_keys = values + all, *grad_values = grad_keys + all;
    T *by_step = grad_values + all, *slopes = by_step + all;
    T *by_age = slopes + QUERIES * room + QUERIES, *grad_by_age = by_age + room;
    std::fill(keys, slopes, T(0));
    std::fill(by_age - QUERIES, by_age + room - QUERIES, T(-INFINITY));
    const Keys<T> k{size, stride, keys, by_age, T(s.eps)};
    for (int64_t row = part.first; row < part.end; ++row) {
        const int64_t head = row % s.length, of_row = row * steps * size;
        for (int64_t i = 0; i < size; ++i) std::memcpy(keys + i * stride, in[2] + of_row + i * steps, steps * sizeof(T));
        transpose(in[2] + of_row, size, steps, by_step, size);
        transpose(in[3] + of_row, steps, size, values, stride);
        for (int64_t j = 0; j < window; ++j) by_age[j] = in[4][head * window + window - 1 - j];
        std::fill(grad_by_age - QUERIES, grad_by_age + room - QUERIES, T(0));
        std::fill(grad_keys, by_step, T(0));
        for (int64_t t = 0; t < s.steps;) {
            const Block b(in[5] + row / s.length * s.steps, t, s.steps, window);
            const int64_t at = row * s.steps + t;
            const Backward<T> x{in[1] + at * size, in[0] + at * size, in[6] + at * size, in[7] + at,  values, by_step,
                                out[0] + at * size, grad_keys,        grad_values,       grad_by_age, slopes};
            if (b.count == QUERIES) attend_block_backward<T, QUERIES>(k, b, t, x, room);
            else attend_block_backward<T, 1>(k, b, t, x, room);
            t += b.count;
        }
        for (int64_t i = 0; i < size; ++i)
            std::memcpy(out[1] + of_row + i * steps, grad_keys + i * stride, steps * sizeof(T));
        for (int64_t j = 0; j < steps; ++j)
            for (int64_t i = 0; i < size; ++i) out[2][of_row + j * size + i] = grad_values[i * stride + j];
        T* grad_bias = out[3] + (part.thread * s.length + head) * window;
        for (int64_t j = 0; j < window; ++j) grad_bias[window - 1 - j] += grad_by_age[j];
    }
}

// The usual sizes are constants, so that the compiler can unroll the loops.
template <class T> void attend(Sizes s, const T* const* in, const uint8_t*, T* const* out, Part part) {
    if (s.channels == 16) attend_rows<T>(16, s, in, out, part);
    else attend_rows<T>(s.channels, s, in, out, part);
}

template <class T> void attend_backward(Sizes s, const T* const* in, const uint8_t*, T* const* out, Part part) {
    if (s.channels == 16) attend_rows_backward<T>(16, s, in, out, part);
    else attend_rows_backward<T>(s.channels, s, in, out, part);
}

}  // namespace

INTERFACE(attend)
INTERFACE(attend_backward)
