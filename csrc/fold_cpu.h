// The parameters of an actnorm and a 1×1 convolution as one matrix, in double: done once a call, not at every pixel.
//
//   forward  y = mix·x + offset,  mix = weight·diag(exp(logs)),      offset = mix·bias
//   inverse  x = mix·y + offset,  mix = diag(exp(-logs))·weight⁻¹,   offset = -bias
//   the log-det of a pixel is ±(Σ logs + log|det weight|)
#pragma once

#include <cmath>
#include <utility>

#include "cpu.h"
#include "matrix_cpu.h"

namespace ncsr::NCSR_ISA {

// Gauss-Jordan elimination with partial pivoting: `a` becomes its inverse when `inverse`, else garbage. Returns log|det a|;
// that of a singular matrix is -infinity, and its inverse NaN.
inline double eliminate(Matrix& a, int64_t n, bool inverse) {
    double logdet = 0;
    std::vector<int64_t> swapped(static_cast<size_t>(n));
    for (int64_t k = 0; k < n; ++k) {
        int64_t pivot = k;
        for (int64_t i = k + 1; i < n; ++i)
            if (std::abs(a[i * n + k]) > std::abs(a[pivot * n + k])) pivot = i;
        swapped[k] = pivot;
        if (pivot != k)
            for (int64_t j = 0; j < n; ++j) std::swap(a[k * n + j], a[pivot * n + j]);
        double* __restrict row = &a[k * n];
        const double scale = 1 / row[k];
        logdet += std::log(std::abs(row[k]));
        if (inverse) {
            row[k] = 1;
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) row[j] *= scale;
        }
        // the determinant needs the rows below only, the inverse those above as well
        for (int64_t i = inverse ? 0 : k + 1; i < n; ++i) {
            if (i == k) continue;
            double* __restrict other = &a[i * n];
            const double factor = inverse ? other[k] : other[k] * scale;
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

// Largest sum of magnitudes in a row.
inline double norm(const Matrix& a, int64_t n) {
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < n; ++j) sum += std::abs(a[i * n + j]);
        if (!(sum <= largest)) largest = sum;  // NaN wins
    }
    return largest;
}

// a·b
inline Matrix product(const Matrix& a, const Matrix& b, int64_t n) {
    const int64_t row = padded<double>(n);
    Matrix wide(size_t(n * row)), sum(size_t(n * row)), c(a.size());
    move(wide.data(), row, 1, b.data(), n, 1, n, n);
    multiply(n, n, n, Scalars<double>{a.data(), n, 1}, wide.data(), row, sum.data(), row, Start::zero);
    move(c.data(), n, 1, sum.data(), row, 1, n, n);
    return c;
}

inline Matrix transposed(const Matrix& a, int64_t n) {
    Matrix t(a.size());
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) t[j * n + i] = a[i * n + j];
    return t;
}

// exp(sign·logs)
inline Vector64 exponentials(const Vector64& logs, double sign) {
    Vector64 result(logs.size());
    for (size_t i = 0; i < logs.size(); ++i) result[i] = std::exp(sign * logs[i]);
    return result;
}

inline Folded fold(const Vector64& bias, const Vector64& logs, const Matrix& weight, bool inverse, Needed needed) {
    const int64_t n = int64_t(bias.size());
    Folded f{weight, weight, Vector64(bias.size()), 0, 0};
    const bool need_inverse = inverse || needed == Needed::inverse;
    if (need_inverse || needed == Needed::logdet) f.logdet_of_pixel = eliminate(f.inverse_weight, n, need_inverse);
    if (need_inverse) f.condition = norm(weight, n) * norm(f.inverse_weight, n);
    for (double value : logs) f.logdet_of_pixel += value;
    if (inverse) {
        f.logdet_of_pixel = -f.logdet_of_pixel;
        f.mix = f.inverse_weight;
    }
    const Vector64 scale = exponentials(logs, inverse ? -1 : 1);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            f.mix[i * n + j] *= scale[size_t(inverse ? i : j)];
            f.offset[i] += inverse ? 0 : f.mix[i * n + j] * bias[j];
        }
        if (inverse) f.offset[i] = -bias[i];
    }
    return f;
}

// The way back from dmix, doffset and g, the sum over samples and pixels of dL/dlogdet.
inline FoldGradient fold_gradient(const Vector64& bias, const Vector64& logs, const Matrix& weight, Matrix dmix,
                                  const Vector64& doffset, double g, bool inverse) {
    const int64_t n = int64_t(bias.size());
    const Folded f = fold(bias, logs, weight, inverse, Needed::inverse);
    const Vector64 scale = exponentials(logs, inverse ? -1 : 1);
    FoldGradient d{Vector64(bias.size()), Vector64(bias.size()), Matrix(dmix.size())};
    const Matrix turned = transposed(f.inverse_weight, n);  // weight⁻ᵀ, the gradient of log|det weight|
    if (inverse) {  // d(weight⁻¹) = exp(-logs)·dmix =: q, dweight = -weight⁻ᵀ·q·weight⁻ᵀ
        for (int64_t i = 0; i < n; ++i) {
            d.bias[i] = -doffset[i];
            d.logs[i] = -g;
            for (int64_t j = 0; j < n; ++j) {
                d.logs[i] -= dmix[i * n + j] * f.mix[i * n + j];
                dmix[i * n + j] *= scale[i];
            }
        }
        d.weight = product(turned, product(dmix, turned, n), n);
        for (size_t i = 0; i < d.weight.size(); ++i) d.weight[i] = -d.weight[i] - g * turned[i];
        return d;
    }
    for (int64_t j = 0; j < n; ++j) d.logs[j] = g;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) {
            const double total = dmix[i * n + j] + doffset[i] * bias[j];  // offset is mix·bias
            d.weight[i * n + j] = total * scale[j] + g * turned[i * n + j];
            d.logs[j] += total * f.mix[i * n + j];
            d.bias[j] += f.mix[i * n + j] * doffset[i];
        }
    return d;
}

}  // namespace ncsr::NCSR_ISA
