// Products, norms and selection on the CPU: weights in float16, float32, int8 with a scale per output or NF4 with a
// scale per 64 inputs of an output, arithmetic in float32.
//
// Row invariance is by construction. Every output of a product is one chain of fused multiply-adds over k in
// ascending order, in its own vector lane. No sum is ever split by the number of rows, by the thread count or by the
// tile a row falls into.
// vector.h comes first: Jittor resolves includes itself and does not find files in this folder.
#pragma once

namespace gorgon {

// ---- products: out[r][n] = sum_k x[r][k] W[n][k], W packed as (blocks, K, 16 outputs) ----

enum Epilogue { PLAIN, ADD, GATED };

constexpr int64_t GROUP = 64;  // inputs that share an NF4 scale

// How weights of type W are packed: what 16 outputs of one input take, and how many vectors of scales a block has.
template <class W> struct Packing {
    static constexpr int64_t items = LANES;
    typedef float scale;
    static int64_t scales(int64_t) { return 0; }
};
template <> struct Packing<int8_t> {
    static constexpr int64_t items = LANES;
    typedef float scale;
    static int64_t scales(int64_t) { return 1; }
};
template <> struct Packing<uint8_t> {  // NF4, two codes a byte
    static constexpr int64_t items = LANES / 2;
    typedef uint16_t scale;
    static int64_t scales(int64_t K) { return (K + GROUP - 1) / GROUP; }
};
template <class W> constexpr bool is_int8 = std::is_same<W, int8_t>::value;
template <class W> constexpr bool is_nf4 = std::is_same<W, uint8_t>::value;

// A packed matrix and its scales, (blocks, scales of a block, 16 outputs), nullptr where it has none.
template <class W> struct Matrix {
    const W* w;
    const typename Packing<W>::scale* scale;

    // The matrix without its first blocks.
    Matrix after(int64_t blocks, int64_t K) const {
        return {w + blocks * K * Packing<W>::items, scale + blocks * Packing<W>::scales(K) * LANES};
    }
};

// NV blocks of 16 outputs for R rows. GATED: blocks alternate gate, up, and out gets silu(gate) * up.
template <class W, int NV, int R, Epilogue E>
static inline void tile(const float* x, int64_t ldx, Matrix<W> m, int64_t K, int64_t block, int64_t N, float* out,
                        int64_t ldo, const float* add) {
    constexpr int64_t items = Packing<W>::items;
    // Every loop over acc is unrolled: with one that is not, the compiler keeps it in memory, at a third of the speed.
    vec acc[R][NV], scale[NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) acc[r][v] = (vec){};
    m = m.after(block, K);
    for (int64_t k = 0; k < K; k++) {
        if constexpr (is_nf4<W>)
            if (k % GROUP == 0)
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++)
                    scale[v] = load(m.scale + (v * Packing<W>::scales(K) + k / GROUP) * LANES);
        vec wv[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) {
            wv[v] = load(m.w + (v * K + k) * items);
            if constexpr (is_nf4<W>) wv[v] = wv[v] * scale[v];
            // With two blocks the hardware's own guess comes too late; with more it needs no help, and help costs.
            if (NV <= 2) __builtin_prefetch(m.w + (v * K + k) * items + 2048, 0, 2);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            vec xv = splat(x[r * ldx + k]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) acc[r][v] = fma(xv, wv[v], acc[r][v]);
        }
    }
    vec sums[R][NV];  // what the registers hold, for the loops below, which are many instructions and stay loops
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) sums[r][v] = is_int8<W> ? acc[r][v] * load(m.scale + v * LANES) : acc[r][v];
    constexpr int step = E == GATED ? 2 : 1;
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v += step) {
            vec y = sums[r][v];
            int64_t n = (block + v) / step * LANES;
            if (E == GATED) y = silu(y) * sums[r][v + step - 1];
            float* target = out + r * ldo + n;
            if (n + LANES <= N) {
                if (E == ADD) y = y + load(add + r * ldo + n);
                store(target, y);
            } else
                for (int i = 0; n + i < N; i++) target[i] = E == ADD ? y[i] + add[r * ldo + n + i] : y[i];
        }
}

// Rows a tile takes at once: with two blocks eight rows keep the multipliers busy whatever the weights' type, with
// four blocks six rows are all that the 32 registers hold.
constexpr int64_t TALL = 8, WIDE = 6;

