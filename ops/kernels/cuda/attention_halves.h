// Attention over a cache in halves, in tensor cores. A block takes up to 64 queries of a key-value head, rows and
// grouped heads alike, and a chunk of keys. Its warps share the keys among them for the scores and the width of the
// values for the outputs, so that each key and each value is read once, from memory straight into the fragments of an
// mma. Of a tree, the groups of 16 keys in which rows differ are gathered for each row alone; they are few, but slow,
// so that up to 4 blocks share them.
//
// attention.h comes first, which defines the order of all sums.
#pragma once

namespace gorgon {

// A row's halves as a lane of an mma wants them, the same permutation of the width for queries and keys.
template <int D> __device__ inline void load_fragments(const uint16_t* row, uint32_t (&f)[D / 16][2]) {
    const int t = threadIdx.x % 4;
    if constexpr (D % 32 == 0) {
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            uint4 v = *(const uint4*)(row + 32 * i + 8 * t);
            f[2 * i][0] = v.x, f[2 * i][1] = v.y, f[2 * i + 1][0] = v.z, f[2 * i + 1][1] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            uint2 v = *(const uint2*)(row + 16 * i + 4 * t);
            f[i][0] = v.x, f[i][1] = v.y;
        }
    }
}

// Scores of 16 queries from `queries` on with 16 keys, two fragments of sums.
template <int D>
__device__ inline void score(const uint16_t* queries, int stride, const uint32_t (&keys)[2][D / 16][2],
                             float (&d)[2][4]) {
    const int g = threadIdx.x % 32 / 4;
    uint32_t low[D / 16][2], high[D / 16][2];
    load_fragments<D>(queries + g * stride, low);
    load_fragments<D>(queries + (g + 8) * stride, high);
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) d[n][i] = 0.0f;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        const uint32_t a[4] = {low[step][0], high[step][0], low[step][1], high[step][1]};
        mma(d[0], a, keys[0][step]);
        mma(d[1], a, keys[1][step]);
    }
}

// The values of 16 keys as fragments: a lane takes 2 WORDS neighbouring columns of four keys.
template <int WORDS> struct Values {
    uint32_t v[4][WORDS];
    __device__ void load(const uint16_t* row, int key) {
        if constexpr (WORDS == 2) {
            uint2 two = *(const uint2*)row;
            v[key][0] = two.x, v[key][1] = two.y;
        } else {
            v[key][0] = *(const uint32_t*)row;
        }
    }
    // Columns 2 w + odd of each lane: eight columns of an mma's second factor.
    __device__ void fragment(int i, uint32_t (&b)[2]) const {
        const int w = i / 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t first = v[2 * half][w], second = v[2 * half + 1][w];
            b[half] = i % 2 ? first >> 16 | (second & 0xffff0000u) : (first & 0xffffu) | second << 16;
        }
    }
};

template <int D> __host__ __device__ constexpr int value_words() { return D % 128 == 0 ? 2 : 1; }
// 16 words off a multiple of 32, where D is one of 64: no bank conflicts.
template <int D> __host__ __device__ constexpr int query_stride() { return D + 32; }
constexpr int SCORE_STRIDE = CHUNK_KEYS + 4;
template <int D, int M> constexpr int attend_bytes() {
    return 16 * M * (query_stride<D>() * 2 + SCORE_STRIDE * 4 + 5 * 4);
}

