// CPU kernels of the training path: weight gradients, cross-entropy and KL divergence.
// vector.h and cpu.h come first: Jittor resolves includes itself and does not find files in this folder.
#pragma once

namespace gorgon {

// ---- out[m][n] = sum_t a[t][m] b[t][n] ----
// a is packed into strips of 6 columns, b into panels of 64, over stretches of rows that stay in the L2 cache.

constexpr int64_t STRETCH = 256, STRIP = 6, STRIPS = 16, PANEL = 4 * LANES;

static inline void outer_micro(const float* strip, const float* panel, int64_t rows, vec acc[STRIP][4]) {
    for (int64_t t = 0; t < rows; t++) {
        vec b[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) b[v] = load(panel + t * PANEL + v * LANES);
#pragma GCC unroll 6
        for (int m = 0; m < STRIP; m++) {
            vec a = splat(strip[t * STRIP + m]);
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) acc[m][v] = fma(a, b[v], acc[m][v]);
        }
    }
}

static inline void outer_product(const float* a, const float* b, int64_t T, int64_t M, int64_t N, float* out) {
    int64_t panels = (N + PANEL - 1) / PANEL, group = STRIP * STRIPS, groups = (M + group - 1) / group;
    static std::vector<float> panel_store;
    panel_store.assign(panels * PANEL * STRETCH, 0.0f);
    float* packed_b = panel_store.data();
    for (int64_t first = 0; first < T; first += STRETCH) {
        int64_t rows = T - first < STRETCH ? T - first : STRETCH;
#pragma omp parallel
        {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < rows; t++)
                for (int64_t n = 0; n < N; n++)
                    packed_b[((n / PANEL) * STRETCH + t) * PANEL + n % PANEL] = b[(first + t) * N + n];
            static thread_local std::vector<float> strip_store;
            strip_store.resize(STRETCH * group);
            float* packed_a = strip_store.data();
#pragma omp for schedule(static)
            for (int64_t g = 0; g < groups; g++) {
                int64_t m0 = g * group, width = M - m0 < group ? M - m0 : group;
                for (int64_t t = 0; t < rows; t++)
                    for (int64_t m = 0; m < group; m++)
                        packed_a[((m / STRIP) * STRETCH + t) * STRIP + m % STRIP] =
                            m < width ? a[(first + t) * M + m0 + m] : 0.0f;
                for (int64_t p = 0; p < panels; p++)
                    for (int64_t s = 0; s * STRIP < width; s++) {
                        vec acc[STRIP][4] = {};
                        outer_micro(packed_a + s * STRETCH * STRIP, packed_b + p * STRETCH * PANEL, rows, acc);
                        for (int64_t m = 0; m < STRIP && s * STRIP + m < width; m++)
                            for (int64_t v = 0; v < 4; v++)
                                for (int64_t i = 0, n = p * PANEL + v * LANES; i < LANES && n + i < N; i++) {
                                    float* target = out + (m0 + s * STRIP + m) * N + n + i;
                                    *target = (first ? *target : 0.0f) + acc[m][v][i];
                                }
                    }
            }
        }
    }
    if (T == 0) memset(out, 0, M * N * sizeof(float));
}

// ---- cross-entropy over the last dimension ----

// Per row: loss = logsumexp - logit of the target, and the target's rank (how many logits are larger, or
// as large and before it).
// A negative target is ignored: loss 0, rank -1.
static inline void cross_entropy_forward(const float* logits, const int32_t* targets, int64_t rows, int64_t width,
                                         float* loss, float* log_sum, int32_t* rank) {
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        const float* x = logits + r * width;
        if (targets[r] < 0) {
            loss[r] = log_sum[r] = 0.0f;
            rank[r] = -1;
            continue;
        }
        float highest = x[0], wanted = x[targets[r]];
        for (int64_t n = 0; n < width; n++) highest = x[n] > highest ? x[n] : highest;
        vec total = {};
        int32_t above = 0;
        int64_t n = 0;
        for (; n + LANES <= width; n += LANES) total += exp_vec(load(x + n) - splat(highest));
        float sum = sum_lanes(total);
        for (; n < width; n++) sum += __builtin_expf(x[n] - highest);
        for (n = 0; n < targets[r]; n++) above += x[n] >= wanted;
        for (; n < width; n++) above += x[n] > wanted;
        log_sum[r] = highest + __builtin_logf(sum);
        loss[r] = log_sum[r] - wanted;
        rank[r] = above;
    }
}

// grad = (softmax(logits) - onehot(target)) * weight, zero for ignored rows.
static inline void cross_entropy_backward(const float* logits, const int32_t* targets, const float* log_sum,
                                          const float* weight, int64_t rows, int64_t width, float* grad) {
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        const float* x = logits + r * width;
        float* g = grad + r * width;
        if (targets[r] < 0) {
            memset(g, 0, width * sizeof(float));
            continue;
        }
        int64_t n = 0;
        for (; n + LANES <= width; n += LANES)
            store(g + n, exp_vec(load(x + n) - splat(log_sum[r])) * splat(weight[r]));
        for (; n < width; n++) g[n] = __builtin_expf(x[n] - log_sum[r]) * weight[r];
        g[targets[r]] -= weight[r];
    }
}

// ---- KL(softmax(teacher) || softmax(logits)) over the last dimension ----

static inline float log_sum_exp(const float* x, int64_t width) {
    float highest = x[0];
    for (int64_t n = 0; n < width; n++) highest = x[n] > highest ? x[n] : highest;
    vec total = {};
    int64_t n = 0;
    for (; n + LANES <= width; n += LANES) total += exp_vec(load(x + n) - splat(highest));
    float sum = sum_lanes(total);
    for (; n < width; n++) sum += __builtin_expf(x[n] - highest);
    return highest + __builtin_logf(sum);
}

static inline void kl_forward(const float* logits, const float* teacher, int64_t rows, int64_t width, float* loss,
                              float* log_sum, float* teacher_log_sum) {
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        const float *x = logits + r * width, *t = teacher + r * width;
        float s = log_sum[r] = log_sum_exp(x, width), ts = teacher_log_sum[r] = log_sum_exp(t, width);
        vec total = {};
        int64_t n = 0;
        for (; n + LANES <= width; n += LANES) {
            vec log_p = load(t + n) - splat(ts);
            total += exp_vec(log_p) * (log_p - load(x + n) + splat(s));
        }
        float sum = sum_lanes(total);
        for (; n < width; n++) sum += __builtin_expf(t[n] - ts) * (t[n] - ts - x[n] + s);
        loss[r] = sum;
    }
}

// grad = (softmax(logits) - softmax(teacher)) * weight.
static inline void kl_backward(const float* logits, const float* teacher, const float* log_sum,
                               const float* teacher_log_sum, const float* weight, int64_t rows, int64_t width,
                               float* grad) {
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        const float *x = logits + r * width, *t = teacher + r * width;
        float* g = grad + r * width;
        int64_t n = 0;
        for (; n + LANES <= width; n += LANES) {
            vec gap = exp_vec(load(x + n) - splat(log_sum[r])) - exp_vec(load(t + n) - splat(teacher_log_sum[r]));
            store(g + n, gap * splat(weight[r]));
        }
        for (; n < width; n++)
            g[n] = (__builtin_expf(x[n] - log_sum[r]) - __builtin_expf(t[n] - teacher_log_sum[r])) * weight[r];
    }
}

}  // namespace gorgon
