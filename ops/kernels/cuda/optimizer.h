// The optimizers' kernels: one pass over a parameter each, in place, four neighbouring numbers a thread; and sums of
// squares in double precision, in two stages of fixed order.
#pragma once

namespace gorgon {

constexpr int OPTIMIZER_THREADS = 256;

// Some arrays of equally many numbers. A rule gets the i-th number of each and changes it; READS and WRITES say by bits
// which arrays are read before and written after it.
template <int N> struct Arrays {
    float* p[N];
    bool wide;  // all are aligned for loads of 16 bytes
};

template <class Rule>
__global__ void __launch_bounds__(OPTIMIZER_THREADS) each_kernel(Rule rule, Arrays<Rule::N> arrays, int64_t count) {
    int64_t first = 4 * ((int64_t)blockIdx.x * blockDim.x + threadIdx.x);
    bool whole = arrays.wide && first + 4 <= count;
    float x[4][Rule::N] = {};
    for (int n = 0; n < Rule::N; n++) {
        if (!(Rule::READS >> n & 1)) continue;
        const float* p = arrays.p[n] + first;
        if (whole) {
            float4 v = *(const float4*)p;
            x[0][n] = v.x, x[1][n] = v.y, x[2][n] = v.z, x[3][n] = v.w;
        } else
            for (int i = 0; i < 4 && first + i < count; i++) x[i][n] = p[i];
    }
    for (int i = 0; i < 4; i++) rule(x[i]);
    for (int n = 0; n < Rule::N; n++) {
        if (!(Rule::WRITES >> n & 1)) continue;
        float* p = arrays.p[n] + first;
        if (whole) *(float4*)p = make_float4(x[0][n], x[1][n], x[2][n], x[3][n]);
        else
            for (int i = 0; i < 4 && first + i < count; i++) p[i] = x[i][n];
    }
}

template <class Rule, class... P> inline void for_each(const Rule& rule, int64_t count, P... pointers) {
    static_assert(sizeof...(P) == Rule::N, "an array for each of the rule's");
    if (count == 0) return;
    Arrays<Rule::N> arrays = {{(float*)pointers...}, true};
    for (float* p : arrays.p) arrays.wide = arrays.wide && (uintptr_t)p % 16 == 0;
    int64_t each = 4 * OPTIMIZER_THREADS;
    launch(each_kernel<Rule>, dim3((count + each - 1) / each), dim3(OPTIMIZER_THREADS), 0, rule, arrays, count);
}

// ---- AdamW ----

struct AdamW {
    float rate, beta1, beta2, eps, decay, scale;  // decay: rate * weight decay; scale: of the gradient, for clipping
    float correct1, correct2;                     // 1 - beta^step
    static constexpr int N = 4, READS = 15, WRITES = 14;  // grad, weight, mean, square
    __device__ void operator()(float (&x)[4]) const {
        float g = x[0] * scale;
        x[2] = beta1 * x[2] + (1 - beta1) * g;
        x[3] = beta2 * x[3] + (1 - beta2) * g * g;
        float step = divide(divide(x[2], correct1), sqrtf(divide(x[3], correct2)) + eps);
        x[1] -= rate * step + decay * x[1];
    }
};
inline void adamw(const AdamW& o, const float* grad, float* weight, float* mean, float* square, int64_t count) {
    for_each(o, count, grad, weight, mean, square);
}

// ---- Lion ----

struct Lion {
    float rate, beta1, beta2, decay, scale;  // as AdamW's
    static constexpr int N = 3, READS = 7, WRITES = 6;  // grad, weight, momentum
    __device__ void operator()(float (&x)[3]) const {
        float g = x[0] * scale;
        float mixed = beta1 * x[2] + (1 - beta1) * g;
        float sign = (mixed > 0 ? 1.0f : 0.0f) - (mixed < 0 ? 1.0f : 0.0f);
        x[2] = beta2 * x[2] + (1 - beta2) * g;
        x[1] -= rate * sign + decay * x[1];
    }
};
inline void lion(const Lion& o, const float* grad, float* weight, float* momentum, int64_t count) {
    for_each(o, count, grad, weight, momentum);
}

// ---- Muon: what is elementwise of it ----

// momentum = beta momentum + scale grad; direction = beta momentum + scale grad (Nesterov).
struct Nesterov {
    float beta, scale;
    static constexpr int N = 3, READS = 3, WRITES = 6;  // grad, momentum, direction
    __device__ void operator()(float (&x)[3]) const {
        float g = x[0] * scale;
        x[1] = beta * x[1] + g;
        x[2] = beta * x[1] + g;
    }
};
inline void nesterov(float beta, float scale, const float* grad, float* momentum, float* direction, int64_t count) {
    for_each(Nesterov{beta, scale}, count, grad, momentum, direction);
}

// out = a x + b y
struct WeightedSum {
    float a, b;
    static constexpr int N = 3, READS = 3, WRITES = 4;  // x, y, out
    __device__ void operator()(float (&x)[3]) const { x[2] = a * x[0] + b * x[1]; }
};
inline void weighted_sum(float a, const float* x, float b, const float* y, float* out, int64_t count) {
    for_each(WeightedSum{a, b}, count, x, y, out);
}

// weight -= rate update + decay weight
struct Descend {
    float rate, decay;
    static constexpr int N = 2, READS = 3, WRITES = 2;  // update, weight
    __device__ void operator()(float (&x)[2]) const { x[1] -= rate * x[0] + decay * x[1]; }
};
inline void descend(float rate, float decay, const float* update, float* weight, int64_t count) {
    for_each(Descend{rate, decay}, count, update, weight);
}

// ---- Moving average ----

// average = decay average + share value with share = 1 - decay, written with the difference, so that constant values
// stay as they are bit for bit.
struct MoveAverage {
    float share;
    static constexpr int N = 2, READS = 3, WRITES = 2;  // value, average
    __device__ void operator()(float (&x)[2]) const { x[1] += share * (x[0] - x[1]); }
};
inline void move_average(float share, const float* value, float* average, int64_t count) {
    for_each(MoveAverage{share}, count, value, average);
}

// a and b change places, bit for bit: they go through registers and no arithmetic.
struct Exchange {
    static constexpr int N = 2, READS = 3, WRITES = 3;
    __device__ void operator()(float (&x)[2]) const {
        float held = x[0];
        x[0] = x[1];
        x[1] = held;
    }
};
inline void exchange(float* a, float* b, int64_t count) { for_each(Exchange{}, count, a, b); }

// ---- sums of squares ----

// At most so many blocks; each adds up every so many-th stretch of numbers, and one block adds up what those found.
constexpr int64_t SQUARE_BLOCKS = 1024, SQUARE_STRETCH = 16 * OPTIMIZER_THREADS;

// Of all threads' x, to thread 0. shared: a double for each warp.
__device__ inline double sum_over_block(double x, double* shared) {
    for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(ALL_LANES, x, mask);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    double all = 0;
    for (unsigned warp = 0; threadIdx.x == 0 && warp < blockDim.x / 32; warp++) all += shared[warp];
    return all;
}

__global__ void __launch_bounds__(OPTIMIZER_THREADS)
    squares_kernel(const float* x, int64_t count, bool wide, double* partial) {
    GORGON_SHARED(double, shared);
    double sum = 0;
    int64_t step = 4 * (int64_t)gridDim.x * blockDim.x;
#pragma unroll 4
    for (int64_t i = 4 * ((int64_t)blockIdx.x * blockDim.x + threadIdx.x); i < count; i += step) {
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (wide && i + 4 <= count) v = *(const float4*)(x + i);
        else {
            v.x = x[i];
            if (i + 1 < count) v.y = x[i + 1];
            if (i + 2 < count) v.z = x[i + 2];
            if (i + 3 < count) v.w = x[i + 3];
        }
        sum += ((double)v.x * v.x + (double)v.y * v.y) + ((double)v.z * v.z + (double)v.w * v.w);
    }
    sum = sum_over_block(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(OPTIMIZER_THREADS)
    add_squares_kernel(const double* partial, int blocks, double* total, float* inverse_norm) {
    GORGON_SHARED(double, shared);
    double sum = 0;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) sum += partial[i];
    sum = sum_over_block(sum, shared);
    if (threadIdx.x) return;
    if (total) *total = sum;
    if (inverse_norm) *inverse_norm = (float)(1 / (sqrt(sum) + 1e-7));
}

// total = sum of x^2 in double precision; not finite where one of the numbers is not. partial: SQUARE_BLOCKS numbers.
// total, inverse_norm: each may be nullptr.
inline void sum_of_squares(const float* x, int64_t count, double* partial, double* total,
                           float* inverse_norm = nullptr) {
    int64_t blocks = (count + SQUARE_STRETCH - 1) / SQUARE_STRETCH;
    if (blocks == 0) blocks = 1;
    if (blocks > SQUARE_BLOCKS) blocks = SQUARE_BLOCKS;
    int shared = OPTIMIZER_THREADS / 32 * sizeof(double);
    launch(squares_kernel, dim3(blocks), dim3(OPTIMIZER_THREADS), shared, x, count, (uintptr_t)x % 16 == 0, partial);
    launch(add_squares_kernel, dim3(1), dim3(OPTIMIZER_THREADS), shared, partial, (int)blocks, total,
           inverse_norm);
}

// out = x / (norm of x + 1e-7). partial: SQUARE_BLOCKS numbers; inverse_norm: one.
struct Unit {
    const float* inverse_norm;
    static constexpr int N = 2, READS = 1, WRITES = 2;  // x, out
    __device__ void operator()(float (&x)[2]) const { x[1] = x[0] * *inverse_norm; }
};
inline void unit(const float* x, int64_t count, double* partial, float* inverse_norm, float* out) {
    sum_of_squares(x, count, partial, nullptr, inverse_norm);
    for_each(Unit{inverse_norm}, count, x, out);
}

}  // namespace gorgon
