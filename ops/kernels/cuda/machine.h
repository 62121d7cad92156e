// What this GPU can do at most, as the kernels could ask it of it: bytes read and copied, fused multiply-adds, products
// of halves, launches. The time is the device's, between two events, and a launch of the same kernel goes before: the
// clock starts on a device that is at work.
#pragma once
#include <chrono>

namespace gorgon {

// Blocks of a multiprocessor, which are all the threads that it takes, and of a device.
constexpr int MACHINE_THREADS = 256, MACHINE_BLOCKS = 8, MOST_MACHINE_BLOCKS = 4096;
constexpr size_t MACHINE_SHARED = MACHINE_THREADS / 32 * sizeof(float);

static inline int64_t machine_blocks() {
    int64_t blocks = MACHINE_BLOCKS * multiprocessors();
    return blocks < MOST_MACHINE_BLOCKS ? blocks : MOST_MACHINE_BLOCKS;
}

__global__ void keep_kernel(double value, double* place) { *place = value; }

// A number that the host knows, into the device's memory.
inline void keep(double value, double* place) { launch(keep_kernel, dim3(1), dim3(1), 0, value, place); }

__global__ void keep_as_double_kernel(const float* from, double* place) { *place = *from; }
inline void keep_as_double(const float* from, double* place) {
    launch(keep_as_double_kernel, dim3(1), dim3(1), 0, from, place);
}

template <class... P, class... A> inline double timed(void (*kernel)(P...), int64_t blocks, A... arguments) {
    Stopwatch watch;
    launch(kernel, dim3(blocks), dim3(MACHINE_THREADS), MACHINE_SHARED, arguments...);
    watch.start();
    launch(kernel, dim3(blocks), dim3(MACHINE_THREADS), MACHINE_SHARED, arguments...);
    watch.stop();
    return watch.seconds();
}

// ---- memory ----

// Four loads of 16 bytes in flight a thread; the first-level cache keeps none of it.
__global__ void __launch_bounds__(MACHINE_THREADS)
    read_kernel(const float* x, int64_t count, int64_t sweeps, float* partial) {
    GORGON_SHARED(float, shared);
    constexpr int LOADS = 4;
    int64_t step = (int64_t)gridDim.x * blockDim.x, own = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    int64_t vectors = count / 4;
    float sum = 0.0f;
    for (int64_t sweep = 0; sweep < sweeps; sweep++) {
        for (int64_t i = own; i < vectors; i += LOADS * step) {
            uint4 v[LOADS] = {};
#pragma unroll
            for (int n = 0; n < LOADS; n++)
                if (i + n * step < vectors) v[n] = load_once((const uint4*)x + i + n * step);
#pragma unroll
            for (int n = 0; n < LOADS; n++)
                sum += (__int_as_float((int)v[n].x) + __int_as_float((int)v[n].y)) +
                       (__int_as_float((int)v[n].z) + __int_as_float((int)v[n].w));
        }
        if (own < count % 4) sum += x[4 * vectors + own];
    }
    sum = over_block<Sum>(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// Seconds of reading x ``sweeps`` times. total: the sum of what was read. partial: MOST_MACHINE_BLOCKS numbers.
inline double read_seconds(const float* x, int64_t count, int64_t sweeps, float* partial, float* total) {
    if ((uintptr_t)x % 16) throw std::runtime_error("what is read must begin at a multiple of 16 bytes");
    int64_t blocks = machine_blocks();
    double seconds = timed(read_kernel, blocks, x, count, sweeps, partial);
    launch(total_kernel<MACHINE_THREADS>, dim3(1), dim3(MACHINE_THREADS), MACHINE_SHARED, (const float*)partial, blocks, total);
    return seconds;
}

__global__ void __launch_bounds__(MACHINE_THREADS) copy_kernel(const float* x, int64_t count, float* y) {
    int64_t step = (int64_t)gridDim.x * blockDim.x, own = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    int64_t vectors = count / 4;
#pragma unroll 4
    for (int64_t i = own; i < vectors; i += step) ((uint4*)y)[i] = load_once((const uint4*)x + i);
    if (own < count % 4) y[4 * vectors + own] = x[4 * vectors + own];
}
inline double copy_seconds(const float* x, int64_t count, float* y) {
    if ((uintptr_t)x % 16 || (uintptr_t)y % 16) throw std::runtime_error("a copy must begin at multiples of 16 bytes");
    return timed(copy_kernel, machine_blocks(), x, count, y);
}

// ---- arithmetic ----

constexpr int FMA_CHAINS = 8;  // independent ones of a thread, acc = acc a + b
constexpr int MMA_CHAINS = 8;  // of a warp, d += a b

__global__ void __launch_bounds__(MACHINE_THREADS) fma_kernel(float a, float b, int64_t iterations, float* sink) {
    float acc[FMA_CHAINS], total = 0.0f;
    for (int c = 0; c < FMA_CHAINS; c++) acc[c] = (float)(c + threadIdx.x);
    for (int64_t i = 0; i < iterations; i++)
#pragma unroll
        for (int c = 0; c < FMA_CHAINS; c++) acc[c] = acc[c] * a + b;
    for (int c = 0; c < FMA_CHAINS; c++) total += acc[c];
    if (total == -1.0f) *sink = total;  // never, which the compiler cannot know
}
inline double fma_seconds(float a, float b, int64_t iterations, float* sink) {
    return timed(fma_kernel, machine_blocks(), a, b, iterations, sink);
}
inline double fma_operations(int64_t iterations) {
    return 2.0 * FMA_CHAINS * iterations * MACHINE_THREADS * machine_blocks();
}

// sink: the first number that the first warp has added up, so that a test sees it.
__global__ void __launch_bounds__(MACHINE_THREADS) mma_kernel(float value, int64_t iterations, float* sink) {
    float d[MMA_CHAINS][4] = {};
    uint32_t pair = pack_halves(value, value), a[4] = {pair, pair, pair, pair}, b[2] = {pair, pair};
    for (int64_t i = 0; i < iterations; i++)
#pragma unroll
        for (int c = 0; c < MMA_CHAINS; c++) mma(d[c], a, b);
    float total = 0.0f;
    for (int c = 0; c < MMA_CHAINS; c++) total += (d[c][0] + d[c][1]) + (d[c][2] + d[c][3]);
    if (total == -1.0f || (blockIdx.x == 0 && threadIdx.x == 0)) *sink = d[0][0];
}
inline double mma_seconds(float value, int64_t iterations, float* sink) {
    return timed(mma_kernel, machine_blocks(), value, iterations, sink);
}
inline double mma_operations(int64_t iterations) {
    return 2.0 * 16 * 8 * 16 * MMA_CHAINS * iterations * MACHINE_THREADS / 32 * machine_blocks();
}

// ---- launches ----

__global__ void empty_kernel() {}

// Seconds of a launch of nothing: on the host, until the call returns; on the device, from one to the next, while the
// host is far ahead. ``ahead``: so many fused multiply-adds keep the device busy until all are launched.
inline void launch_seconds(int64_t launches, int64_t ahead, float* sink, double* on_host, double* on_device) {
    Stopwatch watch;
    launch(empty_kernel, dim3(1), dim3(32), 0);
    launch(fma_kernel, dim3(machine_blocks()), dim3(MACHINE_THREADS), 0, 0.9995f, 0.001f, ahead, sink);
    watch.start();
    auto begin = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < launches; i++) launch(empty_kernel, dim3(1), dim3(32), 0);
    double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    watch.stop();
    double device = watch.seconds();
    keep(seconds / launches, on_host);
    keep(device / launches, on_device);
}

}  // namespace gorgon
