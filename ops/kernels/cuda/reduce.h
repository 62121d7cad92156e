// What the threads of a block find out together. Every sum is added up in one order: lanes by halves, then the warps one
// after the other. device.h or emulator.h comes first.
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

// Of all threads' x, to all of them. shared: a float for each warp, free to be written once all threads have come here.
template <class Of> __device__ inline float over_block(float x, float* shared) {
    x = over_warp<Of>(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    float all = Of::nothing;
    for (unsigned warp = 0; warp < blockDim.x / 32; warp++) all = Of::of(all, shared[warp]);
    return all;
}

}  // namespace gorgon
