// Products of matrices that stay in the cache: c += a b.

#pragma once

#include "lanes.h"

namespace {

// R rows of the product and two vectors of its columns stay in registers while the rows of b go by. c is added at the end:
// begun with, a large c (a bias of time constants) would round every term to its own digits.
template <class T, int R>
INLINE void multiply_block(const T* a, int64_t row_a, int64_t step_a, const T* b, int64_t inner, int64_t columns, T* c,
                           int64_t left) {
    const int first = int(std::min<int64_t>(W<T>, left)), second = int(std::min<int64_t>(W<T>, left - first));
    Vec<T> sums[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = Vec<T>{};
    if (first + second == 2 * W<T>)
        for (int64_t k = 0; k < inner; ++k) {
            const Vec<T> b_0 = load<T>(b + k * columns, W<T>), b_1 = load<T>(b + k * columns + W<T>, W<T>);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const T factor = a[r * row_a + k * step_a];
                sums[r][0] += factor * b_0;
                sums[r][1] += factor * b_1;
            }
        }
    else
        for (int64_t k = 0; k < inner; ++k) {
            const Vec<T> b_0 = load<T>(b + k * columns, first), b_1 = load<T>(b + k * columns + first, second);
            for (int r = 0; r < R; ++r) {
                sums[r][0] += a[r * row_a + k * step_a] * b_0;
                sums[r][1] += a[r * row_a + k * step_a] * b_1;
            }
        }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        T* row = c + r * columns;
        store<T>(row, load<T>(row, first) + sums[r][0], first);
        store<T>(row + first, load<T>(row + first, second) + sums[r][1], second);
    }
}

// c [rows, columns] += a [rows, inner] b [inner, columns]; b and c row by row in memory, and a with any strides.
template <class T>
INLINE void multiply_strided(const T* a, int64_t row_a, int64_t step_a, const T* b, T* c, int64_t rows, int64_t inner,
                             int64_t columns) {
    for (int64_t n = 0; n < columns; n += 2 * W<T>) {
        int64_t r = 0;
        const int64_t left = columns - n;
        for (; r + 8 <= rows; r += 8)
            multiply_block<T, 8>(a + r * row_a, row_a, step_a, b + n, inner, columns, c + r * columns + n, left);
        for (; r + 4 <= rows; r += 4)
            multiply_block<T, 4>(a + r * row_a, row_a, step_a, b + n, inner, columns, c + r * columns + n, left);
        for (; r < rows; ++r)
            multiply_block<T, 1>(a + r * row_a, row_a, step_a, b + n, inner, columns, c + r * columns + n, left);
    }
}

template <class T>
void multiply(const T* a, const T* b, T* c, int64_t rows, int64_t inner, int64_t columns) {
    multiply_strided<T>(a, inner, 1, b, c, rows, inner, columns);
}

// c [rows, columns] += a' b for a [inner, rows] and b [inner, columns], so many of the rows of c from `first` on.
template <class T>
void multiply_transposed(const T* a, const T* b, T* c, int64_t rows, int64_t inner, int64_t columns, int64_t first,
                         int64_t end) {
    constexpr int64_t block = 128;  // rows of a and b that stay in the cache for all of c
    for (int64_t k = 0; k < inner; k += block)
        multiply_strided<T>(a + k * rows + first, 1, rows, b + k * columns, c + first * columns, end - first,
                            std::min(block, inner - k), columns);
}

}  // namespace
