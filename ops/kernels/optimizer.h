// CPU kernels of the optimizers: one pass over a parameter each, in place, in parallel over elements.
// vector.h and cpu.h come first: Jittor resolves includes itself and does not find files in this folder.
#pragma once

namespace gorgon {

// Sum of squares in double precision, one partial sum a block of 4096 so that the order never changes.
// A NaN or an infinity goes through products and sums also under -Ofast; tests for them are the caller's, in Python.
static inline double sum_of_squares(const float* x, int64_t count) {
    int64_t blocks = (count + 4095) / 4096;
    std::vector<double> partial(blocks);
#pragma omp parallel for
    for (int64_t b = 0; b < blocks; b++) {
        double sum = 0;
        for (int64_t i = b * 4096; i < count && i < (b + 1) * 4096; i++) sum += (double)x[i] * x[i];
        partial[b] = sum;
    }
    double total = 0;
    for (double p : partial) total += p;
    return total;
}

// ---- AdamW ----

struct AdamW {
    float rate, beta1, beta2, eps, decay, scale;  // decay: rate * weight decay; scale: of the gradient, for clipping
    float correct1, correct2;                     // 1 - beta^step
};

static inline void adamw(const AdamW& o, const float* grad, float* weight, float* mean, float* square, int64_t count) {
#pragma omp parallel for simd
    for (int64_t i = 0; i < count; i++) {
        float g = grad[i] * o.scale;
        mean[i] = o.beta1 * mean[i] + (1 - o.beta1) * g;
        square[i] = o.beta2 * square[i] + (1 - o.beta2) * g * g;
        float step = (mean[i] / o.correct1) / (__builtin_sqrtf(square[i] / o.correct2) + o.eps);
        weight[i] -= o.rate * step + o.decay * weight[i];
    }
}

// ---- Lion ----

struct Lion {
    float rate, beta1, beta2, decay, scale;  // as AdamW's
};

static inline void lion(const Lion& o, const float* grad, float* weight, float* momentum, int64_t count) {
#pragma omp parallel for simd
    for (int64_t i = 0; i < count; i++) {
        float g = grad[i] * o.scale;
        float mixed = o.beta1 * momentum[i] + (1 - o.beta1) * g;
        float sign = (mixed > 0 ? 1.0f : 0.0f) - (mixed < 0 ? 1.0f : 0.0f);
        momentum[i] = o.beta2 * momentum[i] + (1 - o.beta2) * g;
        weight[i] -= o.rate * sign + o.decay * weight[i];
    }
}

// ---- Muon: what is elementwise of it ----

// momentum = beta momentum + scale grad; direction = beta momentum + scale grad (Nesterov).
static inline void nesterov(float beta, float scale, const float* grad, float* momentum, float* direction,
                            int64_t count) {
#pragma omp parallel for simd
    for (int64_t i = 0; i < count; i++) {
        float g = grad[i] * scale;
        momentum[i] = beta * momentum[i] + g;
        direction[i] = beta * momentum[i] + g;
    }
}

// out = a x + b y
static inline void weighted_sum(float a, const float* x, float b, const float* y, float* out, int64_t count) {
#pragma omp parallel for simd
    for (int64_t i = 0; i < count; i++) out[i] = a * x[i] + b * y[i];
}

// weight -= rate update + decay weight
static inline void descend(float rate, float decay, const float* update, float* weight, int64_t count) {
#pragma omp parallel for simd
    for (int64_t i = 0; i < count; i++) weight[i] -= rate * update[i] + decay * weight[i];
}

// ---- Moving average ----

// average = decay average + share value with share = 1 - decay. Written with the difference: decay and share, rounded
// apart, would not add up to 1, and over 1 / share updates the average would be off by that.
static inline void move_average(float share, const float* value, float* average, int64_t count) {
#pragma omp parallel for simd
    for (int64_t i = 0; i < count; i++) average[i] += share * (value[i] - average[i]);
}

// a and b change places, bit for bit: moved as bytes, never as numbers.
static inline void exchange(float* a, float* b, int64_t count) {
    constexpr int64_t BLOCK = 4096;
#pragma omp parallel for
    for (int64_t first = 0; first < count; first += BLOCK) {
        int64_t bytes = (count - first < BLOCK ? count - first : BLOCK) * sizeof(float);
        char held[BLOCK * sizeof(float)];
        memcpy(held, a + first, bytes);
        memcpy(a + first, b + first, bytes);
        memcpy(b + first, held, bytes);
    }
}

}  // namespace gorgon
