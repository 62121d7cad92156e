// Attention of a pass over the key-value cache: softmax(q k / sqrt(d)) v, every row with the keys that its plan names.
//
// Row invariance: a row's keys are taken in logical order (prefix, then ancestors from the root down, then the row
// itself), whatever slots they are in. 128 of them make a chunk, with a maximum, a sum and a weighted sum of values of
// its own; a row's chunks, which its own number of keys counts, are joined in ascending order. Within a chunk a key's
// place in every sum is its logical index: a score is one chain over the head's width, an output one chain over groups
// of 16 keys, in float32 over keys. A key that a row does not see has weight 0.
//
// linear.h comes first, for put_inputs.
#pragma once

namespace gorgon {

constexpr int CHUNK_KEYS = 128, GROUP_KEYS = 16, ATTEND_WARPS = 4, ATTEND_THREADS = 32 * ATTEND_WARPS;
constexpr float UNSEEN = -3.0e38f;

// A launch's arguments. Rows count from the plan's first one. Queries of a key-value head are numbered row by row.
struct Attention {
    Plan plan;
    const int32_t* tiles;  // (tiles, 4): first query, how many; base apart, keys that all rows share, most of a row
    const void* queries;   // (rows, heads, D), of the cache's type
    const void* cache;     // (2, kv_heads, max_length, D)
    int64_t rows, max_length;
    int heads, kv_heads, head_dim, chunks;
    bool whole;      // a block takes all chunks of its queries in turn
    float* partial;  // else (chunks, rows, heads, D) and
    float* stats;    // (chunks, rows, heads, 2): maximum and sum; neither is used where there is one chunk
    void* out;       // packed rows of a product with heads * head_dim inputs
    __host__ __device__ int group() const { return heads / kv_heads; }
    __host__ __device__ int64_t width() const { return (int64_t)heads * head_dim; }
    __host__ __device__ bool final() const { return whole || chunks == 1; }
    __device__ float scale() const { return divide(1.0f, sqrtf((float)head_dim)); }
};

// Two partial softmaxes become one: what the sums so far and those of the next chunk are multiplied with.
struct Joint {
    float highest, keep, add;
    __device__ float of(float before, float next) const { return fmaf(before, keep, next * add); }
};
__device__ inline Joint join(float before, float next) {
    float highest = before > next ? before : next;
    return {highest, exponential(before - highest), exponential(next - highest)};
}

// ---- float32: a block for a query, a thread for a key, then for columns ----

constexpr int attend_floats_bytes(int D) { return (2 * D + CHUNK_KEYS + ATTEND_WARPS) * 4 + CHUNK_KEYS * 8; }

// Grid: rows * heads; whole ? 1 : chunks.
template <int D, class W> __global__ void __launch_bounds__(ATTEND_THREADS) attend_floats_kernel(Attention a) {
    static_assert(ATTEND_THREADS == CHUNK_KEYS, "a thread for a key");
    GORGON_SHARED(int64_t, slots);                              // (CHUNK_KEYS,)
    float *query = (float*)(slots + CHUNK_KEYS), *run = query + D;  // (D,) each
    float *weights = run + D, *meeting = weights + CHUNK_KEYS;  // (CHUNK_KEYS,), (ATTEND_WARPS,)
    const int64_t at = blockIdx.x, row = at / a.heads, num = a.rows * a.heads, seen = a.plan.keys(row);
    const int kv = at % a.heads / a.group(), thread = threadIdx.x;
    const float* key_plane = (const float*)a.cache + kv * a.max_length * D;
    const float* value_plane = key_plane + a.kv_heads * a.max_length * D;
    int64_t chunk = blockIdx.y, end = (seen + CHUNK_KEYS - 1) / CHUNK_KEYS;
    if (!a.whole && end > chunk + 1) end = chunk + 1;
    if (chunk >= end) return;
    for (int d = thread; d < D; d += ATTEND_THREADS) query[d] = ((const float*)a.queries)[at * D + d];
    const float scale = a.scale();
    float highest = 0.0f, total = 0.0f;
    bool joins = false;
    for (; chunk < end; chunk++) {
        __syncthreads();
        const int64_t j = chunk * CHUNK_KEYS + thread, left = seen - chunk * CHUNK_KEYS;
        float x = UNSEEN;
        if (j < seen) {
            slots[thread] = a.plan.key(row, j);
            const float* key = key_plane + slots[thread] * D;
            float sum = 0.0f;
#pragma unroll 8
            for (int d = 0; d < a.head_dim; d++) sum = fmaf(query[d], key[d], sum);
            x = sum * scale;
        }
        const float top = over_block<Largest>(x, meeting), p = j < seen ? exponential(x - top) : 0.0f;
        weights[thread] = p;
        const float sum = over_block<Sum>(p, meeting);
        const Joint joint = joins ? join(highest, top) : Joint{top, 0.0f, 0.0f};
        highest = joint.highest;
        total = joins ? joint.of(total, sum) : sum;
        const int count = left < CHUNK_KEYS ? (int)left : CHUNK_KEYS;
        for (int d = thread; d < D; d += ATTEND_THREADS) {
            float y = 0.0f;
#pragma unroll 8
            for (int i = 0; i < count; i++) y = fmaf(weights[i], value_plane[slots[i] * D + d], y);
            run[d] = joins ? joint.of(run[d], y) : y;
        }
        joins = true;
    }
    chunk--;
    for (int d = thread; d < D; d += ATTEND_THREADS)
        if (!a.final()) a.partial[(chunk * num + at) * D + d] = run[d];
        else if (d < a.head_dim)
            put_input<W>(a.out, a.width(), row, at % a.heads * a.head_dim + d, divide(run[d], total));
    if (!a.final() && thread == 0) *(float2*)(a.stats + (chunk * num + at) * 2) = make_float2(highest, total);
}

// ---- chunks become one: a warp for a query of a head, two columns a lane ----

template <int D, class W> __global__ void __launch_bounds__(ATTEND_THREADS) join_kernel(Attention a) {
    constexpr int PAIRS = (D + 63) / 64;
    const int lane = threadIdx.x % 32;
    const int64_t num = a.rows * a.heads, at = (int64_t)blockIdx.x * ATTEND_WARPS + threadIdx.x / 32;
    if (at >= num) return;
    const int64_t row = at / a.heads, chunks = (a.plan.keys(row) + CHUNK_KEYS - 1) / CHUNK_KEYS;
    const float2* stats = (const float2*)a.stats + at;
    const float2* partial = (const float2*)(a.partial + at * D) + lane;
    float2 y[PAIRS], first = stats[0];
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
        if (2 * lane + 64 * i < D) y[i] = partial[32 * i];
    float highest = first.x, total = first.y;
#pragma unroll 4
    for (int64_t chunk = 1; chunk < chunks; chunk++) {
        const float2 next = stats[chunk * num];
        const Joint joint = join(highest, next.x);
        highest = joint.highest;
        total = joint.of(total, next.y);
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
            if (2 * lane + 64 * i < D) {
                const float2 other = partial[chunk * num * (D / 2) + 32 * i];
                y[i] = make_float2(joint.of(y[i].x, other.x), joint.of(y[i].y, other.y));
            }
    }
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int d = 2 * lane + 64 * i;
        if (d < a.head_dim)
            put_inputs<W>(a.out, a.width(), row, at % a.heads * a.head_dim + d, divide(y[i].x, total),
                          divide(y[i].y, total));
    }
}

}  // namespace gorgon
