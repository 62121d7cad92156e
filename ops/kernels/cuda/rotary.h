// The rotary embedding, and rows written into a cache in place.
#pragma once

namespace gorgon {

constexpr int ELEMENT_THREADS = 256;

// Rotate (x_i, x_{i + d/2}) by an angle per row and i; back for direction -1. x, out: (rows, heads, d).
__global__ void rotary_kernel(const float* x, int64_t pairs, int heads, int half, const float* cosine,
                              const float* sine, float direction, float* out) {
    int64_t pair = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (pair >= pairs) return;
    int64_t head = pair / half, angle = head / heads * half + pair % half;
    int64_t at = head * 2 * half + pair % half;
    float low = x[at], high = x[at + half], c = cosine[angle], s = direction * sine[angle];
    out[at] = low * c - high * s;
    out[at + half] = high * c + low * s;
}

inline void rotary(const float* x, int64_t rows, int64_t heads, int64_t d, const float* cosine, const float* sine,
                   float direction, float* out) {
    int64_t pairs = rows * heads * (d / 2);
    launch(rotary_kernel, dim3((pairs + ELEMENT_THREADS - 1) / ELEMENT_THREADS), dim3(ELEMENT_THREADS), 0, x, pairs,
           (int)heads, (int)(d / 2), cosine, sine, direction, out);
}

template <class T> __global__ void write_rows_kernel(T* cache, const T* rows, int64_t count, int32_t* done) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) cache[i] = rows[i];
    if (i == 0) *done = 0;
}

// cache: the place of the first row. 16 bytes at a time where both are aligned.
inline void write_rows(float* cache, const float* rows, int64_t count, int32_t* done) {
    bool wide = count % 4 == 0 && (uintptr_t)cache % 16 == 0 && (uintptr_t)rows % 16 == 0;
    int64_t pieces = wide ? count / 4 : count;
    dim3 grid((pieces + ELEMENT_THREADS - 1) / ELEMENT_THREADS), block(ELEMENT_THREADS);
    if (wide)
        launch(write_rows_kernel<float4>, grid, block, 0, cache, rows, pieces, done);
    else
        launch(write_rows_kernel<float>, grid, block, 0, cache, rows, pieces, done);
}

}  // namespace gorgon
