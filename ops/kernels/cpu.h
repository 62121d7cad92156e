// CPU kernels of the decoding path: float16 or float32 weights, float32 arithmetic.
//
// Row invariance is by construction. Every output of a product is one chain of fused multiply-adds over k in
// ascending order, in its own vector lane; attention takes its keys in logical order (prefix, then ancestors from the
// root down, then the row itself), whatever slot of the cache they lie in. No sum is ever split by the number of
// rows, by the thread count or by the tile a row falls into.
// vector.h comes first: Jittor looks for included files itself and does not find those beside this one.
#pragma once

namespace gorgon {

// ---- products: out[r][n] = sum_k x[r][k] W[n][k], W packed as (blocks, K, 16 outputs) ----

enum Epilogue { PLAIN, ADD, GATED };

// NV blocks of 16 outputs for R rows. GATED: blocks alternate gate, up, and out gets silu(gate) * up.
template <class W, int NV, int R, Epilogue E>
static inline void tile(const float* x, int64_t ldx, const W* w, int64_t K, int64_t block, int64_t N, float* out,
                        int64_t ldo, const float* add) {
    vec acc[R][NV];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++) acc[r][v] = (vec){};
    const W* wp = w + block * K * LANES;
    for (int64_t k = 0; k < K; k++) {
        vec wv[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) wv[v] = load(wp + (v * K + k) * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            vec xv = splat(x[r * ldx + k]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) acc[r][v] = fma(xv, wv[v], acc[r][v]);
        }
    }
    constexpr int step = E == GATED ? 2 : 1;
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v += step) {
            vec y = acc[r][v];
            int64_t n = (block + v) / step * LANES;
            if (E == GATED) y = silu(y) * acc[r][v + step - 1];
            float* target = out + r * ldo + n;
            if (n + LANES <= N) {
                if (E == ADD) y = y + load(add + r * ldo + n);
                store(target, y);
            } else
                for (int i = 0; n + i < N; i++) target[i] = E == ADD ? y[i] + add[r * ldo + n + i] : y[i];
        }
}

template <class W, int NV, Epilogue E>
static inline void rows_of_tile(const float* x, int64_t rows, int64_t ldx, const W* w, int64_t K, int64_t block,
                                int64_t N, float* out, int64_t ldo, const float* add) {
    // Chunks of six rows fill 24 of the 32 registers; the last chunks are evened out so that none is a lone row.
    int64_t chunks = (rows + 5) / 6, start = 0;
    for (int64_t c = 0; c < chunks; c++) {
        int64_t end = rows * (c + 1) / chunks;
        const float* xr = x + start * ldx;
        float* o = out + start * ldo;
        const float* a = E == ADD ? add + start * ldo : nullptr;
        switch (end - start) {
            case 1: tile<W, NV, 1, E>(xr, ldx, w, K, block, N, o, ldo, a); break;
            case 2: tile<W, NV, 2, E>(xr, ldx, w, K, block, N, o, ldo, a); break;
            case 3: tile<W, NV, 3, E>(xr, ldx, w, K, block, N, o, ldo, a); break;
            case 4: tile<W, NV, 4, E>(xr, ldx, w, K, block, N, o, ldo, a); break;
            case 5: tile<W, NV, 5, E>(xr, ldx, w, K, block, N, o, ldo, a); break;
            case 6: tile<W, NV, 6, E>(xr, ldx, w, K, block, N, o, ldo, a); break;
        }
        start = end;
    }
}

