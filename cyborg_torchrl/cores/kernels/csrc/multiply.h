// Products of small matrices that fit into the cache: c += a b. The recurrences call them at every step.

#pragma once

#include "lanes.h"

namespace {

// R rows and two vectors of columns of the product stay in registers, while the loop reads the rows of b once.
// c is added at the end. A sum that started with a large c (a bias of time constants) would round every term to the
// digits of c.
template <class T, int R>
INLINE void multiply_block(const T* a, const T* b, int64_t inner, int64_t columns, T* c, int64_t left) {
    const int first = int(std::min<int64_t>(W<T>, left)), second = int(std::min<int64_t>(W<T>, left - first));
    Vec<T> sums[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = Vec<T>{};
    // Full vectors are the fast case. The other loop handles the last columns.
    if (first + second == 2 * W<T>)
        for (int64_t k = 0; k < inner; ++k) {
            const Vec<T> b_0 = load<T>(b + k * columns, W<T>), b_1 = load<T>(b + k * columns + W<T>, W<T>);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const T factor = a[r * inner + k];
                sums[r][0] += factor * b_0;
                sums[r][1] += factor * b_1;
            }
        }
    else
        for (int64_t k = 0; k < inner; ++k) {
            const Vec<T> b_0 = load<T>(b + k * columns, first), b_1 = load<T>(b + k * columns + first, second);
            for (int r = 0; r < R; ++r) {
                sums[r][0] += a[r * inner + k] * b_0;
                sums[r][1] += a[r * inner + k] * b_1;
            }
        }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        T* row = c + r * columns;
        store<T>(row, load<T>(row, first) + sums[r][0], first);
        store<T>(row + first, load<T>(row + first, second) + sums[r][1], second);
    }
}

// c [rows, columns] += a [rows, inner] b [inner, columns], all row-major. Blocks of eight rows come first: they load b
// from the cache least often. Blocks of four rows and of one row handle the rest.
template <class T>
void multiply(const T* a, const T* b, T* c, int64_t rows, int64_t inner, int64_t columns) {
    for (int64_t n = 0; n < columns; n += 2 * W<T>) {
        int64_t r = 0;
        const int64_t left = columns - n;
        for (; r + 8 <= rows; r += 8)
            multiply_block<T, 8>(a + r * inner, b + n, inner, columns, c + r * columns + n, left);
        for (; r + 4 <= rows; r += 4)
            multiply_block<T, 4>(a + r * inner, b + n, inner, columns, c + r * columns + n, left);
        for (; r < rows; ++r)
            multiply_block<T, 1>(a + r * inner, b + n, inner, columns, c + r * columns + n, left);
    }
}

}  // namespace
