// Products of small dense matrices in the first-level cache, written with explicit vectors so that the sums stay in registers.
#pragma once

#include "cpu/tiles.h"

namespace ncsr::NCSR_ISA {

#if defined(__AVX512F__)
constexpr int64_t vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int64_t vector_bytes = 32;
#else
constexpr int64_t vector_bytes = 16;
#endif

template <class T>
struct Vector {
    static constexpr int64_t length = vector_bytes / int64_t(sizeof(T));
    typedef T type __attribute__((vector_size(vector_bytes), aligned(sizeof(T)), may_alias));
};

// Prefetches memory that is read soon. The hardware prefetchers are throttled where other processes are busy on the same
// third-level cache: without these prefetches, kernels that read much from it ran at a quarter of their speed there.
NCSR_FUNCTION void prefetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

enum class Start { zero, row, column, add };

// An operand that is read element by element: (i, k) is data[i·row + k·column].
template <class T>
struct Scalars {
    const T* data;
    int64_t row, column;
};

// M rows of N vectors of sums, in registers.
template <int M, int N, class T>
struct Sums {
    using V = typename Vector<T>::type;
    static constexpr int64_t L = Vector<T>::length;
    V sum[M][N];

    NCSR_FUNCTION void start(Start start, const T* y, int64_t y_row, const T* values) {
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) {
                sum[i][j] = V{};
                if (start == Start::row) sum[i][j] = V{} + values[i];
                if (start == Start::column) sum[i][j] = *reinterpret_cast<const V*>(values + j * L);
                if (start == Start::add) sum[i][j] = *reinterpret_cast<const V*>(y + i * y_row + j * L);
            }
    }
    NCSR_FUNCTION void add(int64_t inner, Scalars<T> a, const T* b, int64_t b_row) {
        for (int64_t k = 0; k < inner; ++k) {
            V row[N];
            for (int j = 0; j < N; ++j) row[j] = *reinterpret_cast<const V*>(b + k * b_row + j * L);
            for (int i = 0; i < M; ++i) {
                const T factor = a.data[i * a.row + k * a.column];
                for (int j = 0; j < N; ++j) sum[i][j] += factor * row[j];
            }
        }
    }
    NCSR_FUNCTION void add(const T* y, int64_t y_row) {
#pragma GCC unroll 12
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) sum[i][j] += *reinterpret_cast<const V*>(y + i * y_row + j * L);
    }
    NCSR_FUNCTION void store(T* y, int64_t y_row) const {
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) *reinterpret_cast<V*>(y + i * y_row + j * L) = sum[i][j];
    }
    // y = relu(sum + more), where NaN stays NaN; `more` may be null
    NCSR_FUNCTION void store_relu(T* y, int64_t y_row, const T* more, int64_t more_row) const {
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) {
                V value = sum[i][j];
                if (more) value += *reinterpret_cast<const V*>(more + i * more_row + j * L);
                *reinterpret_cast<V*>(y + i * y_row + j * L) = value < V{} ? V{} : value;
            }
    }
};

// y (M rows of N vectors) = start + a·b. Loads and stores whole vectors, the columns beyond the last one included.
template <int M, int N, class T>
NCSR_FUNCTION void multiply_block(int64_t inner, Scalars<T> a, const T* b, int64_t b_row, T* y, int64_t y_row, Start start,
                                  const T* values) {
    Sums<M, N, T> sums;
    sums.start(start, y, y_row, values);
    sums.add(inner, a, b, b_row);
    sums.store(y, y_row);
}

// y (rows × columns) = start + a (rows × inner) · b (inner × columns). Start::row adds values[i] to row i, Start::column
// values[j] to column j, Start::add the previous y. Rows of b and y, and the values of Start::column, are read and written in
// whole vectors, so they must have room for padded(columns) elements.
template <class T>
void multiply(int64_t rows, int64_t columns, int64_t inner, Scalars<T> a, const T* b, int64_t b_row, T* y, int64_t y_row,
              Start start, const T* values = nullptr) {
    constexpr int64_t L = Vector<T>::length;
    const bool per_row = start == Start::row;
    constexpr bool wide = vector_bytes == 64;  // twice as many registers
    for (int64_t j = 0; j < columns; j += 2 * L) {
        const bool pair = columns - j > L;
        for (int64_t i = 0; i < rows;) {
            const Scalars<T> block{a.data + i * a.row, a.row, a.column};
            const T* initial = values + (per_row ? i : j);
            T* to = y + i * y_row + j;
            const bool four = rows - i >= 4, eight = (!pair || wide) && rows - i >= 8;
            if (eight && pair) multiply_block<8, wide ? 2 : 1>(inner, block, b + j, b_row, to, y_row, start, initial);
            if (eight && !pair) multiply_block<8, 1>(inner, block, b + j, b_row, to, y_row, start, initial);
            if (four && pair && !eight) multiply_block<4, 2>(inner, block, b + j, b_row, to, y_row, start, initial);
            if (four && !pair && !eight) multiply_block<4, 1>(inner, block, b + j, b_row, to, y_row, start, initial);
            if (!four && pair) multiply_block<1, 2>(inner, block, b + j, b_row, to, y_row, start, initial);
            if (!four && !pair) multiply_block<1, 1>(inner, block, b + j, b_row, to, y_row, start, initial);
            i += eight ? 8 : four ? 4 : 1;
        }
    }
}

template <class T>
constexpr int64_t padded(int64_t columns) {
    return (columns + Vector<T>::length - 1) / Vector<T>::length * Vector<T>::length;
}

// A length of rows, in elements, of which 16 and more do not share sets of the first-level cache: 64 of 64 bytes.
template <class T>
constexpr int64_t spread(int64_t row) {
    return row * int64_t(sizeof(T)) % 256 == 0 && row * int64_t(sizeof(T)) >= 256 ? row + Vector<T>::length : row;
}

}  // namespace ncsr::NCSR_ISA
