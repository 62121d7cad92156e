// CPU kernels of trainable attention: rows over a stretch of shared keys and a few keys of their own, with gradients.
//
// A query is one head of one row. Queries of one key-value head that share their first key go through in tiles, so that
// a key is loaded once for all of them. Keys are in blocks of 16, counted from token 0. A query's result is the
// same whatever else is in its tile: each score is one chain over the head's width, each output one over the keys in
// ascending order, and a key that the query does not see weighs exactly 0. The gradient of a key is one chain over
// the tiles in ascending order. No sum depends on the number of threads.
// vector.h and cpu.h come first: Jittor resolves includes itself and does not find files in this folder.
#pragma once

namespace gorgon {

// Queries in a tile: from 12 to 32 the time is the same within the noise, 6 took a fifth more.
constexpr int64_t QUERIES = 16;
struct Attention {
    int64_t rows, heads, kv_heads, dim, tokens, own;  // dim: of a head, a multiple of 16; own: further keys of a row
    float scale;
    int64_t group() const { return heads / kv_heads; }
    int64_t blocks() const { return (tokens + LANES - 1) / LANES; }
    int64_t own_width() const { return (own + LANES - 1) / LANES * LANES; }
    int64_t query(int64_t row, int64_t kv, int64_t i) const {  // index of the i-th query of a tile among all
        return (row + i / group()) * heads + kv * group() + i % group();
    }
    int64_t own_key(int64_t row, int64_t o, int64_t kv) const { return ((row * own + o) * kv_heads + kv) * dim; }
};

// Rows that follow each other and share their first key. They see keys in first .. end - 1, some of them fewer.
struct Tile {
    int64_t row, rows, first, end;
    int64_t held;  // where the backward pass holds its weights, for one key-value head
    int64_t block() const { return first / LANES; }
    int64_t blocks() const { return end > first ? (end + LANES - 1) / LANES - block() : 0; }
    int64_t width() const { return blocks() * LANES; }
};

static inline bool ranges_fit(const Attention& a, const int32_t* first, const int32_t* count) {
    for (int64_t r = 0; r < a.rows; r++)
        if (first[r] < 0 || count[r] < 0 || (int64_t)first[r] + count[r] > a.tokens || count[r] + a.own == 0)
            return false;
    return true;
}

static inline std::vector<Tile> cut_tiles(const Attention& a, const int32_t* first, const int32_t* count) {
    std::vector<Tile> tiles;
    int64_t most = QUERIES / a.group() > 1 ? QUERIES / a.group() : 1;
    for (int64_t r = 0; r < a.rows; r++) {
        if (tiles.empty() || tiles.back().rows == most || tiles.back().first != first[r])
            tiles.push_back({r, 0, first[r], first[r], 0});
        Tile& tile = tiles.back();
        tile.rows++;
        if (first[r] + count[r] > tile.end) tile.end = first[r] + count[r];
    }
    return tiles;
}

// Lane l of vector t becomes lane t of vector l.
static inline void transpose(vec x[LANES]) {
    for (int width = 1; width < LANES; width *= 2) {
        veci low, high;
        for (int l = 0; l < LANES; l++) {
            low[l] = l & width ? LANES + l - width : l;
            high[l] = l & width ? LANES + l : l + width;
        }
        for (int t = 0; t < LANES; t++) {
            if (t & width) continue;
            vec a = x[t], b = x[t + width];
            x[t] = __builtin_shuffle(a, b, low);
            x[t + width] = __builtin_shuffle(a, b, high);
        }
    }
}

// x: (tokens, kv_heads, dim) -> (kv_heads, blocks, dim, 16), as linear_share reads its weights. Only blocks that are
// seen; tokens after the last are zero. To be called by all threads.
static inline void pack_keys(const Attention& a, const std::vector<char>& seen, const float* x, float* packed) {
#pragma omp for collapse(2) schedule(static)
    for (int64_t b = 0; b < a.blocks(); b++)
        for (int64_t kv = 0; kv < a.kv_heads; kv++) {
            if (!seen[b]) continue;
            float* out = packed + (kv * a.blocks() + b) * a.dim * LANES;
            for (int64_t i = 0; i < a.dim; i += LANES) {
                vec block[LANES];
                for (int64_t t = 0; t < LANES; t++) {
                    int64_t token = b * LANES + t;
                    block[t] = token < a.tokens ? load(x + (token * a.kv_heads + kv) * a.dim + i) : (vec){};
                }
                transpose(block);
                for (int64_t t = 0; t < LANES; t++) store(out + (i + t) * LANES, block[t]);
            }
        }
}

static inline std::vector<char> seen_blocks(const Attention& a, const std::vector<Tile>& tiles) {
    std::vector<char> seen(a.blocks());
    for (const Tile& tile : tiles)
        for (int64_t b = 0; b < tile.blocks(); b++) seen[tile.block() + b] = 1;
    return seen;
}

// out[m][:] += sum_t weights[m * row + t * step] x[t * stride :], for M rows and NV vectors of 16 columns.
template <int M, int NV>
static inline void add_weighted(const float* weights, int64_t row, int64_t step, const float* x, int64_t stride,
                                int64_t count, float* out, int64_t out_stride) {
    vec acc[M][NV];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < NV; n++) acc[m][n] = load(out + m * out_stride + n * LANES);
    for (int64_t t = 0; t < count; t++) {
        vec b[NV];
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) b[n] = load(x + t * stride + n * LANES);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            vec w = splat(weights[m * row + t * step]);
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) acc[m][n] = fma(w, b[n], acc[m][n]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < NV; n++) store(out + m * out_stride + n * LANES, acc[m][n]);
}

