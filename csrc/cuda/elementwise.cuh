// affine_injector, affine_coupling and gaussian_split on a GPU: a thread maps elements, or copies pass-through ones.
//
// Bound by memory: forward reads x and h and writes y, backward reads dy, x and h and writes dx and dh.
#pragma once

#include "cuda/memory.cuh"

namespace ncsr::cuda {

constexpr int elementwise_items = 4;  // elements of a thread, a block's number of threads apart

// Block (part, sample). Index is 32 bits wide where a sample has fewer than 2³¹ elements: its divisions are far cheaper.
template <class M, bool inverse, class T, class Index>
__global__ void elementwise_forward_kernel(Elementwise p, double* partial) {
    __shared__ double shared[threads];
    const Index channels = Index(p.size.channels), pixels = Index(p.size.rows * p.size.columns), n = channels * pixels;
    const bool by_channel = channels_adjacent(p.x);
    double logdet = 0;
    for (int item = 0; item < elementwise_items; ++item) {
        const Index i = (Index(blockIdx.x) * elementwise_items + item) * threads + threadIdx.x;
        if (i >= n) break;
        const Index c = by_channel ? i % channels : i / pixels;
        const Pixel pixel(p.size, blockIdx.y, by_channel ? i / channels : i % pixels);
        const int64_t pair = 2 * (int64_t(c) - p.pass_through);
        T y = read<T>(p.x, pixel.at(p.x, c)), term;
        if (pair >= 0) {
            const T first = read<T>(p.h, pixel.at(p.h, pair)), second = read<T>(p.h, pixel.at(p.h, pair + 1));
            y = M::template apply<inverse>(y, first, second, T(p.eps), term);
            logdet += double(element_logdet<M>(term));
        }
        write(p.y, pixel.at(p.y, c), y);
    }
    logdet = block_sum(logdet, shared);
    if (threadIdx.x == 0) partial[int64_t(blockIdx.y) * gridDim.x + blockIdx.x] = logdet;
}

template <class M, bool inverse, class T, class Index>
__global__ void elementwise_backward_kernel(Elementwise p) {
    const Index channels = Index(p.size.channels), pixels = Index(p.size.rows * p.size.columns), n = channels * pixels;
    const bool by_channel = channels_adjacent(p.x);
    const T g = per_sample<T>(p.dlogdet, blockIdx.y);
    for (int item = 0; item < elementwise_items; ++item) {
        const Index i = (Index(blockIdx.x) * elementwise_items + item) * threads + threadIdx.x;
        if (i >= n) break;
        const Index c = by_channel ? i % channels : i / pixels;
        const Pixel pixel(p.size, blockIdx.y, by_channel ? i / channels : i % pixels);
        const int64_t pair = 2 * (int64_t(c) - p.pass_through);
        T dx = read<T>(p.dy, pixel.at(p.dy, c));
        if (pair >= 0) {
            T dfirst, dsecond;
            dx = M::template backward<inverse, false>(dx, g, read<T>(p.x, pixel.at(p.x, c)), read<T>(p.h, pixel.at(p.h, pair)),
                                                      read<T>(p.h, pixel.at(p.h, pair + 1)), T(p.eps), dfirst, dsecond);
            write(p.dh, pixel.at(p.dh, pair), dfirst);
            write(p.dh, pixel.at(p.dh, pair + 1), dsecond);
        }
        write(p.dx, pixel.at(p.dx, c), dx);
    }
}

}  // namespace ncsr::cuda
