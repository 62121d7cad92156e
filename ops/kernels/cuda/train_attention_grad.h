// The gradients of trainable attention on a GPU: see train_attention.h, which comes first.
//
// With p the weights and s the scores: dv = p^T dy, dp = dy v^T, ds = p (dp - delta), dq = ds k, dk = ds^T q, where
// delta = dy . y. Scores are recomputed exactly: p = exp(s - log_sum). A block for a tile of queries goes
// through the keys, a block for a tile of keys through the queries, and a warp for a row through its own keys.
#pragma once

namespace gorgon {

constexpr int GRAD_QUERIES = 32;  // queries that a tile of keys takes at a time

template <int W> struct GradWidth {
    static constexpr int stride = AttentionWidth<W>::stride;
    static constexpr int per_thread = W <= 128 ? 4 : 2;  // queries of a thread: 4 of the widest do not fit into 163 KB
    static constexpr size_t query_bytes =
        (2 * TILE_KEYS * stride + 16 * per_thread * (2 * stride + SCORES + 2)) * sizeof(float);
    static constexpr size_t key_bytes =
        (2 * (TILE_KEYS + GRAD_QUERIES) * stride + 2 * TILE_KEYS * SCORES) * sizeof(float);
};

// delta: (rows, heads). extents: (tiles, 2), between which keys the queries of a tile of GRAD_QUERIES see any.
__global__ void attention_delta_kernel(AttentionShape a, const float* y, const float* upstream, const int32_t* first,
                                       const int32_t* count, float* delta, int32_t* extents) {
    int64_t thread = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, query = thread / 32;
    if (query < (int64_t)a.rows * a.heads) {
        float sum = 0.0f;
        for (int c = threadIdx.x % 32; c < a.dim; c += 32)
            sum = fmaf(y[query * a.dim + c], upstream[query * a.dim + c], sum);
        sum = over_warp<Sum>(sum);
        if (threadIdx.x % 32 == 0) delta[query] = sum;
    }
    if (thread >= (a.queries() + GRAD_QUERIES - 1) / GRAD_QUERIES) return;
    int begin = INT32_MAX, end = 0, start = (int)thread * GRAD_QUERIES;
    for (int row = start / a.group; row < a.rows && row <= (start + GRAD_QUERIES - 1) / a.group; row++) {
        if (count[row] == 0) continue;
        begin = TileRanges::smaller(begin, first[row]);
        end = TileRanges::larger(end, first[row] + count[row]);
    }
    extents[2 * thread] = begin;
    extents[2 * thread + 1] = end;
}

// grad_q: (rows, heads, dim), of the shared keys. A block has 16 I queries. While scores and dq are computed the next
// values come, while dp is computed the keys.
template <int I, int W>
__global__ void __launch_bounds__(ATTENTION_THREADS, W <= 64 ? 3 : W <= 128 ? 2 : 1)
    attention_query_grad_kernel(AttentionShape a, const float* q, const float* k, const float* v, const int32_t* first,
                                const int32_t* count, const float* log_sum, const float* delta, const float* upstream,
                                float* grad_q) {
    constexpr int num = 16 * I, stride = AttentionWidth<W>::stride, J = TILE_KEYS / 8;
    GORGON_SHARED(float, queries);
    float *downs = queries + num * stride, *keys = downs + num * stride, *values = keys + TILE_KEYS * stride;
    float* slopes = values + TILE_KEYS * stride;
    int line = threadIdx.x / 8, part = threadIdx.x % 8, start = blockIdx.x * num, kv = blockIdx.y;
    TileRanges ranges((int*)(slopes + num * SCORES), num, a, start, first, count);
    clear_rest<W>(queries, 2 * num + 2 * TILE_KEYS, a.dim);
    copy_queries<W>(queries, num, a, q, kv, start);
    copy_queries<W>(downs, num, a, upstream, kv, start);
    copies_commit();
    int tile = ranges.first_tile(), end = ranges.end_tile();
    if (tile < end) copy_keys<W>(values, a, v, kv, tile, nullptr);
    copies_commit();
    if (tile < end) copy_keys<W>(keys, a, k, kv, tile, &ranges);
    copies_commit();
    copies_wait<2>();
    scale_rows<W>(queries, num, a.dim, a.scale);
    float log_sums[I], deltas[I];
    float4 sums[I][W / 32];
    clear<I, W>(sums);
#pragma unroll
    for (int i = 0; i < I; i++) {
        int n = start + line + 16 * i;
        int64_t query = n < a.queries() ? a.query(n, kv) : 0;
        log_sums[i] = log_sum[query];
        deltas[i] = delta[query];
    }
    for (; tile < end; tile++) {
        copies_wait<1>();
        __syncthreads();  // the values are here
        float scores[I][J], slope[I][J];
        products<I, J, W>(downs, values, slope);
        copies_wait<0>();
        __syncthreads();  // the keys are here, and no one reads these values any more
        if (tile + 1 < end) copy_keys<W>(values, a, v, kv, tile + 1, nullptr);
        copies_commit();
        products<I, J, W>(queries, keys, scores);
        bool all = ranges.all_see(tile);
#pragma unroll
        for (int i = 0; i < I; i++)
#pragma unroll
            for (int j = 0; j < J; j++) {
                bool seen = all || ranges.sees(line + 16 * i, tile * TILE_KEYS + part + 8 * j);
                float weight = exponential(scores[i][j] - log_sums[i]);
                slopes[(line + 16 * i) * SCORES + part + 8 * j] = seen ? weight * (slope[i][j] - deltas[i]) : 0.0f;
            }
        __syncwarp();
        add_weighted<I, W>(slopes, keys, sums);
        __syncthreads();
        if (tile + 1 < end) copy_keys<W>(keys, a, k, kv, tile + 1, &ranges);
        copies_commit();
    }
    copies_wait<0>();
#pragma unroll
    for (int i = 0; i < I; i++) {
        int n = start + line + 16 * i;
        if (n < a.queries()) write_row<W>(grad_q + a.query(n, kv) * a.dim, a.dim, sums[i], a.scale);
    }
}

// The tiles of queries that see any key of begin .. end - 1, in ascending order. All threads of a warp call it
// together.
struct QueryTiles {
    const int32_t* extents;
    int num, begin, end, base;
    unsigned met;  // those of base .. base + 31 that are left
    __device__ QueryTiles(const int32_t* extents, int num, int begin, int end)
        : extents(extents), num(num), begin(begin), end(end), base(-32), met(0) {}
    // num past the last.
    __device__ int next() {
        while (!met) {
            base += 32;
            if (base >= num) return num;
            int tile = base + threadIdx.x % 32;
            met = __ballot_sync(ALL_LANES, tile < num && extents[2 * tile] < end && extents[2 * tile + 1] > begin);
        }
        int lane = 0;
        while (!(met >> lane & 1)) lane++;
        met &= met - 1;
        return base + lane;
    }
};

// grad_k, grad_v: (tokens, kv_heads, dim). A block has a tile of keys. While dv is computed the next queries come.
template <int W>
__global__ void __launch_bounds__(ATTENTION_THREADS, W <= 64 ? 4 : W <= 128 ? 2 : 1)
    attention_key_grad_kernel(AttentionShape a, const float* q, const float* k, const float* v, const int32_t* first,
                              const int32_t* count, const float* log_sum, const float* delta, const int32_t* extents,
                              const float* upstream, float* grad_k, float* grad_v) {
    constexpr int I = TILE_KEYS / 16, J = GRAD_QUERIES / 8, stride = AttentionWidth<W>::stride;
    GORGON_SHARED(float, keys);
    float *values = keys + TILE_KEYS * stride, *queries = values + TILE_KEYS * stride;
    float *downs = queries + GRAD_QUERIES * stride, *weights = downs + GRAD_QUERIES * stride;
    float* slopes = weights + TILE_KEYS * SCORES;
    int line = threadIdx.x / 8, part = threadIdx.x % 8, start = blockIdx.x * TILE_KEYS, kv = blockIdx.y;
    int num_tiles = (a.queries() + GRAD_QUERIES - 1) / GRAD_QUERIES;
    clear_rest<W>(keys, 2 * (TILE_KEYS + GRAD_QUERIES), a.dim);
    copy_keys<W>(keys, a, k, kv, blockIdx.x, nullptr);
    copy_keys<W>(values, a, v, kv, blockIdx.x, nullptr);
    QueryTiles tiles(extents, num_tiles, start, start + TILE_KEYS);
    int tile = tiles.next();
    if (tile < num_tiles) copy_queries<W>(queries, GRAD_QUERIES, a, q, kv, tile * GRAD_QUERIES);
    copies_commit();
    if (tile < num_tiles) copy_queries<W>(downs, GRAD_QUERIES, a, upstream, kv, tile * GRAD_QUERIES);
    copies_commit();
    float4 key_sums[I][W / 32], value_sums[I][W / 32];
    clear<I, W>(key_sums);
    clear<I, W>(value_sums);
    while (tile < num_tiles) {
        int begins[J], ends[J];
        float log_sums[J], deltas[J];
#pragma unroll
        for (int j = 0; j < J; j++) {  // requested now, used after the products
            int n = tile * GRAD_QUERIES + part + 8 * j;
            bool there = n < a.queries();
            int row = there ? n / a.group : 0;
            int64_t query = there ? a.query(n, kv) : 0;
            begins[j] = first[row];
            ends[j] = there ? begins[j] + count[row] : 0;
            log_sums[j] = log_sum[query];
            deltas[j] = delta[query];
        }
        copies_wait<1>();
        scale_rows<W>(queries, GRAD_QUERIES, a.dim, a.scale);
        __syncthreads();  // the queries are here
        float scores[I][J], slope[I][J];
        products<I, J, W>(keys, queries, scores);
        copies_wait<0>();
        __syncthreads();  // what comes down to them, too
        products<I, J, W>(values, downs, slope);
#pragma unroll
        for (int i = 0; i < I; i++)
#pragma unroll
            for (int j = 0; j < J; j++) {
                int key = start + line + 16 * i, at = (line + 16 * i) * SCORES + part + 8 * j;
                bool seen = begins[j] <= key && key < ends[j];
                float weight = seen ? exponential(scores[i][j] - log_sums[j]) : 0.0f;
                weights[at] = weight;
                slopes[at] = seen ? weight * (slope[i][j] - deltas[j]) : 0.0f;
            }
        __syncwarp();
        add_weighted<I, W>(slopes, queries, key_sums);
        __syncthreads();
        tile = tiles.next();
        if (tile < num_tiles) copy_queries<W>(queries, GRAD_QUERIES, a, q, kv, tile * GRAD_QUERIES);
        copies_commit();
        add_weighted<I, W>(weights, downs, value_sums);
        __syncthreads();
        if (tile < num_tiles) copy_queries<W>(downs, GRAD_QUERIES, a, upstream, kv, tile * GRAD_QUERIES);
        copies_commit();
    }
    copies_wait<0>();
#pragma unroll
    for (int i = 0; i < I; i++) {
        int key = start + line + 16 * i;
        if (key >= a.tokens) continue;
        int64_t at = ((int64_t)key * a.kv_heads + kv) * a.dim;
        write_row<W>(grad_k + at, a.dim, key_sums[i], 1.0f);
        write_row<W>(grad_v + at, a.dim, value_sums[i], 1.0f);
    }
}

// grad_own_k, grad_own_v: (rows, own, kv_heads, dim), and what the own keys add to grad_q, which holds the rest. A warp
// has a row's keys of a key-value head and goes through the queries that share them: there are few own keys.
template <int W>
__global__ void attention_own_grad_kernel(AttentionShape a, const float* q, const float* own_k, const float* own_v,
                                          const float* log_sum, const float* delta, const float* upstream,
                                          float* grad_q, float* grad_own_k, float* grad_own_v) {
    int64_t warp = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    int row = (int)(warp / a.kv_heads), kv = (int)(warp % a.kv_heads), lane = threadIdx.x % 32;
    if (row >= a.rows) return;
    for (int o = 0; o < a.own; o++) {
        int64_t at = a.own_key(row, o, kv) * a.dim;
        float key[W / 32], value[W / 32], grad_key[W / 32], grad_value[W / 32];
#pragma unroll
        for (int c = 0; c < W / 32; c++) {
            bool there = lane + 32 * c < a.dim;
            key[c] = there ? own_k[at + lane + 32 * c] : 0.0f;
            value[c] = there ? own_v[at + lane + 32 * c] : 0.0f;
            grad_key[c] = grad_value[c] = 0.0f;
        }
        for (int i = 0; i < a.group; i++) {
            int64_t query = a.query(row * a.group + i, kv);
            float x[W / 32], down[W / 32], score = 0.0f, slope = 0.0f;
#pragma unroll
            for (int c = 0; c < W / 32; c++) {
                bool there = lane + 32 * c < a.dim;
                x[c] = there ? q[query * a.dim + lane + 32 * c] : 0.0f;
                down[c] = there ? upstream[query * a.dim + lane + 32 * c] : 0.0f;
                score = fmaf(x[c], key[c], score);
                slope = fmaf(down[c], value[c], slope);
            }
            float weight = exponential(over_warp<Sum>(score) * a.scale - log_sum[query]);
            slope = weight * (over_warp<Sum>(slope) - delta[query]) * a.scale;
#pragma unroll
            for (int c = 0; c < W / 32; c++) {
                grad_key[c] = fmaf(slope, x[c], grad_key[c]);
                grad_value[c] = fmaf(weight, down[c], grad_value[c]);
                if (lane + 32 * c < a.dim) {
                    float* to = grad_q + query * a.dim + lane + 32 * c;
                    *to = fmaf(slope, key[c], *to);
                }
            }
        }
#pragma unroll
        for (int c = 0; c < W / 32; c++)
            if (lane + 32 * c < a.dim) {
                grad_own_k[at + lane + 32 * c] = grad_key[c];
                grad_own_v[at + lane + 32 * c] = grad_value[c];
            }
    }
}

struct AttentionGrads {
    float *q, *k, *v, *own_k, *own_v;
};

// delta: (rows, heads) and extents: (tiles of GRAD_QUERIES, 2) are scratch.
template <int W>
inline void attention_backward(const AttentionShape& a, const float* q, const float* k, const float* v,
                               const int32_t* first, const int32_t* count, const float* y, const float* log_sum,
                               const float* upstream, const float* own_k, const float* own_v,
                               const AttentionGrads& grads, float* delta, int32_t* extents) {
    typedef GradWidth<W> Width;
    constexpr int I = Width::per_thread;
    dim3 threads(ATTENTION_THREADS);
    int warps = ATTENTION_THREADS / 32;
    launch(attention_delta_kernel, dim3(((int64_t)a.rows * a.heads + warps - 1) / warps), threads, 0, a, y, upstream,
           first, count, delta, extents);
    launch(attention_query_grad_kernel<I, W>, dim3((a.queries() + 16 * I - 1) / (16 * I), a.kv_heads), threads,
           Width::query_bytes, a, q, k, v, first, count, log_sum, delta, upstream, grads.q);
    launch(attention_key_grad_kernel<W>, dim3((a.tokens + TILE_KEYS - 1) / TILE_KEYS, a.kv_heads), threads,
           Width::key_bytes, a, q, k, v, first, count, log_sum, delta, extents, upstream, grads.k, grads.v);
    if (a.own)
        launch(attention_own_grad_kernel<W>, dim3(((int64_t)a.rows * a.kv_heads + warps - 1) / warps), threads, 0, a, q,
               own_k, own_v, log_sum, delta, upstream, grads.q, grads.own_k, grads.own_v);
}

}  // namespace gorgon
