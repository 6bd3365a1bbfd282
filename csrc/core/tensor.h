// Tensors as an address and strides, and the arguments of every operator. Python passes these instead of torch::Tensor, so
// that one build serves every torch.
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

// (B, C, H, W), strides in elements. Any strides: NCHW, channels-last, slices, the zeros of an expanded tensor.
struct Tensor {
    char* data = nullptr;  // null: absent
    Dtype dtype = Dtype::float32;
    int64_t batch = 0, channel = 0, row = 0, column = 0;
};

struct Sizes {
    int64_t batch, channels, rows, columns;
};

// One number for each sample: dL/dlogdet.
struct PerSample {
    const char* data = nullptr;
    int64_t stride = 0;
};

template <class T>
NCSR_FUNCTION T per_sample(const PerSample& values, int64_t sample) {
    return reinterpret_cast<const T*>(values.data)[sample * values.stride];
}

// True for channels-last: the channels of a pixel are adjacent in memory, not the pixels of a channel.
NCSR_FUNCTION bool channels_adjacent(const Tensor& x) { return x.channel == 1 && x.column != 1; }

enum class Map { affine, gaussian };

// affine_injector, affine_coupling and gaussian_split: the channels of x from `pass_through` on, mapped by the pairs in h.
struct Elementwise {
    Map map;
    Sizes size;
    int64_t pass_through;
    double eps;
    bool inverse;
    Tensor x, h;
    Tensor y;           // forward: written
    char* logdet;       // forward: (B,), written
    Tensor dy, dx, dh;  // backward: read, written, written
    PerSample dlogdet;  // backward: read
};

// y = after(mix·before(x) + offset) at every pixel, `before` and `after` being affine maps with the pairs in h_before and
// h_after, or absent.
struct FlowStep {
    Sizes size;
    double eps;
    bool inverse;
    Tensor x, h_before, h_after;
    const char *mix, *offset;  // (C, C) and (C,), dense, in the dtype of the arithmetic
    Tensor y;                  // forward: written; backward: read
    char* logdet;              // forward: (B,), written, of the affine maps alone
    Tensor dy, dx, dh_before, dh_after;  // backward: read, and three written
    PerSample dlogdet;                   // backward: read
    char *dmix, *doffset;                // backward: (C, C) and (C,), written

    // Pass-through channels of the two maps: encoding, a coupling comes before and an injector after; decoding, reversed.
    NCSR_FUNCTION int64_t pass_before() const { return inverse ? 0 : size.channels / 2; }
    NCSR_FUNCTION int64_t pass_after() const { return inverse ? size.channels / 2 : 0; }
};

// Square matrices, their inverses, log|det| and condition numbers ‖W‖·‖W⁻¹‖ in the ∞-norm, all dense float64.
struct InverseLogdet {
    int64_t count, channels;
    const double* weight;                  // (N, C, C)
    double *inverse, *logdet, *condition;  // (N, C, C), (N,) and (N,), written
};

// Actnorms and 1×1 convolutions as affine maps of a pixel, y = mix·x + offset: cpu/fold.h. Of a stack of N maps `batch` is the
// stride of a map, `row` and `column` are those of a matrix, and a vector is a row.
struct Fold {
    int64_t count, channels;
    bool inverse, needs_logdet;
    Tensor bias, logs, weight;      // (N, C), (N, C) and (N, C, C)
    Tensor mix, offset, logdet;     // forward: (N, C, C), (N, C) and (N,), written
    double* condition;              // forward: (N,), dense, written
    Tensor dmix, doffset, dlogdet;  // backward: read
    Tensor dbias, dlogs, dweight;   // backward: written
};

// The network of an injector or a coupling, three convolutions with relu after the first two: cpu/step_network.h.
struct StepNetwork {
    int64_t batch, rows, columns, pass_through, hidden, outputs;
    Tensor z1, pre, y;                   // z1 may be absent: pass_through is 0 then
    Tensor h1, h2;                       // written, or absent
    const char *w1, *w2, *b2, *w3, *b3;  // dense, in the dtype of the arithmetic
};

// The 3×3 convolution with zero padding: cpu/conv3x3.h. With `transposed` the gradient of its input: x is the gradient of the
// output then, and y that of the input. The gradient of its weight, of x and dy: cpu/conv3x3_gradient.h.
struct Conv3x3 {
    int64_t batch, x_rows, x_columns, rows, columns, inputs, outputs;
    bool upsample2x;     // the input is upsampled by 2
    Tensor x, y;         // read, and written or added to
    const char* weight;  // (outputs, inputs, 3, 3), or (inputs, outputs, 3, 3) when transposed
    int64_t by_output, by_input;  // strides of the 3×3 blocks of weight or dweight, in elements
    const char* bias;             // dense, or null
    double slope;                 // of the leaky relu; 1: none
    Tensor relu_output;     // absent, or a leaky-ReLU output, whose derivative multiplies the last channels of y
    int64_t relu_channels;  // of relu_output
    bool transposed, accumulate;
    Tensor dy;              // weight gradient: read
    char *dweight, *dbias;  // weight gradient: written; dbias is dense
};

// Make one long row of an image whose rows follow each other at one stride of pixels in every tensor.
inline __attribute__((always_inline)) void join_rows(Sizes& size, std::initializer_list<Tensor*> tensors) {
    if (size.columns == 1)
        for (Tensor* x : tensors) x->column = x->row;
    for (Tensor* x : tensors)
        if (size.columns != 1 && size.rows != 1 && x->data && x->row != size.columns * x->column) return;
    size.columns *= size.rows;
    size.rows = 1;
}

}  // namespace ncsr
