// The CUDA kernels run on a CPU, for machines without a GPU: each block's threads are threads, one block after the other.
//
// Compiled with csrc/module.cpp into a module like ncsr_fast._native, whose "device" memory is the CPU's. It checks
// the kernels' indices, masks, barriers and sums; what it cannot check is the GPU's memory model and its compiler.
#include <barrier>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static

struct dim3 {
    unsigned x, y;
    dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
};

static thread_local dim3 threadIdx;
static dim3 blockIdx, gridDim;
static std::barrier<>* barrier = nullptr;
static double* dynamic_shared = nullptr;
static constexpr int devices = 2;
static int current_device = 0, device_of_last_launch = -1;
static void __syncthreads() { barrier->arrive_and_wait(); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
static cudaError_t cudaGetLastError() { return cudaSuccess; }
static const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "" : "invalid device ordinal"; }
static cudaError_t cudaGetDeviceCount(int* count) { return *count = devices, cudaSuccess; }
static cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
static cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= devices) return cudaErrorInvalidDevice;
    return current_device = device, cudaSuccess;
}
static cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
    return std::memset(memory, value, bytes), cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
    return cudaSuccess;
}

template <class Launch>
void emulate(dim3 grid, size_t bytes, int block_threads, Launch launch) {
    gridDim = grid;
    device_of_last_launch = current_device;
    std::vector<double> memory(bytes / sizeof(double) + 1);
    dynamic_shared = memory.data();
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
            std::fill(memory.begin(), memory.end(), NAN);  // a GPU leaves garbage there
            std::barrier<> all(block_threads);
            barrier = &all;
            std::vector<std::thread> block;
            for (int i = 0; i < block_threads; ++i)
                block.emplace_back([&, i] {
                    threadIdx = dim3(unsigned(i));
                    launch();
                });
            for (std::thread& thread : block) thread.join();
        }
}

#define NCSR_DYNAMIC_SHARED(name) double* name = dynamic_shared
#define NCSR_LAUNCH(kernel, blocks, bytes, stream, ...) emulate(blocks, size_t(bytes), threads, [&] { kernel(__VA_ARGS__); })

#include "cuda/cuda.cu"

extern "C" __attribute__((visibility("default"))) int emulated_device() { return device_of_last_launch; }
