// Launches of the CUDA kernels. Never run on a GPU yet: block and tile sizes are chosen by the compiler's report alone.
#include "cuda/cuda.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/dispatch.h"
#include "cuda/elementwise.cuh"
#include "cuda/flow_step.cuh"
#include "cuda/inverse_logdet.cuh"

// The tests, which emulate a launch on the CPU, define another macro.
#if !defined(NCSR_LAUNCH)
#define NCSR_LAUNCH(kernel, blocks, bytes, stream, ...) \
    kernel<<<blocks, threads, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace ncsr::cuda {

namespace {

constexpr int64_t backward_parts = 256;  // most blocks of a backward pass, each with a C×C sum: enough to fill a GPU

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t sample_blocks(const Elementwise& p) {
    return ceil_div(p.size.channels * p.size.rows * p.size.columns, threads * elementwise_items);
}

template <class T>
int64_t sample_tiles(const FlowStep& p) {
    return ceil_div(p.size.rows * p.size.columns, step_pixels(p.size.channels, sizeof(T)));
}

template <class T>
int64_t backward_blocks(const FlowStep& p) {
    return std::min(backward_parts, sample_tiles<T>(p) * p.size.batch);
}

void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("ncsr_fast: CUDA: ") + cudaGetErrorString(error));
}

bool empty(const Sizes& size) { return size.batch * size.rows * size.columns == 0; }

void clear(char* memory, int64_t bytes, void* stream) {
    if (bytes) check(cudaMemsetAsync(memory, 0, size_t(bytes), static_cast<cudaStream_t>(stream)));
}

// A grid is (blocks of a sample, samples); its second dimension may be 65535 at most.
dim3 grid(int64_t blocks, int64_t samples) {
    if (samples > 65535) throw std::runtime_error("ncsr_fast: CUDA: more than 65535 samples in a batch");
    return dim3(unsigned(blocks), unsigned(samples));
}

template <class M, bool inverse, class T, class Index>
void launch_elementwise(const Elementwise& p, double* partial, void* stream) {
    const dim3 blocks = grid(sample_blocks(p), p.size.batch);
    if (partial) {
        NCSR_LAUNCH((elementwise_forward_kernel<M, inverse, T, Index>), blocks, 0, stream, p, partial);
        NCSR_LAUNCH((sum_logdet_kernel<T>), dim3(unsigned(p.size.batch)), 0, stream, partial, sample_blocks(p),
                    inverse ? -1.0 : 1.0, p.logdet);
    } else {
        NCSR_LAUNCH((elementwise_backward_kernel<M, inverse, T, Index>), blocks, 0, stream, p);
    }
    check(cudaGetLastError());
}

void choose_elementwise(const Elementwise& p, bool float64, double* partial, void* stream) {
    // 32 bits also for the last block's indices, up to `threads * elementwise_items` beyond the end
    const bool narrow = p.size.channels * p.size.rows * p.size.columns < (int64_t(1) << 31) - threads * elementwise_items;
    std::visit(
        [&](auto map, auto inverse, auto t) {
            narrow ? launch_elementwise<decltype(map), inverse, decltype(t), uint32_t>(p, partial, stream)
                   : launch_elementwise<decltype(map), inverse, decltype(t), int64_t>(p, partial, stream);
        },
        map_type(p.map), direction(p.inverse), scalar(float64));
}