template <int NV>
static inline void add_weighted_rows(const float* weights, int64_t row, int64_t step, const float* x, int64_t stride,
                                     int64_t count, float* out, int64_t out_stride, int64_t rows) {
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4)
        add_weighted<4, NV>(weights + m * row, row, step, x, stride, count, out + m * out_stride, out_stride);
    for (; m < rows; m++)
        add_weighted<1, NV>(weights + m * row, row, step, x, stride, count, out + m * out_stride, out_stride);
}

// The same for any number of rows and all columns.
static inline void add_weighted_all(const float* weights, int64_t row, int64_t step, const float* x, int64_t stride,
                                    int64_t count, float* out, int64_t out_stride, int64_t rows, int64_t dim) {
    int64_t i = 0;
    for (; i + 4 * LANES <= dim; i += 4 * LANES)
        add_weighted_rows<4>(weights, row, step, x + i, stride, count, out + i, out_stride, rows);
    for (; i + 2 * LANES <= dim; i += 2 * LANES)
        add_weighted_rows<2>(weights, row, step, x + i, stride, count, out + i, out_stride, rows);
    for (; i < dim; i += LANES)
        add_weighted_rows<1>(weights, row, step, x + i, stride, count, out + i, out_stride, rows);
}

static inline float dot(const float* x, const float* y, int64_t dim) {
    vec acc = {};
    for (int64_t i = 0; i < dim; i += LANES) acc = fma(load(x + i), load(y + i), acc);
    return sum_lanes(acc);
}

// y += w x
static inline void add_scaled(float w, const float* x, int64_t dim, float* y) {
    for (int64_t i = 0; i < dim; i += LANES) store(y + i, fma(splat(w), load(x + i), load(y + i)));
}

constexpr float UNSEEN = -1e30f;  // exp of it is 0

// Scores of a tile's queries, concatenated: (queries, width) for the shared keys, of which not every query sees all,
// and (queries, own_width) for the rows' own keys, UNSEEN after the last.
static inline void tile_scores(const Attention& a, const Tile& tile, int64_t kv, const float* queries,
                               const float* packed, const float* own_x, float* scores, float* own_scores) {
    int64_t num = tile.rows * a.group();
    Matrix<float> keys = {packed + (kv * a.blocks() + tile.block()) * a.dim * LANES, nullptr};
    linear_share<PLAIN>(queries, num, a.dim, keys, tile.blocks(), tile.width(), scores, (const float*)nullptr, 0, 1);
    for (int64_t i = 0; i < num; i++)
        for (int64_t o = 0; o < a.own_width(); o++)
            own_scores[i * a.own_width() + o] =
                o < a.own ? dot(queries + i * a.dim, own_x + a.own_key(tile.row + i / a.group(), o, kv), a.dim) : UNSEEN;
}

// The place of a query's keys in its row of scores; the vectors up to `padded` hold them, what follows is unseen.
struct Span {
    int64_t begin, end, padded;
    Span(const Tile& tile, int32_t count)
        : begin(tile.first - tile.block() * LANES), end(begin + count), padded((end + LANES - 1) / LANES * LANES) {
        if (count == 0) padded = 0;
    }
};

// Overwrite what was computed for keys that the query does not see.
static inline void hide(float* row, const Span& span, float value) {
    if (span.padded == 0) return;
    for (int64_t j = 0; j < span.begin; j++) row[j] = value;
    for (int64_t j = span.end; j < span.padded; j++) row[j] = value;
}

