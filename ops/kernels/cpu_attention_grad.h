// The gradients of trainable attention on the CPU. Tiles, scores and packed keys are those of cpu_attention.h, which
// the including text names first.
#pragma once

namespace gorgon {

// Weights that the backward pass holds at a time before the keys collect their gradients: 1 MB, and 1 MB of slopes.
// A quarter and four times as much took the same time.
constexpr int64_t HELD_WEIGHTS = 1 << 18;

struct AttentionGrads {
    float *q, *k, *v, *own_k, *own_v;
};

// With p the weights and s the scores: dv = p^T dy, dp = dy v^T, ds = p (dp - dy . y), dq = ds k, dk = ds^T q. Tiles
// go through in batches: first each tile computes p, ds and dq, then each block of keys collects what the tiles hold.
static inline void attention_backward(const Attention& a, const float* q, const float* k, const float* v,
                                      const int32_t* first, const int32_t* count, const float* y,
                                      const float* log_sum, const float* upstream, const float* own_k,
                                      const float* own_v, const AttentionGrads& grads) {
    std::vector<Tile> tiles = cut_tiles(a, first, count);
    std::vector<char> seen = seen_blocks(a, tiles);
    static std::vector<float> key_store, value_store, weight_store, slope_store, query_store, upstream_store;
    key_store.resize(a.kv_heads * a.blocks() * a.dim * LANES);
    value_store.resize(key_store.size());
    std::vector<size_t> batches = {0};  // the tiles of batch b: batches[b] .. batches[b + 1] - 1
    int64_t held = 0, most_held = 0, batch_rows = 0, most_rows = 0, most = 0;
    for (size_t t = 0; t < tiles.size(); t++) {
        int64_t num = tiles[t].rows * a.group(), size = num * tiles[t].width();
        if (t && (held + size) * a.kv_heads > HELD_WEIGHTS) {
            batches.push_back(t);
            held = batch_rows = 0;
        }
        tiles[t].held = held;
        held += size;
        batch_rows += tiles[t].rows;
        most_held = held > most_held ? held : most_held;
        most_rows = batch_rows > most_rows ? batch_rows : most_rows;
        most = num > most ? num : most;
    }
    batches.push_back(tiles.size());
    weight_store.resize(a.kv_heads * most_held);
    slope_store.resize(a.kv_heads * most_held);
    query_store.resize(most_rows * a.heads * a.dim);
    upstream_store.resize(most_rows * a.heads * a.dim);
    float *packed_k = key_store.data(), *packed_v = value_store.data();
#pragma omp parallel
    {
        pack_keys(a, seen, k, packed_k);
        pack_keys(a, seen, v, packed_v);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < a.tokens; t++) {
            memset(grads.k + t * a.kv_heads * a.dim, 0, a.kv_heads * a.dim * sizeof(float));
            memset(grads.v + t * a.kv_heads * a.dim, 0, a.kv_heads * a.dim * sizeof(float));
        }
        static thread_local std::vector<float> scratch;
        scratch.resize(most * (a.dim + 2 * a.own_width()));
        float* sums = scratch.data();
        float* own_p = sums + most * a.dim;
        float* own_s = own_p + most * a.own_width();
        for (size_t batch = 0; batch + 1 < batches.size(); batch++) {
            size_t begin = batches[batch], end = batches[batch + 1];
            // A tile's queries and their upstream gradients, (queries, dim) each.
            auto place = [&](int64_t kv, const Tile& tile) {
                return (kv * most_rows + tile.row - tiles[begin].row) * a.group() * a.dim;
            };
#pragma omp for collapse(2) schedule(dynamic)
            for (int64_t kv = 0; kv < a.kv_heads; kv++)
                for (size_t t = begin; t < end; t++) {
                    const Tile& tile = tiles[t];
                    int64_t num = tile.rows * a.group(), width = tile.width();
                    float* p = weight_store.data() + kv * most_held + tile.held;
                    float* s = slope_store.data() + kv * most_held + tile.held;
                    float* queries = query_store.data() + place(kv, tile);
                    float* down = upstream_store.data() + place(kv, tile);
                    copy_queries(a, tile, kv, q, a.scale, queries);
                    copy_queries(a, tile, kv, upstream, 1.0f, down);
                    tile_scores(a, tile, kv, queries, packed_k, own_k, p, own_p);
                    tile_scores(a, tile, kv, down, packed_v, own_v, s, own_s);
                    for (int64_t i = 0; i < num; i++) {
                        int64_t query = a.query(tile.row, kv, i), row = tile.row + i / a.group();
                        Span span(tile, count[row]);
                        float *pi = p + i * width, *si = s + i * width;
                        float *own_pi = own_p + i * a.own_width(), *own_si = own_s + i * a.own_width();
                        hide(pi, span, UNSEEN);
                        hide(si, span, 0.0f);
                        vec mean = splat(dot(down + i * a.dim, y + query * a.dim, a.dim));
                        for (int64_t j = 0; j < span.padded; j += LANES) {
                            vec weight = exp_vec(load(pi + j) - splat(log_sum[query]));
                            store(pi + j, weight);
                            store(si + j, weight * (load(si + j) - mean));
                        }
                        memset(pi + span.padded, 0, (width - span.padded) * sizeof(float));
                        memset(si + span.padded, 0, (width - span.padded) * sizeof(float));
                        exponentiate(own_pi, a.own_width(), log_sum[query], (vec){});
                        for (int64_t o = 0; o < a.own; o++) own_si[o] = own_pi[o] * (own_si[o] - mean[0]);
                    }
                    memset(sums, 0, num * a.dim * sizeof(float));
                    add_weighted_all(s + tile.first % LANES, width, 1, k + (tile.first * a.kv_heads + kv) * a.dim,
                                     a.kv_heads * a.dim, tile.end - tile.first, sums, a.dim, num, a.dim);
                    for (int64_t i = 0; i < num; i++) {
                        for (int64_t o = 0; o < a.own; o++) {
                            int64_t key = a.own_key(tile.row + i / a.group(), o, kv);
                            float slope = own_s[i * a.own_width() + o];
                            if (i % a.group() == 0) {
                                memset(grads.own_k + key, 0, a.dim * sizeof(float));
                                memset(grads.own_v + key, 0, a.dim * sizeof(float));
                            }
                            add_scaled(slope, own_k + key, a.dim, sums + i * a.dim);
                            add_scaled(slope, queries + i * a.dim, a.dim, grads.own_k + key);
                            add_scaled(own_p[i * a.own_width() + o], down + i * a.dim, a.dim, grads.own_v + key);
                        }
                        multiply(sums + i * a.dim, a.dim, a.scale);
                        memcpy(grads.q + a.query(tile.row, kv, i) * a.dim, sums + i * a.dim, a.dim * sizeof(float));
                    }
                }
#pragma omp for collapse(2) schedule(dynamic, 4)
            for (int64_t kv = 0; kv < a.kv_heads; kv++)
                for (int64_t b = 0; b < a.blocks(); b++) {
                    if (!seen[b]) continue;
                    int64_t keys = a.tokens - b * LANES < LANES ? a.tokens - b * LANES : LANES;
                    int64_t key = (b * LANES * a.kv_heads + kv) * a.dim, stride = a.kv_heads * a.dim;
                    for (size_t t = begin; t < end; t++) {
                        const Tile& tile = tiles[t];
                        if (b < tile.block() || b >= tile.block() + tile.blocks()) continue;
                        int64_t num = tile.rows * a.group(), width = tile.width();
                        int64_t from = kv * most_held + tile.held + (b - tile.block()) * LANES;
                        add_weighted_all(weight_store.data() + from, 1, width, upstream_store.data() + place(kv, tile),
                                         a.dim, num, grads.v + key, stride, keys, a.dim);
                        add_weighted_all(slope_store.data() + from, 1, width, query_store.data() + place(kv, tile),
                                         a.dim, num, grads.k + key, stride, keys, a.dim);
                    }
                }
        }
    }
}

}  // namespace gorgon