// This thread's share of a product. N counts outputs after the epilogue; blocks counts blocks of W.
template <Epilogue E, class W>
static inline void linear_share(const float* x, int64_t rows, int64_t K, const W* w, int64_t blocks, int64_t N,
                                float* out, const float* add, int thread, int threads) {
    int64_t pairs = (blocks + 1) / 2;
    int64_t b = pairs * thread / threads * 2, end = pairs * (thread + 1) / threads * 2;
    if (end > blocks) end = blocks;
    while (b < end) {
        int64_t left = end - b;
        if (rows == 1 && left >= 8) {
            tile<W, 8, 1, E>(x, K, w, K, b, N, out, N, add);
            b += 8;
        } else if (left >= 4) {
            rows_of_tile<W, 4, E>(x, rows, K, w, K, b, N, out, N, add);
            b += 4;
        } else if (left >= 2) {
            rows_of_tile<W, 2, E>(x, rows, K, w, K, b, N, out, N, add);
            b += 2;
        } else {
            if constexpr (E != GATED) rows_of_tile<W, 1, E>(x, rows, K, w, K, b, N, out, N, add);
            b += 1;
        }
    }
}

// out = x / sqrt(mean(x^2) + eps) * weight, this thread's share of the rows.
static inline void rms_norm_share(const float* x, int64_t rows, int64_t D, const float* weight, float eps, float* out,
                                  int thread, int threads) {
    for (int64_t r = rows * thread / threads; r < rows * (thread + 1) / threads; r++) {
        const float* xr = x + r * D;
        float* o = out + r * D;
        vec acc = {};
        int64_t d = 0;
        for (; d + LANES <= D; d += LANES) acc = fma(load(xr + d), load(xr + d), acc);
        float sum = sum_lanes(acc);
        for (; d < D; d++) sum += xr[d] * xr[d];
        float scale = 1.0f / __builtin_sqrtf(sum / D + eps);
        for (d = 0; d + LANES <= D; d += LANES) store(o + d, load(xr + d) * splat(scale) * load(weight + d));
        for (; d < D; d++) o[d] = xr[d] * scale * weight[d];
    }
}

// ---- attention over the cache ----

// One row of a pass. The keys it sees, in logical order: `contiguous` slots from `start`, then the row's extras.
struct Plan {
    const int32_t* meta;    // (rows, 4): position, slot, start, contiguous; all but start count from `base`
    const int32_t* extras;  // (rows, width): slots behind base, -1 where there are no more
    int64_t width, base;
    int64_t position(int64_t r) const { return base + meta[r * 4]; }
    int64_t slot(int64_t r) const { return base + meta[r * 4 + 1]; }
    int64_t start(int64_t r) const { return meta[r * 4 + 2]; }
    int64_t contiguous(int64_t r) const { return base + meta[r * 4 + 3]; }
};

struct Shape {
    int64_t rows, hidden, heads, kv_heads, head_dim, inner, max_length;
    int64_t padded() const { return (head_dim + LANES - 1) / LANES * LANES; }
    int64_t qkv() const { return (heads + 2 * kv_heads) * head_dim; }
};

// Rotate (x_i, x_{i + d/2}) by position * frequency_i, the half-split layout of Hugging Face's Llama.
static inline void rotate(float* x, int64_t d, const float* cosine, const float* sine) {
    for (int64_t i = 0; i < d / 2; i++) {
        float a = x[i], b = x[i + d / 2];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + d / 2] = b * cosine[i] + a * sine[i];
    }
}

template <class C>
static inline void write_cache_row(C* target, const float* x, int64_t d, int64_t padded) {
    float buffer[LANES];
    for (int64_t i = 0; i < padded; i += LANES) {
        for (int64_t j = 0; j < LANES; j++) buffer[j] = i + j < d ? x[i + j] : 0.0f;
        store(target + i, load(buffer));
    }
}

// cache: (2, kv_heads, max_length, padded). Rotates q in place, writes the rotated k and v of this thread's rows.
template <class C>
static inline void rope_and_write_share(const Shape& s, const Plan& plan, float* qkv, const float* cosine_table,
                                        const float* sine_table, C* cache, int thread, int threads) {
    int64_t d = s.head_dim, padded = s.padded();
    for (int64_t r = s.rows * thread / threads; r < s.rows * (thread + 1) / threads; r++) {
        float* row = qkv + r * s.qkv();
        const float* cosine = cosine_table + plan.position(r) * (d / 2);
        const float* sine = sine_table + plan.position(r) * (d / 2);
        for (int64_t h = 0; h < s.heads + s.kv_heads; h++) rotate(row + h * d, d, cosine, sine);
        for (int64_t h = 0; h < s.kv_heads; h++) {
            const float* k = row + (s.heads + h) * d;
            const float* v = row + (s.heads + s.kv_heads + h) * d;
            write_cache_row(cache + (h * s.max_length + plan.slot(r)) * padded, k, d, padded);
            write_cache_row(cache + ((s.kv_heads + h) * s.max_length + plan.slot(r)) * padded, v, d, padded);
        }
    }
}

