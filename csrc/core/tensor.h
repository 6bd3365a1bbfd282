// Tensors as they lie: what Python hands over instead of a torch::Tensor, so that one build serves every torch.
#pragma once

#include <cstdint>
#include <initializer_list>

#if defined(__CUDACC__)
#define NCSR_FUNCTION __host__ __device__ __forceinline__
#else
#define NCSR_FUNCTION inline __attribute__((always_inline))
#endif

namespace ncsr {

enum class Dtype : int64_t { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

// (B, C, H, W), strides in elements. Any strides: NCHW, channels-last, slices, zeros of an expanded gradient.
struct Tensor {
    char* data = nullptr;  // null: not given
    Dtype dtype = Dtype::float32;
    int64_t batch = 0, channel = 0, row = 0, column = 0;
};

struct Sizes {
    int64_t batch, channels, rows, columns;
};

// One number per sample, dL/dlogdet.
struct PerSample {
    const char* data = nullptr;
    int64_t stride = 0;
};

template <class T>
NCSR_FUNCTION T per_sample(const PerSample& values, int64_t sample) {
    return reinterpret_cast<const T*>(values.data)[sample * values.stride];
}

// Whether what is adjacent in memory are the channels of a pixel, not the pixels of a channel.
NCSR_FUNCTION bool channels_adjacent(const Tensor& x) { return x.channel == 1 && x.column != 1; }

enum class Map { affine, gaussian };

// affine_injector, affine_coupling and gaussian_split: the last `channels - kept` channels of x mapped by the pairs in h.
struct Pointwise {
    Map map;
    Sizes size;
    int64_t kept;
    double eps;
    bool inverse;
    Tensor x, h;
    Tensor y;              // forward: written
    char* logdet;          // forward: (B,) written
    Tensor dy, dx, dh;     // backward: read, written, written
    PerSample dlogdet;     // backward: read
};

// pre-affine, C×C matrix, post-affine at every pixel: what lies between two coupling networks.
struct FlowStep {
    Sizes size;
    double eps;
    bool inverse;
    Tensor x, h_pre, h_post;      // h_pre, h_post may be null
    const char *mix, *offset;     // (C, C) and (C,), dense, in the dtype of the arithmetic
    Tensor y;                     // forward: written; backward: read
    char* logdet;                 // forward: (B,) written, of the affines alone
    Tensor dy, dx, dh_pre, dh_post;
    PerSample dlogdet;
    char *dmix, *doffset;         // backward: (C, C) and (C,) written

    // encoding couples first and injects last, decoding the other way round
    NCSR_FUNCTION int64_t kept_pre() const { return inverse ? 0 : size.channels / 2; }
    NCSR_FUNCTION int64_t kept_post() const { return inverse ? size.channels / 2 : 0; }
};

// Square matrices, their inverses, log|det| and condition numbers ‖W‖·‖W⁻¹‖ in the ∞-norm, all dense and in double.
struct InverseLogdet {
    int64_t count, channels;
    const double* weight;                  // (N, C, C)
    double *inverse, *logdet, *condition;  // (N, C, C), (N,) and (N,), written
};

// A small network of three convolutions, relu after the first two: network_cpu.h. On the CPU only.
struct Network {
    int64_t batch, rows, columns, kept, hidden, outputs;
    Tensor x, pre, y;                  // x may be null, kept then being 0
    Tensor h1, h2;                     // written too, unless null
    const char *w1, *w2, *b2, *w3, *b3;  // dense, in the dtype of the arithmetic
};

// 3x3 convolution with zero padding by Winograd's algorithm: winograd_cpu.h. On the CPU only.
struct Convolution {
    int64_t batch, x_rows, x_columns, rows, columns, inputs, outputs;
    bool copies;         // of 2×2 copies of every pixel of x; or transposed, with the outputs of 2×2 pixels summed up
    Tensor x, y;         // y is written, or added to
    const char* weight;  // (outputs, inputs, 3, 3), or (inputs, outputs, 3, 3) when transposed
    int64_t by_output, by_input;  // elements from a 3×3 of it to the next, or of dweight
    const char* bias;    // dense, as is dbias; may be null
    double slope;        // of the leaky relu; 1: none
    Tensor gate;         // null, or what a leaky relu made of the last channels of y: y is its gradient there
    int64_t gated;       // how many
    bool transposed, accumulate;
    Tensor dy;                // weight gradient: read, beside x
    char *dweight, *dbias;    // weight gradient: written
};

// Rows whose pixels follow each other at one stride in every tensor are one long row.
inline __attribute__((always_inline)) void join_rows(Sizes& size, std::initializer_list<Tensor*> tensors) {
    if (size.columns == 1)
        for (Tensor* x : tensors) x->column = x->row;
    for (Tensor* x : tensors)
        if (size.columns != 1 && size.rows != 1 && x->data && x->row != size.columns * x->column) return;
    size.columns *= size.rows;
    size.rows = 1;
}

}  // namespace ncsr
