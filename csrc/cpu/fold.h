// The parameters of an actnorm and a 1×1 convolution as one matrix, in double: done once a call, not at every pixel.
//
//   forward  y = mix·x + offset,  mix = weight·diag(exp(logs)),      offset = mix·bias
//   inverse  x = mix·y + offset,  mix = diag(exp(-logs))·weight⁻¹,   offset = -bias
//   the log-det of a pixel is ±(Σ logs + log|det weight|)
#pragma once

#include <utility>

#include "cpu/inverse_logdet.h"
#include "cpu/matrix.h"

namespace ncsr::NCSR_ISA {

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

inline Folded fold(const Vector64& bias, const Vector64& logs, const Matrix& weight, bool inverse, bool with_logdet) {
    const int64_t n = int64_t(bias.size());
    Folded f{weight, Vector64(bias.size()), 0, 0};
    Matrix undone = weight;
    if (inverse || with_logdet) f.logdet_of_pixel = eliminate(undone.data(), n, inverse);
    if (inverse) f.condition = norm(weight.data(), n) * norm(undone.data(), n);
    for (double value : logs) f.logdet_of_pixel += value;
    if (inverse) {
        f.logdet_of_pixel = -f.logdet_of_pixel;
        f.mix = std::move(undone);
    }
    const Vector64 scale = exponentials(logs, inverse ? -1 : 1);
    for (int64_t i = 0; i < n; ++i) {
        double* row = &f.mix[i * n];
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; ++j) {
            row[j] *= inverse ? scale[i] : scale[j];
            sum += row[j] * bias[j];
        }
        f.offset[i] = inverse ? -bias[i] : sum;
    }
    return f;
}

template <class T>
Matrix inverted(const Matrix& weight, int64_t n) {
    std::vector<T> a(weight.begin(), weight.end());
    eliminate(a.data(), n, true);
    return Matrix(a.begin(), a.end());
}

// The way back from dmix, doffset and g, the sum over samples and pixels of dL/dlogdet. With `single`, weight⁻ᵀ as the
// gradient of log|det weight| is found in float32, in which it will be stored; that of the inverse map is always in double.
inline FoldGradient fold_gradient(const Vector64& bias, const Vector64& logs, const Matrix& weight, Matrix dmix,
                                  const Vector64& doffset, double g, bool inverse, bool single) {
    const int64_t n = int64_t(bias.size());
    const Matrix undone = single && !inverse ? inverted<float>(weight, n) : inverted<double>(weight, n);
    const Matrix turned = transposed(undone, n);
    const Vector64 scale = exponentials(logs, inverse ? -1 : 1);
    FoldGradient d{Vector64(bias.size()), Vector64(bias.size()), Matrix(dmix.size())};
    if (inverse) {  // d(weight⁻¹) = exp(-logs)·dmix =: q, dweight = -weight⁻ᵀ·q·weight⁻ᵀ
        for (int64_t i = 0; i < n; ++i) {
            d.bias[i] = -doffset[i];
            double sum = g;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < n; ++j) {
                dmix[i * n + j] *= scale[i];
                sum += dmix[i * n + j] * undone[i * n + j];
            }
            d.logs[i] = -sum;
        }
        d.weight = product(turned, product(dmix, turned, n), n);
        for (size_t i = 0; i < d.weight.size(); ++i) d.weight[i] = -d.weight[i] - g * turned[i];
        return d;
    }
    for (int64_t j = 0; j < n; ++j) d.logs[j] = g;
    for (int64_t i = 0; i < n; ++i)
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
            const double total = dmix[i * n + j] + doffset[i] * bias[j];  // offset is mix·bias
            const double mix = weight[i * n + j] * scale[j];
            d.weight[i * n + j] = total * scale[j] + g * turned[i * n + j];
            d.logs[j] += total * mix;
            d.bias[j] += mix * doffset[i];
        }
    return d;
}

}  // namespace ncsr::NCSR_ISA
