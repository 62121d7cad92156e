// The k largest of each row, largest first, equal values in the order of their index. A block takes a row; each of k
// rounds looks for the largest value after the previous one, so that nothing has to be marked or moved: k is small and
// the row stays in the cache.
#pragma once

namespace gorgon {

constexpr int SELECT_THREADS = 512;

struct Candidate {
    float value;
    int32_t index;
    __device__ bool before(const Candidate& other) const {
        return value > other.value || (value == other.value && index < other.index);
    }
};

__device__ inline Candidate first_of_warp(Candidate c) {
    for (int mask = 16; mask; mask /= 2) {
        Candidate other = {__shfl_xor_sync(ALL_LANES, c.value, mask), __shfl_xor_sync(ALL_LANES, c.index, mask)};
        if (other.before(c)) c = other;
    }
    return c;
}

// log: the log softmax in place of the values, at most 0.
__global__ void top_k_kernel(const float* x, int width, int k, bool log, float* values, int32_t* indices) {
    GORGON_SHARED(float, shared);  // a candidate for each warp
    Candidate* warps = (Candidate*)shared;
    const float* row = x + (int64_t)blockIdx.x * width;
    values += (int64_t)blockIdx.x * k;
    indices += (int64_t)blockIdx.x * k;
    Candidate last = {3.4e38f, -1}, highest = last;
    for (int place = 0; place < k; place++) {
        Candidate best = {-3.4e38f, INT32_MAX};
        for (int n = threadIdx.x; n < width; n += blockDim.x) {
            Candidate c = {row[n], n};
            if (last.before(c) && c.before(best)) best = c;
        }
        best = first_of_warp(best);
        __syncthreads();
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
        __syncthreads();
        last = warps[0];
        for (unsigned warp = 1; warp < blockDim.x / 32; warp++)
            if (warps[warp].before(last)) last = warps[warp];
        if (place == 0) highest = last;
        if (threadIdx.x == 0) {
            values[place] = last.value;
            indices[place] = last.index;
        }
    }
    if (!log) return;
    float sum = 0.0f;
    for (int n = threadIdx.x; n < width; n += blockDim.x) sum += exponential(row[n] - highest.value);
    float log_sum = highest.value + logf(over_block<Sum>(sum, shared));
    for (int place = threadIdx.x; place < k; place += blockDim.x) {  // thread 0 wrote them before the barriers above
        float y = values[place] - log_sum;
        values[place] = y < 0.0f ? y : 0.0f;
    }
}

inline void top_k(const float* x, int64_t rows, int64_t width, int64_t k, float* values, int32_t* indices) {
    launch(top_k_kernel, dim3(rows), dim3(SELECT_THREADS), SELECT_THREADS / 32 * sizeof(Candidate), x, (int)width, (int)k,
           false, values, indices);
}
inline void top_k_log(const float* x, int64_t rows, int64_t width, int64_t k, float* values, int32_t* indices) {
    launch(top_k_kernel, dim3(rows), dim3(SELECT_THREADS), SELECT_THREADS / 32 * sizeof(Candidate), x, (int)width, (int)k,
           true, values, indices);
}

}  // namespace gorgon
