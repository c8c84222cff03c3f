// Vectors as wide as the processor's registers, and the functions of vectors that the recurrences need.
//
// The C library's exp and tanh work on one number at a time. These work on all lanes at once, and acting and training
// use the same code, so both round alike.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

// V and I: vectors of numbers and of integers. mantissa, bias: the format of the exponent.
// lowest, highest: exponents of normal numbers. rounder: adding and subtracting it rounds to an integer.
template <class T> struct Lanes;

template <> struct Lanes<float> {
    typedef float V __attribute__((vector_size(BYTES)));
    typedef int32_t I __attribute__((vector_size(BYTES)));
    static constexpr int mantissa = 23, bias = 127;
    static constexpr float lowest = -126.0f, highest = 127.0f, rounder = 12582912.0f;  // 1.5 * 2^23
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // few digits: exact products
    static constexpr int degree = 5;
    static constexpr float q[] = {0.69314718802622878f, 0.24022650760568127f,   0.055503571142190779f,
                                  0.009618082557277855f, 0.0013390863364671234f, 0.00015453162945120690f};
};

template <> struct Lanes<double> {
    typedef double V __attribute__((vector_size(BYTES)));
    typedef int64_t I __attribute__((vector_size(BYTES)));
    static constexpr int mantissa = 52, bias = 1023;
    static constexpr double lowest = -1022.0, highest = 1023.0, rounder = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
    static constexpr int degree = 11;
    static constexpr double q[] = {0.69314718055994530925,   0.24022650695910071233,    0.055504108664821627039,
                                   0.0096181291076284794928, 0.0013333558146406470697,  0.00015403530393370733411,
                                   1.5252733841556772589e-5, 1.321548680870556279e-6,   1.0178057087733941105e-7,
                                   7.0548973041554992774e-9, 4.455817908336064493e-10, 2.5729324177362304214e-11};
};

template <class T> using Vec = typename Lanes<T>::V;
template <class T> constexpr int W = BYTES / sizeof(T);

// 2^x - 1 on [-1/2, 1/2] as x q(x), with q interpolated at Chebyshev nodes. It is precise near 0, the range of slow
// decays.
template <class T> INLINE Vec<T> small_exp2m1(Vec<T> x) {
    typedef Lanes<T> L;
    Vec<T> q = Vec<T>{} + L::q[L::degree];
#pragma GCC unroll 12
    for (int k = L::degree - 1; k >= 0; --k) q = q * x + L::q[k];
    return q * x;
}

// 2^whole for integers: written directly into the exponent bits.
template <class T> INLINE Vec<T> power_of_2(Vec<T> whole) {
    typedef Lanes<T> L;
    const typename L::I exponent = (__builtin_convertvector(whole, typename L::I) + L::bias) << L::mantissa;
    Vec<T> power;
    std::memcpy(&power, &exponent, sizeof power);
    return power;
}

template <class T> INLINE Vec<T> clamp(Vec<T> x, T lowest, T highest) {  // NaN passes through
    x = x < lowest ? Vec<T>{} + lowest : x;
    return x > highest ? Vec<T>{} + highest : x;
}

template <class T> INLINE Vec<T> exp2(Vec<T> x) {
    typedef Lanes<T> L;
    x = clamp<T>(x, L::lowest, L::highest);
    const Vec<T> whole = (x + L::rounder) - L::rounder;
    return (small_exp2m1<T>(x - whole) + T(1)) * power_of_2<T>(whole);
}

// e^x = (1 + fraction) * scale. ln 2 has a high and a low part, so no digits of x are lost.
template <class T> INLINE void split_exp(Vec<T> x, Vec<T>& fraction, Vec<T>& scale) {
    typedef Lanes<T> L;
    constexpr T log2e = T(1.4426950408889634074);
    x = clamp<T>(x, L::lowest / log2e, L::highest / log2e);
    const Vec<T> whole = (x * log2e + L::rounder) - L::rounder;
    const Vec<T> rest = (x - whole * L::ln2_high) - whole * L::ln2_low;
    fraction = small_exp2m1<T>(rest * log2e);
    scale = power_of_2<T>(whole);
}