// softmax(q k / sqrt(d)) v for one row and one head; `scores` has room for all keys, rounded up to 16.
template <class C>
static inline void attend_one(const Shape& s, const Plan& plan, int64_t r, const float* q, const C* keys,
                              const C* values, float* out, float* scores, float* padded_q) {
    int64_t d = s.head_dim, padded = s.padded(), contiguous = plan.contiguous(r), start = plan.start(r);
    const int32_t* extra = plan.extras + r * plan.width;
    int64_t count = contiguous;
    while (count - contiguous < plan.width && extra[count - contiguous] >= 0) count++;
    float scale = 1.0f / __builtin_sqrtf((float)d);
    for (int64_t i = 0; i < padded; i++) padded_q[i] = i < d ? q[i] * scale : 0.0f;
    float highest = -1e30f;
    for (int64_t j = 0; j < count; j++) {
        int64_t slot = j < contiguous ? start + j : plan.base + extra[j - contiguous];
        const C* k = keys + slot * padded;
        vec acc = {};
        for (int64_t i = 0; i < padded; i += LANES) acc = fma(load(padded_q + i), load(k + i), acc);
        scores[j] = sum_lanes(acc);
        highest = scores[j] > highest ? scores[j] : highest;
    }
    for (int64_t j = count; j % LANES; j++) scores[j] = -1e30f;
    vec total = {};
    for (int64_t j = 0; j < count; j += LANES) {
        vec p = exp_vec(load(scores + j) - splat(highest));
        store(scores + j, p);
        total += p;
    }
    float inverse = 1.0f / sum_lanes(total);
    for (int64_t first = 0; first < padded; first += 4 * LANES) {
        int blocks = (int)((padded - first) / LANES < 4 ? (padded - first) / LANES : 4);
        vec acc[4] = {{}, {}, {}, {}};
        for (int64_t j = 0; j < count; j++) {
            int64_t slot = j < contiguous ? start + j : plan.base + extra[j - contiguous];
            const C* v = values + slot * padded + first;
            vec p = splat(scores[j]);
            for (int b = 0; b < blocks; b++) acc[b] = fma(p, load(v + b * LANES), acc[b]);
        }
        for (int b = 0; b < blocks; b++) {
            vec y = acc[b] * splat(inverse);
            for (int64_t i = 0; i < LANES && first + b * LANES + i < d; i++) out[first + b * LANES + i] = y[i];
        }
    }
}

template <class C>
static inline void attention_share(const Shape& s, const Plan& plan, const float* qkv, const C* cache, float* out,
                                   int thread, int threads) {
    static thread_local std::vector<float> scores, padded_q;
    scores.resize(s.max_length + 2 * LANES + plan.width);
    padded_q.resize(s.padded());
    for (int64_t item = thread; item < s.rows * s.heads; item += threads) {
        int64_t r = item / s.heads, h = item % s.heads, kv = h / (s.heads / s.kv_heads);
        attend_one(s, plan, r, qkv + r * s.qkv() + h * s.head_dim, cache + kv * s.max_length * s.padded(),
                   cache + (s.kv_heads + kv) * s.max_length * s.padded(), out + (r * s.heads + h) * s.head_dim,
                   scores.data(), padded_q.data());
    }
}

// ---- one whole decoder layer ----

