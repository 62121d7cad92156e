// Trainable attention (ops/attention.py) on a GPU, in float32: rows over a stretch of shared keys and a few keys of
// their own. Its gradients: train_attention_grad.h.
//
// The queries of a key-value head are numbered row by row, the row's group side by side, and cut into tiles of a fixed
// number: which keys they see is known on the device alone. A tile goes through all keys between the first and the last
// that any of them sees, 32 at a time, counted from token 0. So a query's result is the same whatever else is in its
// tile: each score is one chain over the width, and a key tile that it sees nothing of adds 0 and scales by 1.
// The gradient of a key is one chain over the queries in ascending order. Nothing is added atomically.
//
// A block has 128 threads, as 16 lines of 8: thread (line, part) has the rows line + 16 i of a product and the columns
// part + 8 j of scores, or four columns from 4 part + 32 c on of what is as wide as a head. A warp reads rows 4 floats
// apart in the banks then, and no two of its threads meet in one. Rows of scores stay within a warp.
// A head's width W is rounded up to a multiple of 32; zeros in shared memory make up for what is missing.
#pragma once

namespace gorgon {

struct AttentionShape {
    int rows, heads, kv_heads, group, dim, tokens, own;  // dim: of a head, a multiple of 16; own: further keys of a row
    float scale;
    __host__ __device__ int queries() const { return rows * group; }  // of a key-value head
    // The place of query n of a key-value head in (rows, heads), and its row's own key o in (rows, own, kv_heads).
    __device__ int64_t query(int n, int kv) const {
        int i = n % group;
        return (int64_t)(n - i) * kv_heads + kv * group + i;
    }
    __device__ int64_t own_key(int row, int o, int kv) const { return ((int64_t)row * own + o) * kv_heads + kv; }
};

constexpr int ATTENTION_THREADS = 128;
constexpr int TILE_KEYS = 32;
constexpr int ROW_PAD = 4;             // floats between rows in shared memory: 16 bytes, for copies and for the banks
constexpr int SCORES = TILE_KEYS + 8;  // floats from a row of scores to the next: four lines fill the 32 banks
constexpr float HIDDEN_SCORE = -1e30f;

template <int W> struct AttentionWidth {
    static_assert(W % 32 == 0 && W <= 256, "more does not fit into the registers");
    static constexpr int stride = W + ROW_PAD, vectors = W / 32;
    static constexpr size_t forward_bytes(int per_thread) {
        return (2 * TILE_KEYS * stride + 16 * per_thread * (stride + SCORES + 2)) * sizeof(float);
    }
};

// ---- what the kernels have in common ----

__device__ inline float component(const float4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }
__device__ inline float dot(const float4& a, const float4& b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}
__device__ inline void add_scaled(float4& sum, float w, const float4& x) {
    sum.x = fmaf(w, x.x, sum.x);
    sum.y = fmaf(w, x.y, sum.y);
    sum.z = fmaf(w, x.z, sum.z);
    sum.w = fmaf(w, x.w, sum.w);
}
__device__ inline float4 times(const float4& x, float w) { return make_float4(w * x.x, w * x.y, w * x.z, w * x.w); }

// Of the 8 threads of a line, to all of them.
template <class Of> __device__ inline float over_line(float x) {
    for (int mask = 4; mask; mask /= 2) x = Of::of(x, __shfl_xor_sync(ALL_LANES, x, mask));
    return x;
}

// Rows of a tile, asynchronously: row r from `source(r)`, zeros for null. A line's threads call it together.
template <int W, class Source>
__device__ inline void copy_rows(float* tile, int rows, int dim, Source source) {
    for (int row = threadIdx.x / 8; row < rows; row += ATTENTION_THREADS / 8) {
        const float* from = source(row);
        float* to = tile + row * AttentionWidth<W>::stride;
        for (int c = threadIdx.x % 8 * 4; c < dim; c += 32) {
            if (from)
                copy_async(to + c, from + c);
            else
                *(float4*)(to + c) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }
}

// Multiplies what the thread itself has copied, once it has come.
template <int W> __device__ inline void scale_rows(float* tile, int rows, int dim, float factor) {
    for (int row = threadIdx.x / 8; row < rows; row += ATTENTION_THREADS / 8)
        for (int c = threadIdx.x % 8 * 4; c < dim; c += 32) {
            float4* at = (float4*)(tile + row * AttentionWidth<W>::stride + c);
            *at = times(*at, factor);
        }
}

// Columns of a tile that no copy ever writes.
template <int W> __device__ inline void clear_rest(float* tile, int rows, int dim) {
    for (int row = threadIdx.x / 8; row < rows; row += ATTENTION_THREADS / 8)
        for (int c = dim + threadIdx.x % 8 * 4; c < W; c += 32)
            *(float4*)(tile + row * AttentionWidth<W>::stride + c) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// sums[i][j] = a[line + 16 i] . b[part + 8 j], rows in shared memory.
template <int I, int J, int W>
__device__ inline void products(const float* a, const float* b, float (&sums)[I][J]) {
    constexpr int stride = AttentionWidth<W>::stride;
    a += threadIdx.x / 8 * stride;
    b += threadIdx.x % 8 * stride;
#pragma unroll
    for (int i = 0; i < I; i++)
#pragma unroll
        for (int j = 0; j < J; j++) sums[i][j] = 0.0f;
#pragma unroll 4
    for (int c = 0; c < W; c += 4) {
        float4 x[I], y[J];
#pragma unroll
        for (int i = 0; i < I; i++) x[i] = *(const float4*)(a + i * 16 * stride + c);
#pragma unroll
        for (int j = 0; j < J; j++) y[j] = *(const float4*)(b + j * 8 * stride + c);
#pragma unroll
        for (int i = 0; i < I; i++)
#pragma unroll
            for (int j = 0; j < J; j++) sums[i][j] = dot(x[i], y[j], sums[i][j]);
    }
}

// sums[i] += sum over n, ascending, of weights[line + 16 i][n] x[n], for 32 rows x.
template <int I, int W>
__device__ inline void add_weighted(const float* weights, const float* x, float4 (&sums)[I][W / 32]) {
    constexpr int stride = AttentionWidth<W>::stride;
    weights += threadIdx.x / 8 * SCORES;
    x += threadIdx.x % 8 * 4;
#pragma unroll 2
    for (int n = 0; n < 32; n += 4) {
        float4 w[I];
#pragma unroll
        for (int i = 0; i < I; i++) w[i] = *(const float4*)(weights + i * 16 * SCORES + n);
#pragma unroll
        for (int m = 0; m < 4; m++)
#pragma unroll
            for (int c = 0; c < W / 32; c++) {
                float4 y = *(const float4*)(x + (n + m) * stride + 32 * c);
#pragma unroll
                for (int i = 0; i < I; i++) add_scaled(sums[i][c], component(w[i], m), y);
            }
    }
}

template <int I, int W> __device__ inline void clear(float4 (&sums)[I][W / 32]) {
#pragma unroll
    for (int i = 0; i < I; i++)
#pragma unroll
        for (int c = 0; c < W / 32; c++) sums[i][c] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// Writes four columns of each 32 of a row, times a factor.
template <int W> __device__ inline void write_row(float* out, int dim, const float4 (&sums)[W / 32], float factor) {
#pragma unroll
    for (int c = 0; c < W / 32; c++) {
        int column = threadIdx.x % 8 * 4 + 32 * c;
        if (column < dim) *(float4*)(out + column) = times(sums[c], factor);
    }
}

// Which keys the queries of a tile see.
struct TileRanges {
    int *first, *end;      // of each query, in shared memory
    int any_begin, any_end;  // between the first and the last key that any of them sees
    int all_begin, all_end;  // the keys that all of them see
    int num;

    __device__ static int smaller(int a, int b) { return a < b ? a : b; }
    __device__ static int larger(int a, int b) { return a > b ? a : b; }

    // To be called by all threads. Fails where a range names keys that there are not.
    __device__ TileRanges(int* shared, int num, const AttentionShape& a, int start, const int32_t* firsts,
                          const int32_t* counts)
        : first(shared),
          end(shared + num),
          any_begin(INT32_MAX),
          any_end(0),
          all_begin(0),
          all_end(INT32_MAX),
          num(num) {
        for (int n = threadIdx.x; n < num; n += ATTENTION_THREADS) {
            int row = (start + n) / a.group;
            bool there = row < a.rows;
            int from = there ? firsts[row] : 0, count = there ? counts[row] : 0;
            if (there && (from < 0 || count < 0 || (int64_t)from + count > a.tokens || (int64_t)count + a.own == 0))
                fail("attention: first and count must name keys that there are");
            first[n] = from;
            end[n] = from + count;
        }
        __syncthreads();
        for (int n = threadIdx.x % 32; n < num && start + n < a.queries(); n += 32) {
            all_begin = larger(all_begin, first[n]);
            all_end = smaller(all_end, end[n]);
            if (end[n] > first[n]) {
                any_begin = smaller(any_begin, first[n]);
                any_end = larger(any_end, end[n]);
            }
        }
        for (int mask = 16; mask; mask /= 2) {
            any_begin = smaller(any_begin, __shfl_xor_sync(ALL_LANES, any_begin, mask));
            any_end = larger(any_end, __shfl_xor_sync(ALL_LANES, any_end, mask));
            all_begin = larger(all_begin, __shfl_xor_sync(ALL_LANES, all_begin, mask));
            all_end = smaller(all_end, __shfl_xor_sync(ALL_LANES, all_end, mask));
        }
    }
    __device__ int first_tile() const { return any_begin / TILE_KEYS; }
    __device__ int end_tile() const { return any_end ? (any_end + TILE_KEYS - 1) / TILE_KEYS : 0; }
    __device__ bool all_see(int tile) const {
        return all_begin <= tile * TILE_KEYS && (tile + 1) * TILE_KEYS <= all_end;
    }
    __device__ bool sees(int n, int key) const { return first[n] <= key && key < end[n]; }
    // The threads of a line ask together.
    __device__ bool any_sees(int key) const {
        int seen = 0;
        for (int n = threadIdx.x % 8; n < num; n += 8) seen |= sees(n, key);
        for (int mask = 4; mask; mask /= 2) seen |= __shfl_xor_sync(ALL_LANES, seen, mask);
        return seen;
    }
};

// A tile of k or v. Rows past the last key are zero; with `ranges`, so is a key that none of their queries sees: it
// may be anything, and 0 times it must be 0.
template <int W>
__device__ inline void copy_keys(float* to, const AttentionShape& a, const float* x, int kv, int tile,
                                 const TileRanges* ranges) {
    bool all = !ranges || ranges->all_see(tile);
    copy_rows<W>(to, TILE_KEYS, a.dim, [&](int row) -> const float* {
        int key = tile * TILE_KEYS + row;
        bool wanted = (all || ranges->any_sees(key)) && key < a.tokens;
        return wanted ? x + ((int64_t)key * a.kv_heads + kv) * a.dim : nullptr;
    });
}

template <int W>
__device__ inline void copy_queries(float* to, int num, const AttentionShape& a, const float* x, int kv, int start) {
    copy_rows<W>(to, num, a.dim, [&](int row) -> const float* {
        return start + row < a.queries() ? x + a.query(start + row, kv) * a.dim : nullptr;
    });
}

// ---- forward ----

// A query's softmax so far: the largest score, and the sum of exponentials and of weighted values below it.
struct Softmax {
    float top = HIDDEN_SCORE, total = 0.0f;
    // Takes in a larger top; returns what the sums so far are to be multiplied by.
    __device__ float raise(float score) {
        float higher = score > top ? score : top, shrink = exponential(top - higher);
        top = higher;
        return shrink;
    }
};

// q, y: (rows, heads, dim); k, v: (tokens, kv_heads, dim); own_k, own_v: (rows, own, kv_heads, dim); log_sum: (rows,
// heads). A block has 16 I queries. The values are loaded while a tile of keys is multiplied, and vice versa.
// Queries are scaled, not scores, and sums say fmaf: the compiler is left no choice where to round.
template <int I, int W>
__global__ void __launch_bounds__(ATTENTION_THREADS, W <= 64 ? 4 : W <= 128 ? 2 : 1)
    attention_kernel(AttentionShape a, const float* q, const float* k, const float* v, const int32_t* first,
                     const int32_t* count, const float* own_k, const float* own_v, float* y, float* log_sum) {
    constexpr int num = 16 * I, stride = AttentionWidth<W>::stride, J = TILE_KEYS / 8;
    GORGON_SHARED(float, queries);
    float *keys = queries + num * stride, *values = keys + TILE_KEYS * stride, *weights = values + TILE_KEYS * stride;
    int line = threadIdx.x / 8, part = threadIdx.x % 8, start = blockIdx.x * num, kv = blockIdx.y;
    TileRanges ranges((int*)(weights + num * SCORES), num, a, start, first, count);
    clear_rest<W>(queries, num + 2 * TILE_KEYS, a.dim);
    copy_queries<W>(queries, num, a, q, kv, start);
    copies_commit();
    int tile = ranges.first_tile(), end = ranges.end_tile();
    if (tile < end) copy_keys<W>(keys, a, k, kv, tile, nullptr);
    copies_commit();
    if (tile < end) copy_keys<W>(values, a, v, kv, tile, &ranges);
    copies_commit();
    copies_wait<2>();
    scale_rows<W>(queries, num, a.dim, a.scale);
    Softmax softmax[I];
    float4 sums[I][W / 32];
    clear<I, W>(sums);
    for (; tile < end; tile++) {
        copies_wait<1>();
        __syncthreads();  // the keys are here
        float scores[I][J];
        products<I, J, W>(queries, keys, scores);
        bool all = ranges.all_see(tile);
#pragma unroll
        for (int i = 0; i < I; i++) {
            float top = HIDDEN_SCORE;
#pragma unroll
            for (int j = 0; j < J; j++) {
                bool seen = all || ranges.sees(line + 16 * i, tile * TILE_KEYS + part + 8 * j);
                scores[i][j] = seen ? scores[i][j] : HIDDEN_SCORE;
                top = top > scores[i][j] ? top : scores[i][j];
            }
            float shrink = softmax[i].raise(over_line<Largest>(top)), total = 0.0f;
#pragma unroll
            for (int j = 0; j < J; j++) {  // before the first key that it sees, a query's top is that of hidden ones
                float weight = scores[i][j] > HIDDEN_SCORE ? exponential(scores[i][j] - softmax[i].top) : 0.0f;
                weights[(line + 16 * i) * SCORES + part + 8 * j] = weight;
                total += weight;
            }
            softmax[i].total = fmaf(softmax[i].total, shrink, total);
#pragma unroll
            for (int c = 0; c < W / 32; c++) sums[i][c] = times(sums[i][c], shrink);
        }
        copies_wait<0>();
        __syncthreads();  // the values and weights are here, and no one reads these keys any more
        if (tile + 1 < end) copy_keys<W>(keys, a, k, kv, tile + 1, nullptr);
        copies_commit();
        add_weighted<I, W>(weights, values, sums);
        __syncthreads();
        if (tile + 1 < end) copy_keys<W>(values, a, v, kv, tile + 1, &ranges);
        copies_commit();
    }
    copies_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < I; i++) {
        int n = start + line + 16 * i;
        bool there = n < a.queries();
        float total = over_line<Sum>(softmax[i].total);  // each thread had the keys that it has scores of
        for (int o = 0; o < a.own; o++) {
            int64_t at = there ? a.own_key(n / a.group, o, kv) * a.dim : 0;
            float score = 0.0f;
#pragma unroll
            for (int c = 0; c < W / 32; c++) {
                int column = part * 4 + 32 * c;
                if (there && column < a.dim)
                    score = dot(*(const float4*)(queries + (line + 16 * i) * stride + column),
                                *(const float4*)(own_k + at + column), score);
            }
            score = over_line<Sum>(score);
            float shrink = softmax[i].raise(score), weight = exponential(score - softmax[i].top);
            total = fmaf(total, shrink, weight);
#pragma unroll
            for (int c = 0; c < W / 32; c++) {
                int column = part * 4 + 32 * c;
                sums[i][c] = times(sums[i][c], shrink);
                if (there && column < a.dim) add_scaled(sums[i][c], weight, *(const float4*)(own_v + at + column));
            }
        }
        if (!there) continue;
        int64_t query = a.query(n, kv);
        write_row<W>(y + query * a.dim, a.dim, sums[i], divide(1.0f, total));
        if (part == 0) log_sum[query] = softmax[i].top + logf(total);
    }
}

template <int I, int W>
inline void launch_attention(const AttentionShape& a, const float* q, const float* k, const float* v,
                             const int32_t* first, const int32_t* count, const float* own_k, const float* own_v,
                             float* y, float* log_sum) {
    launch(attention_kernel<I, W>, dim3((a.queries() + 16 * I - 1) / (16 * I), a.kv_heads), dim3(ATTENTION_THREADS),
           AttentionWidth<W>::forward_bytes(I), a, q, k, v, first, count, own_k, own_v, y, log_sum);
}

// Few queries, as when a head drafts, do less work for the missing ones, with the same bits.
template <int W>
inline void attention_forward(const AttentionShape& a, const float* q, const float* k, const float* v,
                              const int32_t* first, const int32_t* count, const float* own_k, const float* own_v,
                              float* y, float* log_sum) {
    if (a.queries() <= 16)
        launch_attention<1, W>(a, q, k, v, first, count, own_k, own_v, y, log_sum);
    else
        launch_attention<4, W>(a, q, k, v, first, count, own_k, own_v, y, log_sum);
}

}  // namespace gorgon
