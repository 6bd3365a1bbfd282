// The fused flow step on a GPU: a block computes an affine map, the C×C matrix and another affine map of a tile of pixels in
// shared memory.
//
//   forward   a = before(x), w = mix·a + offset, y = after(w)
//   backward  dw = after'(dy; y), dmix = Σ dw ⊗ a, doffset = Σ dw, da = mixᵀ·dw, dx = before'(da; x), a recomputed
//
// A tile is [channel][pixel] with one unused column, so that neither order of access has bank conflicts. C is the number of
// channels, known at compile time for the published models, or 0 for any other number.
#pragma once

#include "cuda/memory.cuh"

namespace ncsr::cuda {

// The pixels of a tile: the largest power of two up to 64 for which two buffers of C channels fit in `shared_bytes`.
constexpr int64_t shared_bytes = 40 * 1024;
inline int64_t step_pixels(int64_t channels, int64_t element) {
    int64_t pixels = 64;
    while (pixels > 1 && 2 * channels * (pixels + 1) * element > shared_bytes) pixels /= 2;
    return pixels;
}

// A tile: its sample, its first pixel, the number of pixels, and the stride of a channel in shared memory.
struct Tile {
    int64_t sample, first, pixels, row;
};

// Calls use(channel, index in the tile, pixel) for every element of a tile, such that neighbouring threads have elements that
// are adjacent in `like`.
template <int C, class Use>
__device__ void each(const Tile& tile, const Sizes& size, const Tensor& like, Use use) {
    const int channels = C ? C : int(size.channels), pixels = int(tile.pixels);
    const bool by_channel = channels_adjacent(like);
    for (int i = threadIdx.x; i < channels * pixels; i += threads) {
        const int c = by_channel ? i % channels : i / pixels, at = by_channel ? i / channels : i % pixels;
        use(c, at, Pixel(size, tile.sample, tile.first + at));
    }
}

// to = matrix·from + offset for the pixels of a tile, or with matrixᵀ; offset may be null. A thread computes four outputs from
// one read of an input.
template <int C, bool transposed, class T>
__device__ void mix(T* to, const T* from, const T* matrix, const T* offset, const Tile& tile, int64_t all_channels) {
    const int channels = C ? C : int(all_channels), pixels = int(tile.pixels);
    constexpr int outputs = 4;
    const int groups = (channels + outputs - 1) / outputs;
    for (int i = threadIdx.x; i < groups * pixels; i += threads) {
        const int at = i % pixels, o = i / pixels * outputs;
        T sum[outputs];
        for (int k = 0; k < outputs; ++k) sum[k] = offset && o + k < channels ? offset[o + k] : T(0);
        for (int c = 0; c < channels; ++c) {
            const T value = from[c * tile.row + at];
            for (int k = 0; k < outputs; ++k)
                if (o + k < channels) sum[k] += matrix[transposed ? c * channels + o + k : (o + k) * channels + c] * value;
        }
        for (int k = 0; k < outputs; ++k)
            if (o + k < channels) to[(o + k) * tile.row + at] = sum[k];
    }
}

template <bool inverse, class T>
__device__ T affine_at(T x, const Tensor& h, int64_t pair, const Pixel& pixel, T eps, T& s) {
    return Affine::apply<inverse>(x, read<T>(h, pixel.at(h, pair)), read<T>(h, pixel.at(h, pair + 1)), eps, s);
}

// Returns the gradient of an element, and writes that of its pair.
template <bool inverse, bool from_output, class T>
__device__ T affine_backward_at(T dy, T g, const Tensor& v, int64_t c, const Tensor& h, const Tensor& dh, int64_t pair,
                                const Pixel& pixel, T eps) {
    T dshift, draw;
    const T dx = Affine::backward<inverse, from_output>(dy, g, read<T>(v, pixel.at(v, c)), read<T>(h, pixel.at(h, pair)),
                                                        read<T>(h, pixel.at(h, pair + 1)), eps, dshift, draw);
    write(dh, pixel.at(dh, pair), dshift);
    write(dh, pixel.at(dh, pair + 1), draw);
    return dx;
}

// Writes a = before(x) to a tile; returns the thread's part of the log-det.
template <int C, bool inverse, class T>
__device__ double load_tile(T* a, const Tile& tile, const FlowStep& p) {
    double logdet = 0;
    each<C>(tile, p.size, p.x, [&](int c, int at, const Pixel& pixel) {
        T value = read<T>(p.x, pixel.at(p.x, c)), s;
        if (p.h_before.data && c >= p.pass_before()) {
            value = affine_at<inverse>(value, p.h_before, 2 * (c - p.pass_before()), pixel, T(p.eps), s);
            logdet += double(log_positive(s));
        }
        a[c * tile.row + at] = value;
    });
    return logdet;
}

__device__ inline Tile tile_at(int64_t index, int64_t sample, const Sizes& size, int64_t pixels) {
    const int64_t first = index * pixels, all = size.rows * size.columns;
    return {sample, first, first + pixels < all ? pixels : all - first, pixels + 1};
}

// Block (tile, sample).
template <int C, bool inverse, class T>
__global__ void flow_step_forward_kernel(FlowStep p, int64_t pixels, double* partial) {
    NCSR_DYNAMIC_SHARED(memory);
    __shared__ double shared[threads];
    const Tile tile = tile_at(blockIdx.x, blockIdx.y, p.size, pixels);
    T *a = reinterpret_cast<T*>(memory), *w = a + p.size.channels * tile.row;
    double logdet = load_tile<C, inverse>(a, tile, p);
    __syncthreads();
    mix<C, false>(w, a, reinterpret_cast<const T*>(p.mix), reinterpret_cast<const T*>(p.offset), tile, p.size.channels);
    __syncthreads();
    each<C>(tile, p.size, p.x, [&](int c, int at, const Pixel& pixel) {
        T value = w[c * tile.row + at], s;
        if (p.h_after.data && c >= p.pass_after()) {
            value = affine_at<inverse>(value, p.h_after, 2 * (c - p.pass_after()), pixel, T(p.eps), s);
            logdet += double(log_positive(s));
        }
        write(p.y, pixel.at(p.y, c), value);
    });
    logdet = block_sum(logdet, shared);
    if (threadIdx.x == 0) partial[int64_t(blockIdx.y) * gridDim.x + blockIdx.x] = logdet;
}

// A block computes every gridDim.x-th tile of the batch, and has its own sums: C·C + C numbers in `partial`.
template <int C, bool inverse, class T>
__global__ void flow_step_backward_kernel(FlowStep p, int64_t pixels, int64_t tiles_of_sample, T* partial) {
    NCSR_DYNAMIC_SHARED(memory);
    const int64_t channels = C ? C : p.size.channels;
    T *a = reinterpret_cast<T*>(memory), *dw = a + channels * (pixels + 1);
    T* sums = partial + blockIdx.x * (channels * channels + channels);  // of dmix, then of doffset
    for (int64_t i = threadIdx.x; i < channels * channels + channels; i += threads) sums[i] = T(0);
    for (int64_t index = blockIdx.x; index < tiles_of_sample * p.size.batch; index += gridDim.x) {
        const Tile tile = tile_at(index % tiles_of_sample, index / tiles_of_sample, p.size, pixels);
        const T g = per_sample<T>(p.dlogdet, tile.sample);
        __syncthreads();  // until all threads are done with the previous tile
        load_tile<C, inverse>(a, tile, p);
        each<C>(tile, p.size, p.x, [&](int c, int at, const Pixel& pixel) {
            T gradient = read<T>(p.dy, pixel.at(p.dy, c));
            if (p.h_after.data && c >= p.pass_after())
                gradient = affine_backward_at<inverse, true>(gradient, g, p.y, c, p.h_after, p.dh_after,
                                                             2 * (c - p.pass_after()), pixel, T(p.eps));
            dw[c * tile.row + at] = gradient;
        });
        __syncthreads();
        for (int64_t i = threadIdx.x; i < channels * channels + channels; i += threads) {
            const T* gradient = dw + (i < channels * channels ? i / channels : i - channels * channels) * tile.row;
            const T* value = i < channels * channels ? a + i % channels * tile.row : nullptr;
            T sum = T(0);
            for (int at = 0; at < tile.pixels; ++at) sum += value ? gradient[at] * value[at] : gradient[at];
            sums[i] += sum;
        }
        __syncthreads();
        mix<C, true>(a, dw, reinterpret_cast<const T*>(p.mix), static_cast<const T*>(nullptr), tile, channels);  // da over a
        __syncthreads();
        each<C>(tile, p.size, p.x, [&](int c, int at, const Pixel& pixel) {
            T gradient = a[c * tile.row + at];
            if (p.h_before.data && c >= p.pass_before())
                gradient = affine_backward_at<inverse, false>(gradient, g, p.x, c, p.h_before, p.dh_before,
                                                              2 * (c - p.pass_before()), pixel, T(p.eps));
            write(p.dx, pixel.at(p.dx, c), gradient);
        });
    }
}

// dmix and doffset as sums over the parts, in their order; a thread sums one number.
template <class T>
__global__ void sum_parts_kernel(const T* partial, int64_t parts, int64_t channels, char* dmix, char* doffset) {
    const int64_t part_size = channels * channels + channels, i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i >= part_size) return;
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += double(partial[part * part_size + i]);
    if (i < channels * channels)
        reinterpret_cast<T*>(dmix)[i] = T(sum);
    else
        reinterpret_cast<T*>(doffset)[i - channels * channels] = T(sum);
}

}  // namespace ncsr::cuda