template <class W, class C>
static inline void decoder_layer(const Shape& s, const Plan& plan, const float* x, const float* norm1, const W* qkv_w,
                                 const W* o_w, const float* norm2, const W* gate_up_w, const W* down_w,
                                 const float* cosine_table, const float* sine_table, float eps, C* cache, float* out) {
    static std::vector<float> scratch;
    int64_t q_width = s.heads * s.head_dim, width = s.hidden > q_width ? s.hidden : q_width;
    int64_t wide = s.qkv() > s.inner ? s.qkv() : s.inner;
    scratch.resize(s.rows * (2 * width + wide));
    float* normed = scratch.data();
    float* attended = normed + s.rows * width;
    float* big = attended + s.rows * width;
    int64_t qkv_blocks = (s.qkv() + LANES - 1) / LANES, hidden_blocks = (s.hidden + LANES - 1) / LANES;
    int64_t inner_blocks = 2 * ((s.inner + LANES - 1) / LANES);
#pragma omp parallel
    {
        int t = omp_get_thread_num(), n = omp_get_num_threads();
        rms_norm_share(x, s.rows, s.hidden, norm1, eps, normed, t, n);
#pragma omp barrier
        linear_share<PLAIN>(normed, s.rows, s.hidden, qkv_w, qkv_blocks, s.qkv(), big, nullptr, t, n);
#pragma omp barrier
        rope_and_write_share(s, plan, big, cosine_table, sine_table, cache, t, n);
#pragma omp barrier
        attention_share(s, plan, big, cache, attended, t, n);
#pragma omp barrier
        linear_share<ADD>(attended, s.rows, q_width, o_w, hidden_blocks, s.hidden, out, x, t, n);
#pragma omp barrier
        rms_norm_share(out, s.rows, s.hidden, norm2, eps, normed, t, n);
#pragma omp barrier
        linear_share<GATED>(normed, s.rows, s.hidden, gate_up_w, inner_blocks, s.inner, big, nullptr, t, n);
#pragma omp barrier
        linear_share<ADD>(big, s.rows, s.inner, down_w, hidden_blocks, s.hidden, out, out, t, n);
    }
}

template <class W>
static inline void linear(const float* x, int64_t rows, int64_t K, const W* w, int64_t N, float* out) {
#pragma omp parallel
    linear_share<PLAIN>(x, rows, K, w, (N + LANES - 1) / LANES, N, out, nullptr, omp_get_thread_num(),
                        omp_get_num_threads());
}

// ---- selection ----

// The k largest of each row, largest first; equal values in the order of their index.
static inline void top_k(const float* x, int64_t rows, int64_t width, int64_t k, float* values, int32_t* indices) {
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        const float* row = x + r * width;
        float* v = values + r * k;
        int32_t* id = indices + r * k;
        int64_t held = 0;
        for (int64_t first = 0; first < width; first += LANES) {
            int64_t end = first + LANES < width ? first + LANES : width;
            if (held == k && end - first == LANES) {
                veci better = load(row + first) > splat(v[k - 1]);
                int32_t any = 0;
                for (int i = 0; i < LANES; i++) any |= better[i];
                if (!any) continue;
            }
            for (int64_t n = first; n < end; n++) {
                if (held == k && !(row[n] > v[k - 1])) continue;
                int64_t place = held < k ? held++ : k - 1;
                while (place > 0 && row[n] > v[place - 1]) {
                    v[place] = v[place - 1];
                    id[place] = id[place - 1];
                    place--;
                }
                v[place] = row[n];
                id[place] = (int32_t)n;
            }
        }
    }
}

// ---- cache rows ----

// Move the rows base + path[i] to base + i, for every plane (layer, key or value, head) of the cache.
// The path ascends, so a row is read before anything is written over it.
template <class C>
static inline void keep_rows(C* cache, int64_t planes, int64_t max_length, int64_t padded, const int32_t* path,
                             int64_t count, int64_t base) {
    for (int64_t p = 0; p < planes; p++)
        for (int64_t i = 0; i < count; i++) {
            if (path[i] == i) continue;
            C* plane = cache + p * max_length * padded;
            memmove(plane + (base + i) * padded, plane + (base + path[i]) * padded, padded * sizeof(C));
        }
}

}  // namespace gorgon
