// Random weights, made where they are used: each value a hash of the seed and of its index.
#pragma once

namespace gorgon {

// splitmix64's finisher (Steele, Lea and Flood, 2014): 64 bits that look independent for every input.
__device__ inline uint64_t mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

__device__ inline void set_random(float* p, uint32_t bits, float bound) {
    *p = ((float)(bits >> 8) / 8388608.0f - 1.0f) * bound;  // 24 bits, in -1 to 1
}
__device__ inline void set_random(uint16_t* p, uint32_t bits, float bound) {
    float x;
    set_random(&x, bits, bound);
    *p = float_to_half(x);
}
__device__ inline void set_random(int8_t* p, uint32_t bits, float) { *p = (int8_t)((int)(bits >> 8) % 255 - 127); }
__device__ inline void set_random(uint8_t* p, uint32_t bits, float) { *p = (uint8_t)(bits >> 24); }

template <class T> __global__ void random_kernel(T* out, int64_t count, uint64_t seed, float bound) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) set_random(out + i, (uint32_t)(mixed(mixed(seed) + i) >> 32), bound);
}

// Floats uniform in +-bound, int8 in -127 .. 127, uint8 in 0 .. 255.
template <class T> inline void fill_random(T* out, int64_t count, uint64_t seed, float bound) {
    launch(random_kernel<T>, dim3((count + 255) / 256), dim3(256), 0, out, count, seed, bound);
}

}  // namespace gorgon