// Grid: whole ? 1 : chunks * M; tiles; key-value heads. M: a tile has at most 16 M queries.
template <int D, int M, class W>
__global__ void __launch_bounds__(ATTEND_THREADS, M == 1 ? 4 : M == 2 ? 3 : 2) attend_kernel(Attention a) {
    constexpr int QUERY_STRIDE = query_stride<D>(), WORDS = value_words<D>(), UNITS = D / (16 * WORDS);
    constexpr int MINE = (UNITS + ATTEND_WARPS - 1) / ATTEND_WARPS, GROUPS = CHUNK_KEYS / GROUP_KEYS;
    GORGON_SHARED(unsigned char, shared);
    uint16_t* queries = (uint16_t*)shared;                          // (16 M, QUERY_STRIDE)
    float* scores = (float*)(queries + 16 * M * QUERY_STRIDE);      // (16 M, SCORE_STRIDE), then halves: the weights
    int* keys = (int*)(scores + 16 * M * SCORE_STRIDE);             // (16 M,): how many keys a query's row sees
    float *highest = (float*)(keys + 16 * M), *total = highest + 16 * M, *keep = total + 16 * M, *add = keep + 16 * M;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int group = a.group(), kv = blockIdx.z;
    const int32_t* tile = a.tiles + blockIdx.y * 4;
    const int first = tile[0], count = tile[1];
    const int shared_groups = (int)((a.plan.base + tile[2]) / GROUP_KEYS), most = (int)a.plan.base + tile[3];
    int m0 = 0, m1 = M, chunk = 0, end = (most + CHUNK_KEYS - 1) / CHUNK_KEYS;
    if (!a.whole) {
        chunk = blockIdx.x / M;
        end = end < chunk + 1 ? end : chunk + 1;
        const int part = blockIdx.x % M;
        // Where rows differ, each block takes 16 queries.
        if (shared_groups < (chunk + 1) * GROUPS) m0 = part, m1 = part + 1;
        else if (part) return;
    }
    const int begin = m0 * 16, stop = m1 * 16 < count ? m1 * 16 : count;  // this block's queries among the tile's
    if (begin >= stop || chunk >= end) return;

    const int64_t first_row = first / group, start = a.plan.start(first_row);
    const uint16_t* key_plane = (const uint16_t*)a.cache + kv * a.max_length * D;
    const uint16_t* value_plane = key_plane + a.kv_heads * a.max_length * D;
    auto place = [&](int i) {  // of the tile's query i among (rows, heads)
        return (int64_t)((first + i) / group) * a.heads + kv * group + (first + i) % group;
    };
    for (int i = begin * (D / 8) + threadIdx.x; i < m1 * 16 * (D / 8); i += ATTEND_THREADS) {
        const int query = i / (D / 8), part = i % (D / 8);
        uint4 v = make_uint4(0, 0, 0, 0);
        if (query < stop) v = *((const uint4*)((const uint16_t*)a.queries + place(query) * D) + part);
        *(uint4*)(queries + query * QUERY_STRIDE + part * 8) = v;
    }
    for (int i = begin + threadIdx.x; i < m1 * 16; i += ATTEND_THREADS)
        keys[i] = i < stop ? (int)a.plan.keys((first + i) / group) : 0;
    __syncthreads();

    // The queries from low to high are those of row r; rows of the block are the first from begin_row on.
    const int begin_row = (first + begin) / group, num_rows = (first + stop - 1) / group - begin_row + 1;
    auto low_of = [&](int r) { return r * group - first > begin ? r * group - first : begin; };
    auto high_of = [&](int r) { return (r + 1) * group - first < stop ? (r + 1) * group - first : stop; };

    const float scale = a.scale();
    float run[MINE][M][2 * WORDS][4];
    bool joins = false;
    for (; chunk < end; chunk++) {
        const int base_key = chunk * CHUNK_KEYS, left = (most - base_key + GROUP_KEYS - 1) / GROUP_KEYS;
        const int groups = left < GROUPS ? left : GROUPS, ours = shared_groups - chunk * GROUPS;
        const int common = ours < 0 ? 0 : ours < groups ? ours : groups;  // groups of keys that all rows share

        // The values are used last, which hides the time of loading them.
        constexpr int LINES = (D + 63) / 64;
        for (int i = threadIdx.x; i < CHUNK_KEYS * LINES; i += ATTEND_THREADS)
            if (base_key + i / LINES < most)
                prefetch(value_plane + (start + base_key + i / LINES) * D + i % LINES * 64);

        // Scores. A group that all share: a warp for all queries.
#pragma unroll 2
        for (int n = warp; n < common; n += ATTEND_WARPS) {
            uint32_t k[2][D / 16][2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int j = base_key + n * GROUP_KEYS + half * 8 + g;
                load_fragments<D>(key_plane + (start + (j < most ? j : most - 1)) * D, k[half]);
            }
#pragma unroll
            for (int m = 0; m < M; m++) {
                if (m < m0 || m * 16 >= stop) continue;
                float d[2][4];
                score<D>(queries + m * 16 * QUERY_STRIDE, QUERY_STRIDE, k, d);
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int upper = 0; upper < 2; upper++) {
                        const int i = m * 16 + upper * 8 + g;
                        *(float2*)(scores + i * SCORE_STRIDE + n * GROUP_KEYS + half * 8 + 2 * t) =
                            make_float2(d[half][2 * upper] * scale, d[half][2 * upper + 1] * scale);
                    }
            }
        }
        // A group of a row alone.
#pragma unroll 2
        for (int pair = warp; pair < num_rows * (groups - common); pair += ATTEND_WARPS) {
            const int r = begin_row + pair / (groups - common), n = common + pair % (groups - common);
            const int low = low_of(r), high = high_of(r), seen = keys[low], first_key = base_key + n * GROUP_KEYS;
            if (first_key >= seen) continue;
            uint32_t k[2][D / 16][2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int j = first_key + half * 8 + g;
                load_fragments<D>(key_plane + a.plan.key(r, j < seen ? j : seen - 1) * D, k[half]);
            }
#pragma unroll
            for (int m = 0; m < M; m++) {
                if (m * 16 >= high || m * 16 + 16 <= low) continue;
                float d[2][4];
                score<D>(queries + m * 16 * QUERY_STRIDE, QUERY_STRIDE, k, d);
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int upper = 0; upper < 2; upper++) {
                        const int i = m * 16 + upper * 8 + g;
                        if (i >= low && i < high)
                            *(float2*)(scores + i * SCORE_STRIDE + n * GROUP_KEYS + half * 8 + 2 * t) =
                                make_float2(d[half][2 * upper] * scale, d[half][2 * upper + 1] * scale);
                    }
            }
        }
        __syncthreads();

        // Weights: a warp for a query, a lane for four keys. What the sum adds up is what the values are weighed with.
        for (int i = begin + warp; i < stop; i += ATTEND_WARPS) {
            float* row = scores + i * SCORE_STRIDE;
            const int j = base_key + 4 * lane, seen = keys[i];
            const float4 four = *(const float4*)(row + 4 * lane);
            float x[4] = {j < seen ? four.x : UNSEEN, j + 1 < seen ? four.y : UNSEEN, j + 2 < seen ? four.z : UNSEEN,
                          j + 3 < seen ? four.w : UNSEEN};
            const float top = over_warp<Largest>(Largest::of(Largest::of(x[0], x[1]), Largest::of(x[2], x[3])));
            uint16_t p[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                p[e] = j + e < seen ? float_to_half(exponential(x[e] - top)) : (uint16_t)0;
                x[e] = half_to_float(p[e]);
            }
            const float sum = over_warp<Sum>((x[0] + x[1]) + (x[2] + x[3]));
            __syncwarp();
            *(uint2*)((uint16_t*)row + 4 * lane) =
                make_uint2((uint32_t)p[0] | (uint32_t)p[1] << 16, (uint32_t)p[2] | (uint32_t)p[3] << 16);
            if (lane == 0) {
                if (!joins) {
                    highest[i] = top, total[i] = sum;
                } else if (base_key < seen) {
                    const Joint joint = join(highest[i], top);
                    highest[i] = joint.highest, total[i] = joint.of(total[i], sum);
                    keep[i] = joint.keep, add[i] = joint.add;
                } else {
                    add[i] = -1.0f;  // the row has no key here: what it has stays as it is
                }
            }
        }
        __syncthreads();

        // Outputs: a warp for some columns of all queries.
