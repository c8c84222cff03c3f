// A read from a memory: y = sum_n h_n c_n. See memory_read.py and native.py.
//
// The sum is in double precision: its terms may cancel, and the norm after it would amplify the rounding.

#include "norms.h"

namespace {

struct Memory { int64_t rows, channels, numbers; };

template <class T>
INLINE void read_rows(int64_t numbers, Memory s, const T* h, const T* c, T* y, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row)
        for (int64_t at = row * s.channels; at < (row + 1) * s.channels; ++at) {
            const T *own = h + at * numbers, *by = c + row * numbers;
            y[at] = T(total<double>(numbers, [=](int64_t n) { return double(own[n]) * double(by[n]); }));
        }
}

template <class T> void read(Memory s, const T* h, const T* c, T* y, int64_t first, int64_t end) {
    // The usual length is a constant, so that the compiler can unroll the loop.
    if (s.numbers == 16) read_rows<T>(16, s, h, c, y, first, end);
    else read_rows<T>(s.numbers, s, h, c, y, first, end);
}

}  // namespace

#define INTERFACE(T, name)                                                                                            \
    extern "C" void cyborg_read_##name(const int64_t* sizes, int64_t threads, const T* h, const T* c, T* y) {         \
        const Memory s{sizes[0], sizes[1], sizes[2]};                                                                 \
        split(s.rows, threads, [=](int64_t, int64_t first, int64_t end) { read<T>(s, h, c, y, first, end); });        \
    }
INTERFACE(float, float32)
INTERFACE(double, float64)