static inline vec higher(const float* x, int64_t count, vec highest) {
    for (int64_t j = 0; j < count; j += LANES) {
        vec y = load(x + j);
        highest = y > highest ? y : highest;
    }
    return highest;
}

// x = exp(x - shift); returns total + the sum.
static inline vec exponentiate(float* x, int64_t count, float shift, vec total) {
    for (int64_t j = 0; j < count; j += LANES) {
        vec y = exp_vec(load(x + j) - splat(shift));
        store(x + j, y);
        total += y;
    }
    return total;
}

static inline void multiply(float* x, int64_t count, float factor) {
    for (int64_t j = 0; j < count; j += LANES) store(x + j, load(x + j) * splat(factor));
}

static inline void copy_queries(const Attention& a, const Tile& tile, int64_t kv, const float* x, float factor,
                                float* out) {
    for (int64_t i = 0; i < tile.rows * a.group(); i++) {
        const float* from = x + a.query(tile.row, kv, i) * a.dim;
        for (int64_t c = 0; c < a.dim; c += LANES) store(out + i * a.dim + c, load(from + c) * splat(factor));
    }
}

// q, out: (rows, heads, dim); k, v: (tokens, kv_heads, dim); own_k, own_v: (rows, own, kv_heads, dim), unread where
// own is 0; log_sum: (rows, heads), the logarithm of the sum of exponentiated scores.
static inline void attention_forward(const Attention& a, const float* q, const float* k, const float* v,
                                     const int32_t* first, const int32_t* count, const float* own_k,
                                     const float* own_v, float* out, float* log_sum) {
    std::vector<Tile> tiles = cut_tiles(a, first, count);
    std::vector<char> seen = seen_blocks(a, tiles);
    static std::vector<float> key_store;
    key_store.resize(a.kv_heads * a.blocks() * a.dim * LANES);
    float* packed = key_store.data();
    int64_t widest = 0, most = 0;
    for (const Tile& tile : tiles) {
        widest = tile.width() > widest ? tile.width() : widest;
        most = tile.rows * a.group() > most ? tile.rows * a.group() : most;
    }
#pragma omp parallel
    {
        pack_keys(a, seen, k, packed);
        static thread_local std::vector<float> scratch;
        scratch.resize(most * (2 * a.dim + widest + a.own_width()));
        float* queries = scratch.data();
        float* sums = queries + most * a.dim;
        float* scores = sums + most * a.dim;
        float* own_scores = scores + most * widest;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t kv = 0; kv < a.kv_heads; kv++)
            for (size_t t = 0; t < tiles.size(); t++) {
                const Tile& tile = tiles[t];
                int64_t num = tile.rows * a.group(), width = tile.width();
                copy_queries(a, tile, kv, q, a.scale, queries);
                tile_scores(a, tile, kv, queries, packed, own_k, scores, own_scores);
                for (int64_t i = 0; i < num; i++) {
                    Span span(tile, count[tile.row + i / a.group()]);
                    float* p = scores + i * width;
                    float* own_p = own_scores + i * a.own_width();
                    hide(p, span, UNSEEN);
                    vec tops = higher(own_p, a.own_width(), higher(p, span.padded, splat(UNSEEN)));
                    float top = tops[0];
                    for (int l = 1; l < LANES; l++) top = tops[l] > top ? tops[l] : top;
                    vec total = exponentiate(p, span.padded, top, (vec){});
                    float sum = sum_lanes(exponentiate(own_p, a.own_width(), top, total));
                    multiply(p, span.padded, 1.0f / sum);
                    multiply(own_p, a.own_width(), 1.0f / sum);
                    memset(p + span.padded, 0, (width - span.padded) * sizeof(float));
                    log_sum[a.query(tile.row, kv, i)] = top + __builtin_logf(sum);
                }
                memset(sums, 0, num * a.dim * sizeof(float));
                add_weighted_all(scores + tile.first % LANES, width, 1, v + (tile.first * a.kv_heads + kv) * a.dim,
                                 a.kv_heads * a.dim, tile.end - tile.first, sums, a.dim, num, a.dim);
                for (int64_t i = 0; i < num; i++) {
                    for (int64_t o = 0; o < a.own; o++)
                        add_scaled(own_scores[i * a.own_width() + o],
                                   own_v + a.own_key(tile.row + i / a.group(), o, kv), a.dim, sums + i * a.dim);
                    memcpy(out + a.query(tile.row, kv, i) * a.dim, sums + i * a.dim, a.dim * sizeof(float));
                }
            }
    }
}

}  // namespace gorgon
