// The arithmetic of one element, shared by the CPU loops (which the compiler turns into SIMD lanes) and the CUDA kernels.
//
//   affine    s = q + eps, q = sigmoid(raw + 2)      forward  y = (x + shift)·s       log-det  Σ log s
//                                                    inverse  y = x/s - shift         log-det -Σ log s
//   gaussian  forward  y = (x - mean)·exp(-logs)     log-det  Σ -½(y² + log 2π) - logs
//             inverse  y = mean + exp(logs)·x        log-det -Σ -½(x² + log 2π) - logs
#pragma once

#include "half.h"

namespace ncsr {

// Constants of exp and log by type: how many terms bring the truncation below an ulp, and the layout of the bits.
template <class T>
struct Format;

template <>
struct Format<float> {
    using Bits = int32_t;
    static constexpr int mantissa = 23, exp_terms = 7, log_terms = 5;
    static constexpr float round = 12582912.0f;  // 1.5·2²³: adding it leaves the rounded integer in the low bits
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr float exp_limit = 80.0f;  // keeps 2ⁿ normal; sigmoid(±80) is 0 or 1 beside any eps
    static constexpr float smallest = 1.17549435e-38f;
    static constexpr Bits one = 0x3f800000, sqrt_half = 0x3f3504f3;
};

template <>
struct Format<double> {
    using Bits = int64_t;
    static constexpr int mantissa = 52, exp_terms = 13, log_terms = 11;
    static constexpr double round = 6755399441055744.0;
    static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
    static constexpr double exp_limit = 700.0;
    static constexpr double smallest = 2.2250738585072014e-308;
    static constexpr Bits one = 0x3ff0000000000000, sqrt_half = 0x3fe6a09e667f3bcd;
};

// 1/k!, evaluated by the compiler.
template <class T>
struct InverseFactorials {
    T values[14];
    constexpr InverseFactorials() : values{} {
        values[0] = T(1);
        for (int k = 1; k < 14; ++k) values[k] = values[k - 1] / T(k);
    }
};

// exp(x) for |x| ≤ exp_limit, clamped outside: x = n·ln 2 + r, exp(r) by its series. NaN stays NaN.
template <class T>
NCSR_FUNCTION T exp_limited(T x) {
    using F = Format<T>;
    x = x < -F::exp_limit ? -F::exp_limit : x;
    x = x > F::exp_limit ? F::exp_limit : x;
    const T shifted = x * T(1.44269504088896340736) + F::round;
    const T n = shifted - F::round;
    const T r = (x - n * F::ln2_high) - n * F::ln2_low;
    constexpr InverseFactorials<T> coefficients;
    T series = coefficients.values[F::exp_terms];
    for (int k = F::exp_terms - 1; k >= 0; --k) series = series * r + coefficients.values[k];
    const auto power = bits_as<typename F::Bits>(shifted) << F::mantissa;  // n moved into the exponent
    return series * bits_as<T>(power + F::one);
}

// log(x) for x > 0: x = m·2ⁿ with m in [√½, √2), log m = 2·artanh((m-1)/(m+1)). NaN stays NaN; zero counts as `smallest`.
template <class T>
NCSR_FUNCTION T log_positive(T x) {
    using F = Format<T>;
    const T normal = x < F::smallest ? F::smallest : x;
    const auto offset = bits_as<typename F::Bits>(normal) - F::sqrt_half;
    const auto n = offset >> F::mantissa;
    const T m = bits_as<T>((offset & ((typename F::Bits(1) << F::mantissa) - 1)) + F::sqrt_half);
    const T f = (m - T(1)) / (m + T(1)), f2 = f * f;
    T series = T(1) / T(2 * F::log_terms - 1);
    for (int k = F::log_terms - 1; k >= 1; --k) series = series * f2 + T(1) / T(2 * k - 1);
    const T result = T(n) * F::ln2_high + (T(2) * f * series + T(n) * F::ln2_low);
    return x == x ? result : x;
}

// Every map: `apply<inverse>` returns y and what the log-det collects of the element; `backward<inverse>` returns dx and
// the gradients of the pair. g is dL/dlogdet, the log-det having the sign of its direction.
struct Affine {
    static constexpr bool logdet_of_product = true;  // the log-det collects s, not log s: one log for several elements

    template <bool inverse, class T>
    static NCSR_FUNCTION T apply(T x, T shift, T raw, T eps, T& s) {
        s = T(1) / (T(1) + exp_limited(-(raw + T(2)))) + eps;
        return inverse ? x / s - shift : (x + shift) * s;
    }

    // v is x, or with `from_output` the y that was computed from it, which serves as well: (x + shift) = y/s, x/s = y + shift.
    template <bool inverse, bool from_output, class T>
    static NCSR_FUNCTION T backward(T dy, T g, T v, T shift, T raw, T eps, T& dshift, T& draw) {
        const T e = exp_limited(-(raw + T(2))), q = T(1) / (T(1) + e), s = q + eps;
        const T slope = e * q * q;  // ds/draw = q(1 - q), without the cancellation of 1 - q
        const T per_s = T(1) / s;
        const T sum_or_ratio = inverse == from_output ? v + shift : v * per_s;
        if (inverse) {
            dshift = -dy;
            draw = -(dy * sum_or_ratio + g) * per_s * slope;
            return dy * per_s;
        }
        dshift = dy * s;
        draw = (dy * sum_or_ratio + g * per_s) * slope;
        return dshift;
    }
};

struct Gaussian {
    static constexpr bool logdet_of_product = false;
    static constexpr double half_log_2pi = 0.91893853320467274178;

    template <bool inverse, class T>
    static NCSR_FUNCTION T apply(T x, T mean, T logs, T, T& term) {
        const T y = inverse ? mean + exp_wide(logs) * x : (x - mean) * exp_wide(-logs);
        const T latent = inverse ? x : y;
        term = T(-0.5) * latent * latent - T(half_log_2pi) - logs;
        return y;
    }

    template <bool inverse, bool from_output, class T>
    static NCSR_FUNCTION T backward(T dy, T g, T x, T mean, T logs, T, T& dmean, T& dlogs) {
        static_assert(!from_output, "the split keeps its input");
        if (inverse) {  // y = mean + exp(logs)·x, log-det = Σ ½x² + logs + const
            const T scale = exp_wide(logs);
            dmean = dy;
            dlogs = dy * scale * x + g;
            return dy * scale + g * x;
        }
        const T scale = exp_wide(-logs), y = (x - mean) * scale;
        const T through = dy - g * y;  // dL/dy with the log-density's share
        dmean = -through * scale;
        dlogs = -through * y - g;
        return through * scale;
    }

  private:
    // exp over the whole range of the type, to 0 and infinity, as two halves that exp_limited can hold
    template <class T>
    static NCSR_FUNCTION T exp_wide(T x) {
        const T half = exp_limited(x * T(0.5));
        return half * half;
    }
};

}  // namespace ncsr
