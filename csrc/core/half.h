// float16 and bfloat16 in storage, float in arithmetic. A GPU converts in hardware, a CPU by the bit arithmetic below.
#pragma once

#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "core/tensor.h"

namespace ncsr {

template <class To, class From>
NCSR_FUNCTION To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "both types have one size");
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}

struct BFloat16 {
    uint16_t bits;
    BFloat16() = default;
#if defined(__CUDA_ARCH__)
    __device__ operator float() const { return __bfloat162float(bits_as<__nv_bfloat16>(bits)); }
    __device__ explicit BFloat16(float value) : bits(bits_as<uint16_t>(__float2bfloat16_rn(value))) {}
#else
    NCSR_FUNCTION operator float() const { return bits_as<float>(uint32_t(bits) << 16); }
    NCSR_FUNCTION explicit BFloat16(float value) {
        const uint32_t full = bits_as<uint32_t>(value);
        const uint32_t rounded = (full + 0x7fff + ((full >> 16) & 1)) >> 16;  // to nearest, ties to even
        bits = uint16_t(value == value ? rounded : 0x7fc0);
    }
#endif
};

struct Float16 {
    uint16_t bits;
    Float16() = default;
#if defined(__CUDA_ARCH__)
    __device__ operator float() const { return __half2float(bits_as<__half>(bits)); }
    __device__ explicit Float16(float value) : bits(bits_as<uint16_t>(__float2half_rn(value))) {}
#else
    NCSR_FUNCTION operator float() const {
        // a multiplication by 2¹¹² = 2^(127-15) rebases the exponent, and normalises subnormals
        const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7fff) << 13;
        const uint32_t finite = bits_as<uint32_t>(bits_as<float>(rest) * 5.192296858534828e33f);
        return bits_as<float>(((bits & 0x7c00) == 0x7c00 ? rest | 0x7f800000 : finite) | sign);
    }
    NCSR_FUNCTION explicit Float16(float value) {
        const uint32_t full = bits_as<uint32_t>(value), sign = (full >> 16) & 0x8000, magnitude = full & 0x7fffffff;
        // ties to even; a carry runs into the exponent, up to infinity
        const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
        // below 2⁻¹⁴: adding ½, whose last bit is 2⁻²⁴, rounds
        const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000;
        const uint32_t huge = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;  // NaN; infinity and magnitudes that round to it
        bits = uint16_t((magnitude >= 0x47800000 ? huge : magnitude < 0x38800000 ? subnormal : normal) | sign);
    }
#endif
};

}  // namespace ncsr
