// Reductions over the threads of a block. Every sum has one order: lanes by halves, then the warps in turn. device.h or
// emulator.h comes first.
#pragma once

namespace gorgon {

struct Sum {
    static constexpr float nothing = 0.0f;
    __device__ static float of(float a, float b) { return a + b; }
};
struct Largest {
    static constexpr float nothing = -3.4e38f;
    __device__ static float of(float a, float b) { return a > b ? a : b; }
};

template <class Of> __device__ inline float over_warp(float x) {
    for (int mask = 16; mask; mask /= 2) x = Of::of(x, __shfl_xor_sync(ALL_LANES, x, mask));
    return x;
}

// Of all threads' x, for all of them. shared: a float for each warp, free to be written once all threads are here.
template <class Of> __device__ inline float over_block(float x, float* shared) {
    x = over_warp<Of>(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    float all = Of::nothing;
    for (unsigned warp = 0; warp < blockDim.x / 32; warp++) all = Of::of(all, shared[warp]);
    return all;
}

// total = sum of x, by one block. Shared memory: a float for each warp.
template <int THREADS> __global__ void __launch_bounds__(THREADS) total_kernel(const float* x, int64_t count, float* total) {
    GORGON_SHARED(float, shared);
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += x[i];
    sum = over_block<Sum>(sum, shared);
    if (threadIdx.x == 0) *total = sum;
}

}  // namespace gorgon
