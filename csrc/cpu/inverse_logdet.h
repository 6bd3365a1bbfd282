// Inverse, log|det| and condition number of square matrices in float64.
#pragma once

#include <cmath>
#include <utility>
#include <vector>

#include "cpu/tiles.h"

namespace ncsr::NCSR_ISA {

// Gauss-Jordan elimination with partial pivoting (Golub & Van Loan, Matrix Computations, 3.4). Overwrites `a` with its inverse,
// or with garbage where `inverse` is false, and returns log|det a|. For a singular matrix: -infinity, and `a` is NaN.
template <class T>
double eliminate(T* a, int64_t n, bool inverse) {
    double logdet = 0;
    std::vector<int64_t> swapped(static_cast<size_t>(n));
    for (int64_t k = 0; k < n; ++k) {
        int64_t pivot = k;
        for (int64_t i = k + 1; i < n; ++i)
            if (std::abs(a[i * n + k]) > std::abs(a[pivot * n + k])) pivot = i;
        swapped[k] = pivot;
        if (pivot != k)
            for (int64_t j = 0; j < n; ++j) std::swap(a[k * n + j], a[pivot * n + j]);
        T* __restrict row = &a[k * n];
        if (row[k] == 0) {
            std::fill(a, a + n * n, T(NAN));
            return -INFINITY;
        }
        const T scale = 1 / row[k];
        logdet += std::log(std::abs(double(row[k])));
        if (inverse) {
            row[k] = 1;
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) row[j] *= scale;
        }
        // the determinant needs the rows below the pivot alone, the inverse those above as well
        for (int64_t i = inverse ? 0 : k + 1; i < n; ++i) {
            if (i == k) continue;
            T* __restrict other = &a[i * n];
            const T factor = inverse ? other[k] : other[k] * scale;
            if (inverse) other[k] = 0;
#pragma omp simd
            for (int64_t j = inverse ? 0 : k + 1; j < n; ++j) other[j] -= factor * row[j];
        }
    }
    for (int64_t k = n - 1; inverse && k >= 0; --k)
        if (swapped[k] != k)
            for (int64_t i = 0; i < n; ++i) std::swap(a[i * n + k], a[i * n + swapped[k]]);
    return logdet;
}

// The ∞-norm: the largest sum of magnitudes of a row.
inline double norm(const double* a, int64_t n) {
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < n; ++j) sum += std::abs(a[i * n + j]);
        if (sum > largest || std::isnan(sum)) largest = sum;  // nothing is larger than NaN
    }
    return largest;
}

// One thread computes a matrix, so the number of threads changes no bit.
inline void inverse_logdet(const InverseLogdet& p, int threads) {
    const int64_t n = p.channels;
    parallel(p.count, p.count * n * n * n, threads, [&](int64_t index) {
        const double* weight = p.weight + index * n * n;
        double* inverse = p.inverse + index * n * n;
        std::copy(weight, weight + n * n, inverse);
        p.logdet[index] = eliminate(inverse, n, true);
        p.condition[index] = norm(weight, n) * norm(inverse, n);
    });
}

}  // namespace ncsr::NCSR_ISA
