// Actnorms and 1×1 convolutions folded into affine maps of a pixel, in float64.
//
//   forward  y = mix·x + offset,  mix = weight·diag(exp(logs)),      offset = mix·bias
//   inverse  x = mix·y + offset,  mix = diag(exp(-logs))·weight⁻¹,   offset = -bias
//   the log-det of a pixel is ±(Σ logs + log|det weight|)
//
// One thread folds a map, so the number of threads changes no bit.
#pragma once

#include <utility>

#include "cpu/inverse_logdet.h"
#include "cpu/matrix.h"

namespace ncsr::NCSR_ISA {

using Values = std::vector<double>;  // a vector, or the rows of an n × n matrix one after the other

// The vector (rows = 1) or the matrix of a map of a stack.
inline Values read(const Tensor& stack, int64_t map, int64_t rows, int64_t columns) {
    Values values(static_cast<size_t>(rows * columns));
    with_type(stack.dtype, [&](auto* type) {
        const auto* from = address<std::remove_pointer_t<decltype(type)>>(stack, Run{map, 0, 0, 0}, 0);
        move(values.data(), columns, 1, from, stack.row, stack.column, rows, columns);
    });
    return values;
}

inline void write(const Values& values, const Tensor& stack, int64_t map, int64_t rows, int64_t columns) {
    with_type(stack.dtype, [&](auto* type) {
        auto* to = address<std::remove_pointer_t<decltype(type)>>(stack, Run{map, 0, 0, 0}, 0);
        move(to, stack.row, stack.column, values.data(), columns, 1, rows, columns);
    });
}

// a·b
inline Values product(const Values& a, const Values& b, int64_t n) {
    const int64_t row = padded<double>(n);
    Values wide(size_t(n * row)), sum(size_t(n * row)), c(a.size());
    move(wide.data(), row, 1, b.data(), n, 1, n, n);
    multiply(n, n, n, Scalars<double>{a.data(), n, 1}, wide.data(), row, sum.data(), row, Start::zero);
    move(c.data(), n, 1, sum.data(), row, 1, n, n);
    return c;
}

inline Values transposed(const Values& a, int64_t n) {
    Values t(a.size());
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) t[j * n + i] = a[i * n + j];
    return t;
}

// exp(sign·logs)
inline Values exponentials(const Values& logs, double sign) {
    Values result(logs.size());
    for (size_t i = 0; i < logs.size(); ++i) result[i] = std::exp(sign * logs[i]);
    return result;
}

// The inverse, computed in T.
template <class T>
Values inverted(const Values& weight, int64_t n) {
    std::vector<T> a(weight.begin(), weight.end());
    eliminate(a.data(), n, true);
    return Values(a.begin(), a.end());
}

inline void fold_map_forward(const Fold& p, int64_t map) {
    const int64_t n = p.channels;
    const Values bias = read(p.bias, map, 1, n), logs = read(p.logs, map, 1, n), weight = read(p.weight, map, n, n);
    Values mix = weight, offset(bias.size());
    double logdet = 0, condition = 0;
    if (p.inverse || p.needs_logdet) {
        Values eliminated = weight;
        logdet = eliminate(eliminated.data(), n, p.inverse);
        if (p.inverse) {
            condition = norm(weight.data(), n) * norm(eliminated.data(), n);
            mix = std::move(eliminated);
        }
    }
    for (double value : logs) logdet += value;
    const Values scale = exponentials(logs, p.inverse ? -1 : 1);
    for (int64_t i = 0; i < n; ++i) {
        double* row = &mix[i * n];
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; ++j) {
            row[j] *= p.inverse ? scale[i] : scale[j];
            sum += row[j] * bias[j];
        }
        offset[i] = p.inverse ? -bias[i] : sum;
    }
    write(mix, p.mix, map, n, n);
    write(offset, p.offset, map, 1, n);
    write({p.inverse ? -logdet : logdet}, p.logdet, map, 1, 1);
    p.condition[map] = condition;
}

// Gradients of bias, logs and weight. weight⁻ᵀ, as the gradient of log|det weight|, is computed in float32 unless the weight is
// float64, since it is stored in no wider dtype; in the gradient of the inverse map it is always float64.
inline void fold_map_backward(const Fold& p, int64_t map) {
    const int64_t n = p.channels;
    const Values bias = read(p.bias, map, 1, n), logs = read(p.logs, map, 1, n), weight = read(p.weight, map, n, n);
    const Values doffset = read(p.doffset, map, 1, n);
    Values dmix = read(p.dmix, map, n, n);
    const double g = read(p.dlogdet, map, 1, 1)[0];
    const bool single = p.weight.dtype != Dtype::float64 && !p.inverse;
    const Values inverse = single ? inverted<float>(weight, n) : inverted<double>(weight, n);
    const Values inverse_transposed = transposed(inverse, n), scale = exponentials(logs, p.inverse ? -1 : 1);
    Values dbias(bias.size()), dlogs(bias.size()), dweight(dmix.size());
    if (p.inverse) {  // d(weight⁻¹) = exp(-logs)·dmix =: q, dweight = -weight⁻ᵀ·q·weight⁻ᵀ
        for (int64_t i = 0; i < n; ++i) {
            dbias[i] = -doffset[i];
            double sum = g;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < n; ++j) {
                dmix[i * n + j] *= scale[i];
                sum += dmix[i * n + j] * inverse[i * n + j];
            }
            dlogs[i] = -sum;
        }
        dweight = product(inverse_transposed, product(dmix, inverse_transposed, n), n);
        for (size_t i = 0; i < dweight.size(); ++i) dweight[i] = -dweight[i] - g * inverse_transposed[i];
    } else {
        for (int64_t j = 0; j < n; ++j) dlogs[j] = g;
        for (int64_t i = 0; i < n; ++i)
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) {
                const double total = dmix[i * n + j] + doffset[i] * bias[j];  // offset is mix·bias
                const double mix = weight[i * n + j] * scale[j];
                dweight[i * n + j] = total * scale[j] + g * inverse_transposed[i * n + j];
                dlogs[j] += total * mix;
                dbias[j] += mix * doffset[i];
            }
    }
    write(dbias, p.dbias, map, 1, n);
    write(dlogs, p.dlogs, map, 1, n);
    write(dweight, p.dweight, map, n, n);
}

inline void fold_forward(const Fold& p, int threads) {
    parallel(p.count, p.count * p.channels * p.channels * p.channels, threads, [&](int64_t map) { fold_map_forward(p, map); });
}

inline void fold_backward(const Fold& p, int threads) {
    parallel(p.count, 3 * p.count * p.channels * p.channels * p.channels, threads,
             [&](int64_t map) { fold_map_backward(p, map); });
}

}  // namespace ncsr::NCSR_ISA