// Permits a kernel more shared memory than the default.
template <class Kernel>
void allow(Kernel kernel, int64_t bytes) {
    if (bytes > shared_bytes) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

template <int C, bool inverse, class T>
void launch_step(const FlowStep& p, void* workspace, bool backward, void* stream) {
    const int64_t channels = p.size.channels, pixels = step_pixels(channels, sizeof(T)), tiles = sample_tiles<T>(p);
    const int64_t bytes = 2 * channels * (pixels + 1) * int64_t(sizeof(T));
    if (!backward) {
        allow(flow_step_forward_kernel<C, inverse, T>, bytes);
        double* partial = static_cast<double*>(workspace);
        NCSR_LAUNCH((flow_step_forward_kernel<C, inverse, T>), grid(tiles, p.size.batch), bytes, stream, p, pixels, partial);
        NCSR_LAUNCH((sum_logdet_kernel<T>), dim3(unsigned(p.size.batch)), 0, stream, partial, tiles, inverse ? -1.0 : 1.0,
                    p.logdet);
    } else {
        allow(flow_step_backward_kernel<C, inverse, T>, bytes);
        T* partial = static_cast<T*>(workspace);
        const int64_t blocks = backward_blocks<T>(p);
        NCSR_LAUNCH((flow_step_backward_kernel<C, inverse, T>), dim3(unsigned(blocks)), bytes, stream, p, pixels, tiles,
                    partial);
        NCSR_LAUNCH((sum_parts_kernel<T>), dim3(unsigned(ceil_div(channels * channels + channels, threads))), 0, stream,
                    partial, blocks, channels, p.dmix, p.doffset);
    }
    check(cudaGetLastError());
}

template <bool inverse>
void choose_channels(const FlowStep& p, bool float64, void* workspace, bool backward, void* stream) {
    if (float64)
        return launch_step<0, inverse, double>(p, workspace, backward, stream);  // for checks of gradients: not specialised
    switch (p.size.channels) {
        case 12: return launch_step<12, inverse, float>(p, workspace, backward, stream);
        case 24: return launch_step<24, inverse, float>(p, workspace, backward, stream);
        case 48: return launch_step<48, inverse, float>(p, workspace, backward, stream);
        case 96: return launch_step<96, inverse, float>(p, workspace, backward, stream);
        case 192: return launch_step<192, inverse, float>(p, workspace, backward, stream);
        default: return launch_step<0, inverse, float>(p, workspace, backward, stream);
    }
}

void choose_step(const FlowStep& p, bool float64, void* workspace, bool backward, void* stream) {
    p.inverse ? choose_channels<true>(p, float64, workspace, backward, stream)
              : choose_channels<false>(p, float64, workspace, backward, stream);
}

}  // namespace

int64_t elementwise_workspace(const Elementwise& p) { return p.size.batch * sample_blocks(p) * int64_t(sizeof(double)); }

int64_t flow_step_workspace(const FlowStep& p, bool float64, bool backward) {
    const int64_t tiles = float64 ? sample_tiles<double>(p) : sample_tiles<float>(p);
    if (!backward) return p.size.batch * tiles * int64_t(sizeof(double));
    const int64_t part_size = p.size.channels * p.size.channels + p.size.channels;
    return part_size * (float64 ? backward_blocks<double>(p) * 8 : backward_blocks<float>(p) * 4);
}

void elementwise_forward(Elementwise p, bool float64, void* workspace, void* stream) {
    join_rows(p.size, {&p.x, &p.h, &p.y});
    if (empty(p.size)) return clear(p.logdet, p.size.batch * (float64 ? 8 : 4), stream);
    choose_elementwise(p, float64, static_cast<double*>(workspace), stream);
}

void elementwise_backward(Elementwise p, bool float64, void* stream) {
    if (empty(p.size)) return;
    join_rows(p.size, {&p.x, &p.h, &p.dy, &p.dx, &p.dh});
    choose_elementwise(p, float64, nullptr, stream);
}

void flow_step_forward(FlowStep p, bool float64, void* workspace, void* stream) {
    join_rows(p.size, {&p.x, &p.h_before, &p.h_after, &p.y});
    if (empty(p.size)) return clear(p.logdet, p.size.batch * (float64 ? 8 : 4), stream);
    choose_step(p, float64, workspace, false, stream);
}

void flow_step_backward(FlowStep p, bool float64, void* workspace, void* stream) {
    const int64_t channels = p.size.channels, element = float64 ? 8 : 4;
    if (empty(p.size)) {
        clear(p.dmix, channels * channels * element, stream);
        return clear(p.doffset, channels * element, stream);
    }
    join_rows(p.size, {&p.x, &p.h_before, &p.h_after, &p.y, &p.dy, &p.dx, &p.dh_before, &p.dh_after});
    choose_step(p, float64, workspace, true, stream);
}

void use_device(int ordinal) {
    int current = -1;
    check(cudaGetDevice(&current));
    if (current != ordinal) check(cudaSetDevice(ordinal));
}

int64_t inverse_logdet_workspace(int64_t count, int64_t channels) {
    return 2 * count * channels * channels * int64_t(sizeof(double));
}

void inverse_logdet(const InverseLogdet& p, void* workspace, void* stream) {
    if (p.count == 0) return;
    NCSR_LAUNCH(inverse_logdet_kernel, dim3(unsigned(p.count)), 0, stream, p, static_cast<double*>(workspace));
    check(cudaGetLastError());
}

const char* unavailable() {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    return error != cudaSuccess ? cudaGetErrorString(error) : devices ? "" : "no CUDA device";
}

}  // namespace ncsr::cuda