// e^x - 1, precise near 0.
template <class T> INLINE Vec<T> expm1(Vec<T> x) {
    Vec<T> fraction, scale;
    split_exp<T>(x, fraction, scale);
    return fraction * scale + (scale - T(1));
}

template <class T> INLINE Vec<T> sigmoid(Vec<T> x) {
    Vec<T> fraction, scale;
    split_exp<T>(-x, fraction, scale);
    return T(1) / (T(1) + (fraction + T(1)) * scale);
}

template <class T> INLINE Vec<T> tanh(Vec<T> x) {
    const Vec<T> grown = expm1<T>(x * T(2));
    const Vec<T> quotient = grown / (grown + T(2));
    return x > T(20) ? Vec<T>{} + T(1) : quotient;  // avoids infinity / infinity
}

template <class T> INLINE Vec<T> sqrt(Vec<T> x) {
    for (int i = 0; i < W<T>; ++i) x[i] = std::sqrt(x[i]);
    return x;
}

// `lanes` is below W only at the end of a row. memcpy of a fixed size compiles to one unaligned load.
template <class T> INLINE Vec<T> load(const T* from, int lanes) {
    Vec<T> v{};
    if (lanes == W<T>) std::memcpy(&v, from, sizeof v);
    else for (int i = 0; i < lanes; ++i) v[i] = from[i];
    return v;
}

template <class T> INLINE void store(T* to, Vec<T> v, int lanes) {
    if (lanes == W<T>) std::memcpy(to, &v, sizeof v);
    else for (int i = 0; i < lanes; ++i) to[i] = v[i];
}

template <class T> INLINE T sum(Vec<T> v) {
    T total = 0;
    for (int i = 0; i < W<T>; ++i) total += v[i];
    return total;
}
// A row of the next step is far away in memory, where the processor does not prefetch by itself. AHEAD is in steps.
constexpr int64_t AHEAD = 8;
template <class T> INLINE void prefetch(const T* at) { __builtin_prefetch(at); }

// Memory for `size` numbers, not initialised, aligned to a cache line. std::vector would first fill it with zeros.
template <class T> class Room {
  public:
    explicit Room(int64_t size) : at(static_cast<T*>(::operator new(size * sizeof(T), LINE))) {}
    ~Room() { ::operator delete(at, LINE); }
    Room(const Room&) = delete;
    Room& operator=(const Room&) = delete;
    T* data() const { return at; }

  private:
    static constexpr std::align_val_t LINE{64};
    T* at;
};

// Split rows [0, rows) over threads and call run(thread, first, end) in each. Rows (environments) are independent,
// steps are not. The calling thread takes the first part.
template <class Run> void split(int64_t rows, int64_t threads, Run run) {
    threads = std::max<int64_t>(1, std::min(threads, rows));
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads; ++i)
        others.emplace_back([=] { run(i, rows * i / threads, rows * (i + 1) / threads); });
    run(0, 0, rows / threads);
    for (auto& other : others) other.join();
}

// Sizes of a kernel's tensors. A kernel says what `numbers` and `length` mean, if it reads them.
struct Sizes { int64_t steps, batch, channels, numbers, length; double eps; };

// The rows [first, end) of one thread.
struct Part { int64_t thread, first, end; };

// The C interface of a kernel in both precisions: cyborg_NAME_float32 and cyborg_NAME_float64. All kernels have the
// same arguments, see native.py. `sizes` has five entries. Missing inputs and outputs are null pointers.
#define INTERFACE_OF(kernel, T, name)                                                                                 \
    extern "C" void cyborg_##kernel##_##name(const int64_t* sizes, int64_t threads, double eps,                       \
                                             const T* const* inputs, const uint8_t* is_init, T* const* outputs) {     \
        const Sizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], eps};                                         \
        split(s.batch, threads, [=](int64_t thread, int64_t first, int64_t end) {                                     \
            kernel<T>(s, inputs, is_init, outputs, Part{thread, first, end});                                         \
        });                                                                                                           \
    }
#define INTERFACE(kernel) INTERFACE_OF(kernel, float, float32) INTERFACE_OF(kernel, double, float64)

}  // namespace