template <class W, int NV, Epilogue E>
static inline void rows_of_tile(const float* x, int64_t rows, int64_t ldx, Matrix<W> m, int64_t K, int64_t block,
                                int64_t N, float* out, int64_t ldo, const float* add) {
    // The last chunks are evened out so that none is a lone row.
    constexpr int64_t most = NV == 4 ? WIDE : TALL;
    int64_t chunks = (rows + most - 1) / most, start = 0;
    for (int64_t c = 0; c < chunks; c++) {
        int64_t end = rows * (c + 1) / chunks;
        const float* xr = x + start * ldx;
        float* o = out + start * ldo;
        const float* a = E == ADD ? add + start * ldo : nullptr;
        switch (end - start) {
            case 1: tile<W, NV, 1, E>(xr, ldx, m, K, block, N, o, ldo, a); break;
            case 2: tile<W, NV, 2, E>(xr, ldx, m, K, block, N, o, ldo, a); break;
            case 3: tile<W, NV, 3, E>(xr, ldx, m, K, block, N, o, ldo, a); break;
            case 4: tile<W, NV, 4, E>(xr, ldx, m, K, block, N, o, ldo, a); break;
            case 5: tile<W, NV, 5, E>(xr, ldx, m, K, block, N, o, ldo, a); break;
            case 6: tile<W, NV, 6, E>(xr, ldx, m, K, block, N, o, ldo, a); break;
            case 7: if constexpr (NV < 4) tile<W, NV, 7, E>(xr, ldx, m, K, block, N, o, ldo, a); break;
            case 8: if constexpr (NV < 4) tile<W, NV, 8, E>(xr, ldx, m, K, block, N, o, ldo, a); break;
        }
        start = end;
    }
}

// This thread's share of a product. N counts outputs after the epilogue; blocks counts blocks of W.
template <Epilogue E, class W>
static inline void linear_share(const float* x, int64_t rows, int64_t K, Matrix<W> m, int64_t blocks, int64_t N,
                                float* out, const float* add, int thread, int threads) {
    int64_t pairs = (blocks + 1) / 2;
    int64_t b = pairs * thread / threads * 2, end = pairs * (thread + 1) / threads * 2;
    if (end > blocks) end = blocks;
    while (b < end) {
        int64_t left = end - b;
        if (rows == 1 && left >= 8) {
            tile<W, 8, 1, E>(x, K, m, K, b, N, out, N, add);
            b += 8;
        } else if (left >= 4 && rows <= WIDE) {
            rows_of_tile<W, 4, E>(x, rows, K, m, K, b, N, out, N, add);
            b += 4;
        } else if (left >= 2) {
            rows_of_tile<W, 2, E>(x, rows, K, m, K, b, N, out, N, add);
            b += 2;
        } else {
            if constexpr (E != GATED) rows_of_tile<W, 1, E>(x, rows, K, m, K, b, N, out, N, add);
            b += 1;
        }
    }
}

// Outputs first to first + count of a packed matrix as (count, K). Of two matrices with alternating blocks, step is 2
// and begin selects one; else 1 and 0.
template <class W>
static inline void unpack(Matrix<W> m, int64_t K, int64_t first, int64_t count, int64_t begin, int64_t step,
                          float* out) {
#pragma omp parallel for
    for (int64_t block = first / LANES; block <= (first + count - 1) / LANES; block++) {
        Matrix<W> part = m.after(begin + block * step, K);
        int64_t from = block * LANES < first ? first % LANES : 0, left = first + count - block * LANES;
        int64_t to = left < LANES ? left : LANES;
        for (int64_t k = 0; k < K; k++) {
            vec w = load(part.w + k * Packing<W>::items);
            if constexpr (is_int8<W>) w = w * load(part.scale);
            if constexpr (is_nf4<W>) w = w * load(part.scale + k / GROUP * LANES);
            for (int64_t i = from; i < to; i++) out[(block * LANES + i - first) * K + k] = w[i];
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

template <class W>
static inline void linear(const float* x, int64_t rows, int64_t K, Matrix<W> m, int64_t N, float* out) {
#pragma omp parallel
    linear_share<PLAIN>(x, rows, K, m, (N + LANES - 1) / LANES, N, out, nullptr, omp_get_thread_num(),
                        omp_get_num_threads());
}

// ---- selection ----

// The k largest of each row, largest first; equal values in the order of their index.
static inline void top_k_share(const float* x, int64_t rows, int64_t width, int64_t k, float* values, int32_t* indices,
                               int thread, int threads) {
    for (int64_t r = rows * thread / threads; r < rows * (thread + 1) / threads; r++) {
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

static inline void top_k(const float* x, int64_t rows, int64_t width, int64_t k, float* values, int32_t* indices) {
    if (rows == 1) return top_k_share(x, rows, width, k, values, indices, 0, 1);
#pragma omp parallel
    top_k_share(x, rows, width, k, values, indices, omp_get_thread_num(), omp_get_num_threads());
}

// The same, with log softmax in place of the values; at most 0, whatever the rounding.
static inline void top_k_log(const float* x, int64_t rows, int64_t width, int64_t k, float* values, int32_t* indices) {
    top_k(x, rows, width, k, values, indices);
    for (int64_t r = 0; r < rows; r++) {
        const float* row = x + r * width;
        float highest = values[r * k];
        vec total = {};
        int64_t n = 0;
        for (; n + LANES <= width; n += LANES) total += exp_vec(load(row + n) - splat(highest));
        float sum = sum_lanes(total);
        for (; n < width; n++) sum += __builtin_expf(row[n] - highest);
        float log_sum = highest + __builtin_logf(sum);
        for (int64_t i = 0; i < k; i++) {
            float y = values[r * k + i] - log_sum;
            values[r * k + i] = y < 0.0f ? y : 0.0f;
        }
    }
}

}  // namespace gorgon
