// A step of a whole layer of attention. The formulas are in cores/attention_layer.py, the call in window_attention.py.
//
// Values are stored by feature, [features, LANES]: a lane is an environment. So the rows of a weight multiply them as
// they are, and norms add vectors.

#include "multiply.h"
#include "norms.h"

namespace {

template <class T> constexpr int LANES = 2 * W<T>;  // what `multiply` computes at once

template <class T> struct Layer {
    const T *x, *age, *norm, *queries_keys, *values, *gain, *bias, *output, *output_bias, *norm_2, *norm_2_bias;
    const T *mlp, *mlp_bias, *mlp_2, *mlp_2_bias, *clock;  // clock is null if there is none
};

// y = W x + b, both [features, LANES]; without a bias, y is only W x
template <class T> void linear(const T* weight, const T* bias, const T* x, T* y, int64_t inner, int64_t outer) {
    for (int64_t i = 0; i < outer; ++i)
        for (int lane = 0; lane < LANES<T>; ++lane) y[i * LANES<T> + lane] = bias ? bias[i] : T(0);
    multiply<T>(weight, x, y, outer, inner, LANES<T>);
}

// y = (x - mean) / sqrt(variance + eps) * weight + bias, over features; without the mean and the weight it is an RMS norm
template <class T>
INLINE void normalise(const T* x, const T* weight, const T* bias, T* y, int64_t size, T eps, bool has_mean) {
    for (int lane = 0; lane < LANES<T>; lane += W<T>) {
        const auto at = [lane](int64_t i) { return i * LANES<T> + lane; };
        Vec<T> mean{}, squares{};
        if (has_mean)
            for (int64_t i = 0; i < size; ++i) mean += load<T>(x + at(i), W<T>);
        mean /= T(size);
        for (int64_t i = 0; i < size; ++i) {
            const Vec<T> v = load<T>(x + at(i), W<T>) - mean;
            squares += v * v;
        }
        const Vec<T> scale = T(1) / sqrt<T>(squares / T(size) + eps);
        for (int64_t i = 0; i < size; ++i) {
            const Vec<T> v = (load<T>(x + at(i), W<T>) - mean) * scale * (weight ? weight[i] : T(1));
            store<T>(y + at(i), v + (bias ? bias[i] : T(0)), W<T>);
        }
    }
}

// The steps that a query attends to. k [size, stride] and v [steps, size]: from the oldest step on. `first`: steps before
// it belong to another episode. by_age [steps]: what is added to the products.
template <class T> struct Window { int64_t steps, stride, first; const T *k, *v, *by_age; };

// q and read: [size]. `weights` is room for as many numbers as there are steps.
template <class T>
INLINE void attend_row(int64_t size, const Window<T>& window, const T* q, T scale, T* weights, T* read) {
    const auto [steps, stride, first, k, v, by_age] = window;
    Vec<T> best = Vec<T>{} - INFINITY;
    int64_t j = first;
    for (; j + W<T> <= steps; j += W<T>) {
        for (int i = 0; i < W<T>; ++i) prefetch(v + (j + i) * size);  // the values come next
        Vec<T> products{};
        for (int64_t i = 0; i < size; ++i) products += load<T>(k + i * stride + j, W<T>) * q[i];
        products = products * scale + load<T>(by_age + j, W<T>);
        best = products > best ? products : best;
        store<T>(weights + j, products, W<T>);
    }
    T highest = best[0];
    for (int i = 1; i < W<T>; ++i) highest = std::max<T>(highest, best[i]);
    for (; j < steps; ++j) {
        const T product = total<T>(size, [=, k = k, stride = stride](int64_t i) { return k[i * stride + j] * q[i]; });
        weights[j] = product * scale + by_age[j];
        highest = std::max(highest, weights[j]);
    }
    Vec<T> sums{};
    for (j = first; j < steps; j += W<T>) {
        const int lanes = int(std::min<int64_t>(W<T>, steps - j));
        Vec<T> power = expm1<T>(load<T>(weights + j, lanes) - highest) + T(1);
        for (int i = lanes; i < W<T>; ++i) power[i] = 0;
        sums += power;
        store<T>(weights + j, power, lanes);
    }
    const T inverse = T(1) / sum<T>(sums);
    for (int64_t i = 0; i < size; i += W<T>) {
        const int lanes = int(std::min<int64_t>(W<T>, size - i));
        Vec<T> even{}, odd{};  // two sums: an addition does not wait for the one before
        for (j = first; j + 1 < steps; j += 2) {
            even += load<T>(v + j * size + i, lanes) * weights[j];
            odd += load<T>(v + (j + 1) * size + i, lanes) * weights[j + 1];
        }
        if (j < steps) even += load<T>(v + j * size + i, lanes) * weights[j];
        store<T>(read + i, (even + odd) * inverse, lanes);
    }
}

// in: the members of Layer. out: y [batch, width]; keys [batch, heads, D, C] and values [batch, heads, C, D], whose
// newest step is written. s.steps: steps of a row. s.channels: width. s.numbers: C. s.length: heads. s.eps: of all norms.
template <class T> void attention_layer(Sizes s, const T* const* in, const uint8_t*, T* const* out, Part part) {
    const Layer<T> layer{in[0], in[1], in[2],  in[3],  in[4],  in[5],  in[6],  in[7],
                         in[8], in[9], in[10], in[11], in[12], in[13], in[14], in[15]};
    const int64_t width = s.channels, heads = s.length, size = width / heads, newest = s.steps - 1;
    const T eps = T(s.eps), scale = T(1) / std::sqrt(T(size));
    const Room<T> room(6 * width * LANES<T> + heads * s.steps + s.steps + 2 * size);
    T *x = room.data(), *normal = x + width * LANES<T>, *read = normal + width * LANES<T>;
    T *v = read + width * LANES<T>, *wide = v + width * LANES<T>;  // `wide` has two widths
    T *by_age = wide + 2 * width * LANES<T>, *weights = by_age + heads * s.steps, *q = weights + s.steps, *own = q + size;
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t j = 0; j < s.steps; ++j) by_age[h * s.steps + j] = layer.bias[h * s.steps + newest - j];
    for (int64_t first = part.first; first < part.end; first += LANES<T>) {
        const int lanes = int(std::min<int64_t>(LANES<T>, part.end - first));
        std::fill(x, x + width * LANES<T>, T(0));
        for (int lane = 0; lane < lanes; ++lane)
            for (int64_t i = 0; i < width; ++i) x[i * LANES<T> + lane] = layer.x[(first + lane) * width + i];
        normalise<T>(x, layer.norm, nullptr, normal, width, eps, true);
        linear<T>(layer.values, nullptr, normal, v, width, width);
        if (layer.clock) {
            std::memcpy(read, x, width * LANES<T> * sizeof(T));
            for (int lane = 0; lane < lanes; ++lane)
                for (int64_t i = 0; i < width; ++i) read[i * LANES<T> + lane] += layer.clock[(first + lane) * width + i];
            normalise<T>(read, layer.norm, nullptr, normal, width, eps, true);
        }
        linear<T>(layer.queries_keys, nullptr, normal, wide, width, 2 * width);
        for (int64_t h = 0; h < 2 * heads; ++h) {
            T* of_head = wide + h * size * LANES<T>;
            normalise<T>(of_head, h < heads ? layer.gain : nullptr, nullptr, of_head, size, eps, false);
        }
        for (int lane = 0; lane < lanes; ++lane)
            for (int64_t h = 0; h < heads; ++h) {
                const int64_t row = (first + lane) * heads + h, at = row * size * s.numbers;
                for (int64_t i = 0; i < size; ++i) {
                    const int64_t from = (h * size + i) * LANES<T> + lane;
                    q[i] = wide[from];
                    out[1][at + i * s.numbers + newest] = wide[from + width * LANES<T>];
                    out[2][at + newest * size + i] = v[from];
                }
                const int64_t start = std::max<int64_t>(0, s.steps - int64_t(layer.age[first + lane]));
                const Window<T> window{s.steps, s.numbers, start, out[1] + at, out[2] + at, by_age + h * s.steps};
                if (size == 16) attend_row<T>(16, window, q, scale, weights, own);  // the usual size is unrolled
                else attend_row<T>(size, window, q, scale, weights, own);
                for (int64_t i = 0; i < size; ++i) read[(h * size + i) * LANES<T> + lane] = own[i];
            }
        for (int64_t h = 0; h < heads; ++h) {
            T* of_head = read + h * size * LANES<T>;
            normalise<T>(of_head, nullptr, nullptr, of_head, size, eps, false);
        }
        linear<T>(layer.output, layer.output_bias, read, normal, width, width);
        for (int64_t i = 0; i < width * LANES<T>; ++i) x[i] += normal[i];
        normalise<T>(x, layer.norm_2, layer.norm_2_bias, normal, width, eps, true);
        linear<T>(layer.mlp, layer.mlp_bias, normal, wide, width, 2 * width);
        for (int64_t i = 0; i < 2 * width * LANES<T>; ++i) wide[i] = wide[i] > T(0) ? wide[i] : T(0);
        linear<T>(layer.mlp_2, layer.mlp_2_bias, wide, normal, 2 * width, width);
        for (int lane = 0; lane < lanes; ++lane)
            for (int64_t i = 0; i < width; ++i)
                out[0][(first + lane) * width + i] = x[i * LANES<T> + lane] + normal[i * LANES<T> + lane];
    }
}

}  // namespace

INTERFACE(attention_layer)