#pragma unroll
        for (int mine = 0; mine < MINE; mine++) {
            const int unit = warp + mine * ATTEND_WARPS;
            if (unit >= UNITS) break;
            const uint16_t* columns = value_plane + unit * 16 * WORDS + g * 2 * WORDS;
            float acc[M][2 * WORDS][4];
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int i = 0; i < 2 * WORDS; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++) acc[m][i][e] = 0.0f;
            auto weights = [&](int m, int n, uint32_t(&p)[4]) {
                const float* query = scores + (m * 16 + g) * SCORE_STRIDE;
                const uint32_t* row = (const uint32_t*)query + n * (GROUP_KEYS / 2) + t;
                p[0] = row[0], p[1] = row[8 * SCORE_STRIDE], p[2] = row[4], p[3] = row[8 * SCORE_STRIDE + 4];
            };
#pragma unroll 2
            for (int n = 0; n < common; n++) {
                Values<WORDS> values;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int j = base_key + n * GROUP_KEYS + 2 * t + e % 2 + e / 2 * 8;
                    values.load(columns + (start + (j < most ? j : most - 1)) * D, e);
                }
#pragma unroll
                for (int m = 0; m < M; m++) {
                    if (m < m0 || m * 16 >= stop) continue;
                    uint32_t p[4], b[2];
                    weights(m, n, p);
#pragma unroll
                    for (int i = 0; i < 2 * WORDS; i++) {
                        values.fragment(i, b);
                        mma(acc[m][i], p, b);
                    }
                }
            }
