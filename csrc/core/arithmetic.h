// The arithmetic of one element, shared by the CPU loops (which the compiler turns into SIMD lanes) and the CUDA kernels.
//
//   affine    s = q + eps, q = sigmoid(raw + 2)      forward  y = (x + shift)·s       log-det  Σ log s
//                                                    inverse  y = x/s - shift         log-det -Σ log s
//   gaussian  forward  y = (x - mean)·exp(-logs)     log-det  Σ -½(y² + log 2π) - logs
//             inverse  y = mean + exp(logs)·x        log-det -Σ -½(x² + log 2π) - logs
#pragma once

#include "core/half.h"

namespace ncsr {

// Constants of exp and log for a floating-point type, and the layout of its bits.
template <class T>
struct Format;

template <>
struct Format<float> {
    using Bits = int32_t;
    static constexpr int mantissa = 23, log_terms = 5;
    static constexpr float round = 12582912.0f;  // 1.5·2²³: adding it leaves the rounded integer in the low bits
    static constexpr Bits round_bits = 0x4b400000, limit = 116;  // of the exponent in `exp`
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr float smallest = 1.17549435e-38f;
    static constexpr Bits bias = 127, sqrt_half = 0x3f3504f3;
    // 2ʳ on [-½, ½] interpolated at Chebyshev's points; largest error 2e-9
    static constexpr int exp_degree = 6;
    NCSR_FUNCTION static constexpr float exp_coefficient(int k) {
        constexpr float c[] = {1.0f,
                               0.693147206702833f,
                               0.240226509222888f,
                               0.0555032722667031f,
                               0.00961805667852464f,
                               0.00134004281776158f,
                               0.000154614446985691f};
        return c[k];
    }
};

template <>
struct Format<double> {
    using Bits = int64_t;
    static constexpr int mantissa = 52, log_terms = 11;
    static constexpr double round = 6755399441055744.0;
    static constexpr Bits round_bits = 0x4338000000000000, limit = 1000;
    static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
    static constexpr double smallest = 2.2250738585072014e-308;
    static constexpr Bits bias = 1023, sqrt_half = 0x3fe6a09e667f3bcd;
    static constexpr int exp_degree = 11;  // largest error 3e-18
    NCSR_FUNCTION static constexpr double exp_coefficient(int k) {
        constexpr double c[] = {0.999999999999999997,    0.693147180559945309,     0.240226506959101596,
                                0.055504108664821627,    0.00961812910758725667,   0.00133335581464064707,
                                0.000154035304637243542, 0.0000152527338415567726, 1.32154325359123762e-6,
                                1.01780570877339411e-7,  7.07419429728852101e-9,   4.45581790833606449e-10};
        return c[k];
    }
};

// 2ᵗ with the exponent clamped to ±limit, where a sigmoid is 0 or 1 beside any eps: t = n + r, and 2ʳ by a polynomial.
// NaN stays NaN, and an infinite t gives NaN.
template <class T>
NCSR_FUNCTION T exp2_limited(T t) {
    using F = Format<T>;
    const T shifted = t + F::round;
    const T r = t - (shifted - F::round);
    T series = F::exp_coefficient(F::exp_degree);
    for (int k = F::exp_degree - 1; k >= 0; --k) series = series * r + F::exp_coefficient(k);
    // bits of `shifted` order like t, beyond ±2²² too, where r is 0
    auto n = bits_as<typename F::Bits>(shifted);
    n = n < F::round_bits - F::limit ? F::round_bits - F::limit : n;
    n = n > F::round_bits + F::limit ? F::round_bits + F::limit : n;
    return series * bits_as<T>((n - F::round_bits + F::bias) << F::mantissa);
}

// e = exp(-(raw + 2)); the gate is sigmoid(raw + 2) = 1/(1 + e).
template <class T>
NCSR_FUNCTION T gate_exponential(T raw) {
    return exp2_limited(raw * T(-1.44269504088896340736) + T(-2 * 1.44269504088896340736));
}

// log(x) for x > 0: x = m·2ⁿ with m in [√½, √2), log m = 2·artanh((m-1)/(m+1)). NaN stays NaN; zero is taken for `smallest`.
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

// A map of one element, whose two parameters are a pair of h: `apply<inverse>` returns y and the element's term of the
// log-det; `backward<inverse>` returns dx and the gradients of the pair. g is dL/dlogdet of the direction's own log-det.
struct Affine {
    static constexpr bool logdet_of_product = true;  // the term is s, not log s: one log for several elements

    template <bool inverse, class T>
    static NCSR_FUNCTION T apply(T x, T shift, T raw, T eps, T& s) {
        s = T(1) / (T(1) + gate_exponential(raw)) + eps;
        return inverse ? x / s - shift : (x + shift) * s;
    }

    // v is the input x, or with `from_output` the output y, which serves as well: x + shift = y/s, and x/s = y + shift.
    template <bool inverse, bool from_output, class T>
    static NCSR_FUNCTION T backward(T dy, T g, T v, T shift, T raw, T eps, T& dshift, T& draw) {
        const T e = gate_exponential(raw), q = T(1) / (T(1) + e), s = q + eps;
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
        static_assert(!from_output, "gaussian_split saves its input, not its output");
        if (inverse) {  // y = mean + exp(logs)·x, log-det = Σ ½x² + logs + const
            const T scale = exp_wide(logs);
            dmean = dy;
            dlogs = dy * scale * x + g;
            return dy * scale + g * x;
        }
        const T scale = exp_wide(-logs), y = (x - mean) * scale;
        const T through = dy - g * y;  // dL/dy, the log-density included
        dmean = -through * scale;
        dlogs = -through * y - g;
        return through * scale;
    }

  private:
    // exp over the whole range of the type, 0 and infinity included: the square of exp(x/2), which is within the limit
    template <class T>
    static NCSR_FUNCTION T exp_wide(T x) {
        const T half = exp2_limited(x * T(0.5 * 1.44269504088896340736));
        return half * half;
    }
};

}  // namespace ncsr
