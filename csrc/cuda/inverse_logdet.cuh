// Inverse, log|det| and condition number of square matrices on a GPU: one block a matrix, Gauss-Jordan elimination with partial
// pivoting in float64.
//
// A step of the elimination reads one buffer of the block and writes the other, so that one barrier a step is enough. Rows are
// swapped by reading: row k of the result comes from the pivot's row, and the pivot's row from row k. With P the product of the
// swaps, the result is (P·W)⁻¹, and W⁻¹ = (P·W)⁻¹·P: the columns are permuted at the end.
#pragma once

#include "cuda/memory.cuh"

namespace ncsr::cuda {

// The index of the largest `magnitude` of all threads, the smallest of several; both arrays have one entry a thread.
__device__ inline int block_argmax(double magnitude, int index, double* magnitudes, int* indices) {
    magnitudes[threadIdx.x] = magnitude;
    indices[threadIdx.x] = index;
    for (int half = threads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (int(threadIdx.x) >= half) continue;
        const double other = magnitudes[threadIdx.x + half];
        const int other_index = indices[threadIdx.x + half];
        if (other > magnitudes[threadIdx.x] || (other == magnitudes[threadIdx.x] && other_index < indices[threadIdx.x])) {
            magnitudes[threadIdx.x] = other;
            indices[threadIdx.x] = other_index;
        }
    }
    __syncthreads();
    const int found = indices[0];
    __syncthreads();  // before the arrays are used again
    return found;
}

// The row from `from` on with the largest magnitude in column `from`; a NaN is never the largest.
__device__ inline int pivot_row(const double* a, int n, int from, double* magnitudes, int* indices) {
    double largest = -1;
    int row = from;
    for (int i = from + int(threadIdx.x); i < n; i += threads) {
        const double magnitude = fabs(a[i * n + from]);
        if (magnitude > largest) largest = magnitude, row = i;
    }
    return block_argmax(largest, row, magnitudes, indices);
}

// The ∞-norm: the largest sum of magnitudes of a row, NaN if any sum is.
__device__ inline double block_norm(const double* a, int n, double* shared) {
    double largest = 0;
    for (int i = threadIdx.x; i < n; i += threads) {
        double sum = 0;
        for (int j = 0; j < n; ++j) sum += fabs(a[i * n + j]);
        if (sum > largest || sum != sum) largest = sum;  // nothing is larger than NaN
    }
    shared[threadIdx.x] = largest;
    __syncthreads();
    for (int i = 0; i < threads; ++i)
        if (shared[i] > largest || shared[i] != shared[i]) largest = shared[i];
    __syncthreads();
    return largest;
}

__global__ void inverse_logdet_kernel(InverseLogdet p, double* workspace) {
    __shared__ double magnitudes[threads];
    __shared__ int indices[threads];
    const int n = int(p.channels), elements = n * n;
    const int64_t first = int64_t(blockIdx.x) * elements;
    double *source = workspace + 2 * first, *target = source + elements, *inverse = p.inverse + first;
    const double* weight = p.weight + first;
    double logdet = 0;
    for (int i = threadIdx.x; i < elements; i += threads) source[i] = weight[i];
    const double norm = block_norm(weight, n, magnitudes);
    // until the end, the first row of `inverse` has the column of the inverse that each column of the result is
    for (int i = threadIdx.x; i < n; i += threads) inverse[i] = i;
    __syncthreads();
    for (int k = 0; k < n; ++k) {
        const int pivot = pivot_row(source, n, k, magnitudes, indices);
        const double scale = 1 / source[pivot * n + k];
        if (logdet != -INFINITY) logdet += log(fabs(source[pivot * n + k]));  // singular: the terms after -infinity are NaN
        for (int i = threadIdx.x; i < elements; i += threads) {
            const int row = i / n, column = i % n;
            const double scaled = (column == k ? 1 : source[pivot * n + column]) * scale;
            const int from = row == pivot ? k : row;
            target[i] = row == k ? scaled : (column == k ? 0 : source[from * n + column]) - source[from * n + k] * scaled;
        }
        if (threadIdx.x == 0) {
            const double swapped = inverse[k];
            inverse[k] = inverse[pivot];
            inverse[pivot] = swapped;
        }
        double* next = source;
        source = target;
        target = next;
        __syncthreads();
    }
    for (int i = threadIdx.x; i < n; i += threads) target[i] = inverse[i];
    __syncthreads();
    for (int i = threadIdx.x; i < elements; i += threads) inverse[i / n * n + int(target[i % n])] = source[i];
    const double condition = norm * block_norm(source, n, magnitudes);
    if (threadIdx.x == 0) {
        p.logdet[blockIdx.x] = logdet;
        p.condition[blockIdx.x] = condition;
    }
}

}  // namespace ncsr::cuda