#pragma unroll 2
            for (int pair = 0; pair < num_rows * (groups - common); pair++) {
                const int r = begin_row + pair / (groups - common), n = common + pair % (groups - common);
                const int low = low_of(r), high = high_of(r), seen = keys[low], first_key = base_key + n * GROUP_KEYS;
                if (first_key >= seen) continue;
                Values<WORDS> values;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int j = first_key + 2 * t + e % 2 + e / 2 * 8;
                    values.load(columns + a.plan.key(r, j < seen ? j : seen - 1) * D, e);
                }
#pragma unroll
                for (int m = 0; m < M; m++) {
                    if (m * 16 >= high || m * 16 + 16 <= low) continue;
                    const bool upper = m * 16 + g >= low && m * 16 + g < high;
                    const bool lower = m * 16 + 8 + g >= low && m * 16 + 8 + g < high;
                    uint32_t p[4], b[2];
                    weights(m, n, p);
#pragma unroll
                    for (int i = 0; i < 2 * WORDS; i++) {
                        float d[4] = {acc[m][i][0], acc[m][i][1], acc[m][i][2], acc[m][i][3]};
                        values.fragment(i, b);
                        mma(d, p, b);
                        if (upper) acc[m][i][0] = d[0], acc[m][i][1] = d[1];
                        if (lower) acc[m][i][2] = d[2], acc[m][i][3] = d[3];
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int i = m * 16 + g + e / 2 * 8;
                    if (m < m0 || i >= stop) continue;
                    const Joint joint = joins ? Joint{0.0f, keep[i], add[i]} : Joint{};
#pragma unroll
                    for (int c = 0; c < 2 * WORDS; c++)
                        if (!joins) run[mine][m][c][e] = acc[m][c][e];
                        else if (joint.add >= 0.0f) run[mine][m][c][e] = joint.of(run[mine][m][c][e], acc[m][c][e]);
                }
        }
        joins = true;
        __syncthreads();
    }

    // A lane has 2 WORDS neighbouring columns twice: those of its mma's columns 2 t and 2 t + 1.
    const int64_t num = a.rows * a.heads;
    chunk--;
#pragma unroll
    for (int mine = 0; mine < MINE; mine++) {
        const int unit = warp + mine * ATTEND_WARPS;
        if (unit >= UNITS) break;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = m * 16 + g + half * 8;
                if (m < m0 || i >= stop) continue;
                const int64_t at = place(i);
#pragma unroll
                for (int column = 0; column < 2; column++)
#pragma unroll
                    for (int w = 0; w < WORDS; w++) {
                        const int d = unit * 16 * WORDS + (2 * t + column) * 2 * WORDS + 2 * w;
                        const float x = run[mine][m][2 * w][2 * half + column];
                        const float y = run[mine][m][2 * w + 1][2 * half + column];
                        if (!a.final())
                            *(float2*)(a.partial + (chunk * num + at) * D + d) = make_float2(x, y);
                        else if (d < a.head_dim)
                            put_inputs<W>(a.out, a.width(), at / a.heads, at % a.heads * a.head_dim + d,
                                          divide(x, total[i]), divide(y, total[i]));
                    }
            }
    }
    if (!a.final())
        for (int i = begin + threadIdx.x; i < stop; i += ATTEND_THREADS)
            *(float2*)(a.stats + (chunk * num + place(i)) * 2) = make_float2(highest[i], total[i]);
}

template <int D, int M, class W> inline void attend_tiles(const Attention& a, int64_t tiles) {
    launch(attend_kernel<D, M, W>, dim3(a.whole ? 1 : a.chunks * M, tiles, a.kv_heads), dim3(ATTEND_THREADS),
           attend_bytes<D, M>(), a);
}

// C: type of cache and queries. parts: how often 16 queries a tile has at most, 1, 2 or 4.
template <int D, class W, class C> inline void attention(const Attention& a, int64_t tiles, int64_t parts) {
    if constexpr (std::is_same<C, float>::value)
        launch(attend_floats_kernel<D, W>, dim3(a.rows * a.heads, a.whole ? 1 : a.chunks), dim3(ATTEND_THREADS),
               attend_floats_bytes(D), a);
    else if (parts == 1) attend_tiles<D, 1, W>(a, tiles);
    else if (parts == 2) attend_tiles<D, 2, W>(a, tiles);
    else attend_tiles<D, 4, W>(a, tiles);
    if (!a.final())
        launch(join_kernel<D, W>, dim3((a.rows * a.heads + ATTEND_WARPS - 1) / ATTEND_WARPS), dim3(ATTEND_THREADS), 0,
               a);
}

}  // namespace gorgon
