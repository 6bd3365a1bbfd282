// Tensors of any strides and dtype, read and written by the CUDA kernels, and sums without atomics.
#pragma once

#include "core/arithmetic.h"

namespace ncsr::cuda {

constexpr int threads = 256;  // of a block

// Shared memory of a size given at launch; the tests, which emulate a block on the CPU, define another macro.
#if !defined(NCSR_DYNAMIC_SHARED)
#define NCSR_DYNAMIC_SHARED(name) extern __shared__ double name[]
#endif

template <class T>
__device__ T read(const Tensor& x, int64_t at) {
    switch (x.dtype) {
        case Dtype::float64: return T(reinterpret_cast<const double*>(x.data)[at]);
        case Dtype::float16: return T(float(reinterpret_cast<const Float16*>(x.data)[at]));
        case Dtype::bfloat16: return T(float(reinterpret_cast<const BFloat16*>(x.data)[at]));
        default: return T(reinterpret_cast<const float*>(x.data)[at]);
    }
}

template <class T>
__device__ void write(const Tensor& x, int64_t at, T value) {
    switch (x.dtype) {
        case Dtype::float64: reinterpret_cast<double*>(x.data)[at] = double(value); break;
        case Dtype::float16: reinterpret_cast<Float16*>(x.data)[at] = Float16(float(value)); break;
        case Dtype::bfloat16: reinterpret_cast<BFloat16*>(x.data)[at] = BFloat16(float(value)); break;
        default: reinterpret_cast<float*>(x.data)[at] = float(value);
    }
}

// A pixel of a sample; `at` is the index of one of the pixel's channels in a tensor.
struct Pixel {
    int64_t sample, row, column;
    __device__ Pixel(const Sizes& size, int64_t sample, int64_t pixel)
        : sample(sample), row(size.rows == 1 ? 0 : pixel / size.columns), column(pixel - row * size.columns) {}
    __device__ int64_t at(const Tensor& x, int64_t channel) const {
        return sample * x.batch + row * x.row + column * x.column + channel * x.channel;
    }
};

// The sum over the threads of a block, in a fixed order, for all of them; `shared` has room for one number a thread.
__device__ inline double block_sum(double value, double* shared) {
    shared[threadIdx.x] = value;
    for (int half = threads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (int(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    __syncthreads();
    return shared[0];
}

// logdet[sample] = sign · Σ partial[sample, part], one block a sample.
template <class T>
__global__ void sum_logdet_kernel(const double* partial, int64_t parts, double sign, char* logdet) {
    __shared__ double shared[threads];
    double sum = 0;
    for (int64_t part = threadIdx.x; part < parts; part += threads) sum += partial[blockIdx.x * parts + part];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) reinterpret_cast<T*>(logdet)[blockIdx.x] = T(sign * sum);
}

// The element's part of the log-det, from the term that the map M returns.
template <class M, class T>
__device__ T element_logdet(T term) {
    return M::logdet_of_product ? log_positive(term) : term;
}

}  // namespace ncsr::cuda
