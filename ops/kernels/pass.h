// A pass of a decoder over a key-value cache, in one parallel region: embedding, layers, final norm, logits, choices.
//
// Row invariance continues here: attention takes its keys in logical order (prefix, then ancestors from the root down,
// then the row itself), whatever slots of the cache they are in, and however many rows look at a key together, each
// score is one chain over the head's width and each output one chain over the keys.
// vector.h and cpu.h come first: Jittor resolves includes itself and does not find files in this folder.
#pragma once

namespace gorgon {

struct Shape {
    int64_t rows, hidden, heads, kv_heads, head_dim, inner, max_length;
    int64_t padded() const { return (head_dim + LANES - 1) / LANES * LANES; }
    int64_t group() const { return heads / kv_heads; }
    int64_t q_width() const { return heads * head_dim; }
    int64_t qkv() const { return (heads + 2 * kv_heads) * head_dim; }
};

// ---- rotary embedding and cache rows ----

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

// cache: (2, kv_heads, max_length, padded). Rotates the queries of a key-value head in place and writes its rotated
// keys and its values, for the rows from first to end.
template <class C>
static inline void rope_and_write(const Shape& s, const Plan& plan, int64_t kv, int64_t first, int64_t end, float* qkv,
                                  const float* cosine_table, const float* sine_table, C* cache) {
    int64_t d = s.head_dim, padded = s.padded();
    for (int64_t r = first; r < end; r++) {
        float* row = qkv + r * s.qkv();
        float *k = row + (s.heads + kv) * d, *v = row + (s.heads + s.kv_heads + kv) * d;
        const float* cosine = cosine_table + plan.position(r) * (d / 2);
        const float* sine = sine_table + plan.position(r) * (d / 2);
        for (int64_t h = kv * s.group(); h < (kv + 1) * s.group(); h++) rotate(row + h * d, d, cosine, sine);
        rotate(k, d, cosine, sine);
        write_cache_row(cache + (kv * s.max_length + plan.slot(r)) * padded, k, d, padded);
        write_cache_row(cache + ((s.kv_heads + kv) * s.max_length + plan.slot(r)) * padded, v, d, padded);
    }
}

// Move rows from `sources` to `targets`, in this order, for every plane (layer, key or value, head) of the cache.
template <class C>
static inline void keep_rows(C* cache, int64_t planes, int64_t max_length, int64_t padded, const int32_t* sources,
                             const int32_t* targets, int64_t count) {
    for (int64_t p = 0; p < planes; p++) {
        C* plane = cache + p * max_length * padded;
        for (int64_t i = 0; i < count; i++)
            if (sources[i] != targets[i])
                memcpy(plane + targets[i] * padded, plane + sources[i] * padded, padded * sizeof(C));
    }
}

// ---- attention: softmax(q k / sqrt(d)) v ----

constexpr int TOGETHER = 4;  // queries that share a loaded key

// Q queries of one key-value head whose ranges of keys start at the same slot.
struct Queries {
    const float* q[TOGETHER];
    float* out[TOGETHER];
    int64_t row[TOGETHER];
};

// The scores of the keys from first to end, the same slots for all Q queries; 16 keys at a time.
template <class C, int Q, class Slot>
static inline void score_keys(const float* padded_q, int64_t padded, const C* keys, int64_t first, int64_t end,
                              Slot slot, float* scores, int64_t stride) {
    for (int64_t j0 = first; j0 < end; j0 += LANES) {
        vec partial[Q][LANES];
        int n = end - j0 < LANES ? (int)(end - j0) : LANES;
        for (int j = 0; j < n; j++) {
            const C* k = keys + slot(j0 + j) * padded;
            vec acc[Q];
            for (int i = 0; i < Q; i++) acc[i] = (vec){};
            for (int64_t b = 0; b < padded; b += LANES) {
                vec kv = load(k + b);
                for (int i = 0; i < Q; i++) acc[i] = fma(load(padded_q + i * padded + b), kv, acc[i]);
            }
            for (int i = 0; i < Q; i++) partial[i][j] = acc[i];
        }
        for (int j = n; j < LANES; j++)
            for (int i = 0; i < Q; i++) partial[i][j] = (vec){};
        for (int i = 0; i < Q; i++) store(scores + i * stride + j0, sums_of_lanes(partial[i]));
    }
}

// exp(score - highest) in place; returns 1 / their sum. Room for `count` rounded up to 16.
static inline float exponentiate(float* scores, int64_t count) {
    for (int64_t j = count; j % LANES; j++) scores[j] = -1e30f;
    vec top = splat(-1e30f);
    for (int64_t j = 0; j < count; j += LANES) {
        vec x = load(scores + j);
        top = x > top ? x : top;
    }
    float highest = top[0];
    for (int i = 1; i < LANES; i++) highest = top[i] > highest ? top[i] : highest;
    vec total = {};
    for (int64_t j = 0; j < count; j += LANES) {
        vec p = exp_vec(load(scores + j) - splat(highest));
        store(scores + j, p);
        total += p;
    }
    return 1.0f / sum_lanes(total);
}

// B vectors of the outputs: weighted sums of the values, the common keys together, then each query's own.
template <class C, int Q, int B>
static inline void weigh_values(const Shape& s, const Plan& plan, const Queries& set, const C* values, int64_t first,
                                int64_t common, const int64_t* count, const float* scores, int64_t stride,
                                const float* inverse) {
    int64_t padded = s.padded(), start = plan.start(set.row[0]);
    vec acc[Q][B];
    for (int i = 0; i < Q; i++)
        for (int b = 0; b < B; b++) acc[i][b] = (vec){};
    for (int64_t j = 0; j < common; j++) {
        const C* v = values + (start + j) * padded + first;
        vec loaded[B];
        for (int b = 0; b < B; b++) loaded[b] = load(v + b * LANES);
        for (int i = 0; i < Q; i++) {
            vec p = splat(scores[i * stride + j]);
            for (int b = 0; b < B; b++) acc[i][b] = fma(p, loaded[b], acc[i][b]);
        }
    }
    for (int i = 0; i < Q; i++) {
        for (int64_t j = common; j < count[i]; j++) {
            const C* v = values + plan.key(set.row[i], j) * padded + first;
            vec p = splat(scores[i * stride + j]);
            for (int b = 0; b < B; b++) acc[i][b] = fma(p, load(v + b * LANES), acc[i][b]);
        }
        for (int b = 0; b < B; b++) {
            vec y = acc[i][b] * splat(inverse[i]);
            float* out = set.out[i] + first + b * LANES;
            int64_t left = s.head_dim - first - b * LANES;
            if (left >= LANES) store(out, y);
            else
                for (int64_t n = 0; n < left; n++) out[n] = y[n];
        }
    }
}

// keys, values: the planes of one key-value head. scores: room for Q times `stride`.
template <class C, int Q>
static inline void attend(const Shape& s, const Plan& plan, const Queries& set, const C* keys, const C* values,
                          float* scores, int64_t stride, float* padded_q) {
    int64_t padded = s.padded(), common = plan.contiguous(set.row[0]), start = plan.start(set.row[0]), count[Q];
    float scale = 1.0f / __builtin_sqrtf((float)s.head_dim), inverse[Q];
    for (int i = 0; i < Q; i++) {
        count[i] = plan.keys(set.row[i]);
        common = plan.contiguous(set.row[i]) < common ? plan.contiguous(set.row[i]) : common;
        for (int64_t n = 0; n < padded; n++) padded_q[i * padded + n] = n < s.head_dim ? set.q[i][n] * scale : 0.0f;
    }
    score_keys<C, Q>(padded_q, padded, keys, 0, common, [=](int64_t j) { return start + j; }, scores, stride);
    for (int i = 0; i < Q; i++) {
        score_keys<C, 1>(padded_q + i * padded, padded, keys, common, count[i],
                         [&](int64_t j) { return plan.key(set.row[i], j); }, scores + i * stride, stride);
        inverse[i] = exponentiate(scores + i * stride, count[i]);
    }
    int64_t first = 0;
    for (; first + 4 * LANES <= padded; first += 4 * LANES)
        weigh_values<C, Q, 4>(s, plan, set, values, first, common, count, scores, stride, inverse);
    for (; first < padded; first += LANES)
        weigh_values<C, Q, 1>(s, plan, set, values, first, common, count, scores, stride, inverse);
}

// The attention of every row for one key-value head's queries, or every `parts`-th set of them from `part`.
template <class C>
static inline void attend_head(const Shape& s, const Plan& plan, int64_t kv, const float* qkv, const C* cache,
                               float* out, int64_t part, int64_t parts) {
    static thread_local std::vector<float> scores, padded_q;
    int64_t stride = (s.max_length + plan.width + 2 * LANES) / LANES * LANES, group = s.group();
    scores.resize(TOGETHER * stride);
    padded_q.resize(TOGETHER * s.padded());
    const C* keys = cache + kv * s.max_length * s.padded();
    const C* values = cache + (s.kv_heads + kv) * s.max_length * s.padded();
    int64_t total = s.rows * group, turn = 0;
    for (int64_t item = 0; item < total; turn++) {
        Queries set;
        int held = 0;
        for (; held < TOGETHER && item + held < total; held++) {
            int64_t r = (item + held) / group, h = kv * group + (item + held) % group;
            if (held && plan.start(r) != plan.start(set.row[0])) break;
            set.row[held] = r;
            set.q[held] = qkv + r * s.qkv() + h * s.head_dim;
            set.out[held] = out + (r * s.heads + h) * s.head_dim;
        }
        item += held;
        if (turn % parts != part) continue;
        switch (held) {
            case 1: attend<C, 1>(s, plan, set, keys, values, scores.data(), stride, padded_q.data()); break;
            case 2: attend<C, 2>(s, plan, set, keys, values, scores.data(), stride, padded_q.data()); break;
            case 3: attend<C, 3>(s, plan, set, keys, values, scores.data(), stride, padded_q.data()); break;
            case 4: attend<C, 4>(s, plan, set, keys, values, scores.data(), stride, padded_q.data()); break;
        }
    }
}

// ---- a decoder layer and a pass ----

// The weights of a layer, concatenated: queries, keys and values; output; gate and up; down. scales likewise.
template <class W> struct Layer {
    const float* norms;  // (2, hidden)
    const W* w;
    const typename Packing<W>::scale* scales;

    static int64_t blocks(int64_t outputs) { return (outputs + LANES - 1) / LANES; }
    Matrix<W> qkv(const Shape&) const { return {w, scales}; }
    Matrix<W> o(const Shape& s) const { return qkv(s).after(blocks(s.qkv()), s.hidden); }
    Matrix<W> gate_up(const Shape& s) const { return o(s).after(blocks(s.hidden), s.q_width()); }
    Matrix<W> down(const Shape& s) const { return gate_up(s).after(2 * blocks(s.inner), s.hidden); }
};

// What the threads of a pass work in. normed is each thread's own where rows are few: a norm is then cheaper computed
// twice than waited for.
struct Scratch {
    std::vector<float> attended, big, normed;
    bool few;
    void resize(const Shape& s) {
        int64_t wide = s.qkv() > s.inner ? s.qkv() : s.inner;
        few = s.rows * s.hidden <= 16384;
        attended.resize(s.rows * s.q_width());
        big.resize(s.rows * wide);
        normed.resize(s.rows * s.hidden);
    }
};

static inline float* norm_rows(const float* x, const Shape& s, const float* weight, float eps, Scratch& scratch,
                               int thread, int threads) {
    static thread_local std::vector<float> own;
    if (!scratch.few) {
        rms_norm_share(x, s.rows, s.hidden, weight, eps, scratch.normed.data(), thread, threads);
#pragma omp barrier
        return scratch.normed.data();
    }
    own.resize(s.rows * s.hidden);
    rms_norm_share(x, s.rows, s.hidden, weight, eps, own.data(), 0, 1);
    return own.data();
}

// One layer, by all threads of a parallel region. x: (rows, hidden); out may be x. Ends without a barrier.
template <class W, class C>
static inline void layer_share(const Shape& s, const Plan& plan, const float* x, const Layer<W>& layer,
                               const float* cosine, const float* sine, float eps, C* cache, float* out,
                               Scratch& scratch, int t, int n) {
    float *big = scratch.big.data(), *attended = scratch.attended.data();
    float* normed = norm_rows(x, s, layer.norms, eps, scratch, t, n);
    linear_share<PLAIN>(normed, s.rows, s.hidden, layer.qkv(s), Layer<W>::blocks(s.qkv()), s.qkv(), big, (const float*)nullptr, t, n);
#pragma omp barrier
    if (s.kv_heads % n == 0) {  // each thread has heads of its own and needs no barrier in between
        for (int64_t kv = t; kv < s.kv_heads; kv += n) {
            rope_and_write(s, plan, kv, 0, s.rows, big, cosine, sine, cache);
            attend_head(s, plan, kv, big, cache, attended, 0, 1);
        }
    } else {
        for (int64_t kv = 0; kv < s.kv_heads; kv++)
            rope_and_write(s, plan, kv, s.rows * t / n, s.rows * (t + 1) / n, big, cosine, sine, cache);
#pragma omp barrier
        for (int64_t kv = 0; kv < s.kv_heads; kv++) attend_head(s, plan, kv, big, cache, attended, (t + kv) % n, n);
    }
#pragma omp barrier
    linear_share<ADD>(attended, s.rows, s.q_width(), layer.o(s), Layer<W>::blocks(s.hidden), s.hidden, out, x, t, n);
#pragma omp barrier
    normed = norm_rows(out, s, layer.norms + s.hidden, eps, scratch, t, n);
    linear_share<GATED>(normed, s.rows, s.hidden, layer.gate_up(s), 2 * Layer<W>::blocks(s.inner), s.inner, big, (const float*)nullptr, t, n);
#pragma omp barrier
    linear_share<ADD>(big, s.rows, s.inner, layer.down(s), Layer<W>::blocks(s.hidden), s.hidden, out, (const float*)out, t, n);
}

// hidden: (rows, hidden), taken: (wanted, rows, hidden), logits: (logit_rows, vocab), chosen: their largest's index.
template <class W, class E, class C>
static inline void decoder_pass(const Shape& s, const Plan& plan, const Ends<E>& ends,
                                const std::vector<Layer<W>>& layers, const float* cosine, const float* sine, float eps,
                                C* cache, int64_t cache_stride, float* hidden, float* taken, float* logits,
                                int32_t* chosen) {
    static Scratch scratch;
    static std::vector<float> state, best;
    scratch.resize(s);
    state.resize(s.rows * s.hidden);
    best.resize(ends.logit_rows + 1);
    float* x = state.data();
#pragma omp parallel
    {
        int t = omp_get_thread_num(), n = omp_get_num_threads();
        int64_t first = s.rows * t / n, end = s.rows * (t + 1) / n;
        for (int64_t r = first; r < end; r++) {
            const E* row = ends.embedding + (int64_t)ends.token_ids[r] * s.hidden;
            int64_t d = 0;
            for (; d + LANES <= s.hidden; d += LANES) store(x + r * s.hidden + d, load(row + d));
            if (d < s.hidden) {
                E rest[LANES] = {};
                for (int64_t i = d; i < s.hidden; i++) rest[i - d] = row[i];
                vec y = load(rest);
                for (int64_t i = d; i < s.hidden; i++) x[r * s.hidden + i] = y[i - d];
            }
        }
        for (size_t i = 0; i <= layers.size(); i++) {
#pragma omp barrier
            if (ends.wanted[i] >= 0)
                memcpy(taken + (ends.wanted[i] * s.rows + first) * s.hidden, x + first * s.hidden,
                       (end - first) * s.hidden * sizeof(float));
            if (i < layers.size())
                layer_share(s, plan, x, layers[i], cosine, sine, eps, cache + i * cache_stride, x, scratch, t, n);
        }
        rms_norm_share(x, s.rows, s.hidden, ends.norm, eps, hidden, t, n);
#pragma omp barrier
        if (ends.logit_rows) {
            Matrix<E> head = {ends.lm_head, nullptr};
            linear_share<PLAIN>(hidden + (s.rows - ends.logit_rows) * s.hidden, ends.logit_rows, s.hidden, head,
                                Layer<E>::blocks(ends.vocab), ends.vocab, logits, (const float*)nullptr, t, n);
#pragma omp barrier
            top_k_share(logits, ends.logit_rows, ends.vocab, 1, best.data(), chosen, t, n);
        }
    }
}

}  // namespace gorgon
