// What this machine can do at most, as the kernels could ask it of it: bytes read and copied, fused multiply-adds.
// Every function returns seconds, measured inside a team of threads that is already awake.
#pragma once

namespace gorgon {

#if defined(__AVX512F__)
constexpr int CHAINS = 16;  // of 32 registers; two units with a latency of four cycles need eight
#else
constexpr int CHAINS = 6;  // a vector takes two registers of 16
#endif

static inline double wake_team() {
    int awake = 0;
#pragma omp parallel reduction(+ : awake)
    awake += 1;
    return awake ? omp_get_wtime() : 0.0;
}

// Each thread reads its own stretch of x `sweeps` times, as four streams side by side and with 4 KiB fetched ahead:
// one stream without reached two thirds of this. What it adds up goes to `sink`, so that nothing is left out.
static inline double read_seconds(const float* x, int64_t count, int64_t sweeps, float* sink) {
    constexpr int64_t STREAMS = 4, STEP = 4 * LANES, AHEAD = 1024;
    float total = 0;
    double start = wake_team();
#pragma omp parallel reduction(+ : total)
    {
        int64_t t = omp_get_thread_num(), steps = count / omp_get_num_threads() / (STREAMS * STEP);
        const float* own = x + t * STREAMS * steps * STEP;
        vec acc[16] = {};
        for (int64_t sweep = 0; sweep < sweeps; sweep++) {
            for (int64_t i = 0; i < steps; i++)
#pragma GCC unroll 16
                for (int v = 0; v < 16; v++) {
                    const float* p = own + (v / 4 * steps + i) * STEP + v % 4 * LANES;
                    __builtin_prefetch(p + AHEAD);
                    acc[v] += load(p);
                }
            asm volatile("" ::: "memory");  // a sweep is not computed from the one before it
        }
        for (int v = 0; v < 16; v++) total += sum_lanes(acc[v]);
    }
    *sink = total;
    return omp_get_wtime() - start;
}

static inline double copy_seconds(const float* x, int64_t count, float* y) {
    double start = wake_team();
#pragma omp parallel
    {
        int64_t t = omp_get_thread_num(), n = omp_get_num_threads();
        int64_t first = count * t / n;
        memcpy(y + first, x + first, (count * (t + 1) / n - first) * sizeof(float));
    }
    return omp_get_wtime() - start;
}

// Independent chains acc = acc * a + b in registers: 2 * CHAINS * LANES operations an iteration and thread.
static inline double fma_seconds(float a, float b, int64_t iterations, float* sink) {
    float total = 0;
    double start = wake_team();
#pragma omp parallel reduction(+ : total)
    {
        vec acc[CHAINS], va = splat(a), vb = splat(b);
        for (int c = 0; c < CHAINS; c++) acc[c] = splat((float)c);
        for (int64_t i = 0; i < iterations; i++)
#pragma GCC unroll 16
            for (int c = 0; c < CHAINS; c++) acc[c] = acc[c] * va + vb;
        for (int c = 0; c < CHAINS; c++) total += sum_lanes(acc[c]);
    }
    *sink = total;
    return omp_get_wtime() - start;
}

}  // namespace gorgon
