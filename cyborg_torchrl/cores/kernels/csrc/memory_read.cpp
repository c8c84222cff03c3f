// A read from a memory: y = sum_n h_n c_n. See memory_read.py and native.py.
//
// The sum is in double precision: its terms may cancel, and the norm after it would amplify the rounding.

#include "norms.h"

namespace {

template <class T>
INLINE void read_rows(int64_t numbers, Sizes s, const T* h, const T* c, T* y, Part part) {
    for (int64_t row = part.first; row < part.end; ++row)
        for (int64_t at = row * s.channels; at < (row + 1) * s.channels; ++at) {
            const T *own = h + at * numbers, *by = c + row * numbers;
            y[at] = T(total<double>(numbers, [=](int64_t n) { return double(own[n]) * double(by[n]); }));
        }
}

template <class T> void read(Sizes s, const T* const* in, const uint8_t*, T* const* out, Part part) {
    // The usual length is a constant, so that the compiler can unroll the loop.
    if (s.numbers == 16) read_rows<T>(16, s, in[0], in[1], out[0], part);
    else read_rows<T>(s.numbers, s, in[0], in[1], out[0], part);
}

}  // namespace

INTERFACE(read)
