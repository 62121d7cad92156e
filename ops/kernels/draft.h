// A chain of draft tokens by one parallel region: the steps of a small network, token after token, as ops/draft.py
// writes them down.
//
// Products are shared by the threads and land in memory that all see; everything else is so little that each thread
// does all of it in memory of its own, because waiting for another thread would take longer. So threads wait after
// products alone, where the list of steps says so.
// vector.h and cpu.h come first: Jittor looks for included files itself and does not find those beside this one.
#pragma once

namespace gorgon {

// As KINDS of ops/draft.py.
enum DraftKind { WAIT, TOKEN, NORM, PRODUCT, COPY, SUM, TIMES, SILU, SIGMOID, TANH, MIX, CHOOSE, ZERO };

// out, a, b, c: places of values; below `own` each thread's, from there on those of all. n: floats of the result,
// k: those of a product's input; weight: number of a matrix, or where in the vectors a norm's weight is.
struct DraftStep {
    int32_t kind, out, a, b, c, n, k, weight;
};

// Packed weights of either type; the other pointer is null.
struct DraftMatrix {
    const uint16_t* half;
    const float* single;
};
static inline DraftMatrix draft_matrix(const uint16_t* w) { return {w, nullptr}; }
static inline DraftMatrix draft_matrix(const float* w) { return {nullptr, w}; }

// E: type of the embedding.
template <class E> struct DraftChain {
    const DraftStep* steps;
    int64_t count, dim, own, common;
    const float* hidden;      // (dim,)
    const E* embedding;       // (vocab, dim)
    const DraftMatrix* matrices;
    const float* vectors;     // norms and biases, concatenated
    const int32_t* tokens;    // the token of each logit; nullptr: its number
};

// The place of the largest of n floats, the first of equals.
static inline int64_t largest(const float* x, int64_t n) {
    int64_t best = 0, i = LANES;
    if (n >= LANES) {
        vec top = load(x);
        veci index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, place = index;
        for (; i + LANES <= n; i += LANES) {
            index += LANES;
            vec y = load(x + i);
            veci more = y > top;
            top = more ? y : top;
            place = more ? index : place;
        }
        best = place[0];
        for (int lane = 1; lane < LANES; lane++)
            if (top[lane] > x[best] || (top[lane] == x[best] && place[lane] < best)) best = place[lane];
    } else
        i = 1;
    for (; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

// n floats of a row in another type.
template <class E> static inline void widen(const E* row, int64_t n, float* out) {
    int64_t d = 0;
    for (; d + LANES <= n; d += LANES) store(out + d, load(row + d));
    if (d == n) return;
    E rest[LANES] = {};
    memcpy(rest, row + d, (n - d) * sizeof(E));
    vec y = load(rest);
    for (int64_t i = d; i < n; i++) out[i] = y[i - d];
}

// out[i] = f(i): whole vectors while they fit, then one by one from a padded copy.
template <class F> static inline void each(int64_t n, float* out, F f) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(out + i, f(i, (int)LANES));
    if (i == n) return;
    vec y = f(i, (int)(n - i));
    for (int64_t j = i; j < n; j++) out[j] = y[j - i];
}

static inline vec load_some(const float* x, int count) {
    if (count == LANES) return load(x);
    vec y = {};
    for (int i = 0; i < count; i++) y[i] = x[i];
    return y;
}

static inline vec sigmoid(vec x) { return splat(1.0f) / (splat(1.0f) + exp_vec(-x)); }

// A thread's share of a product with one row. bias: nullptr for none.
template <class W>
static inline void product_share(const float* x, int64_t K, const W* weights, int64_t N, const float* bias, float* out,
                                 int thread, int threads) {
    Matrix<W> m = {weights, nullptr};
    int64_t blocks = (N + LANES - 1) / LANES;
    if (bias) linear_share<ADD>(x, 1, K, m, blocks, N, out, bias, thread, threads);
    else linear_share<PLAIN>(x, 1, K, m, blocks, N, out, bias, thread, threads);
}

// tokens: (1 + chosen,), the root first.
template <class E>
static inline void draft_chain(const DraftChain<E>& chain, int32_t root, int32_t* tokens, int64_t num_tokens) {
    static std::vector<float> shared;
    if ((int64_t)shared.size() < chain.common) shared.resize(chain.common);
    float* common = shared.data();
#pragma omp parallel
    {
        static thread_local std::vector<float> kept;
        static thread_local std::vector<int32_t> drafted;
        if ((int64_t)kept.size() < chain.own) kept.resize(chain.own);
        if ((int64_t)drafted.size() < num_tokens) drafted.resize(num_tokens);
        float* mine = kept.data();
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        int64_t known = 1;
        drafted[0] = root;
        memcpy(mine, chain.hidden, chain.dim * sizeof(float));
        auto at = [=](int32_t place) { return place < chain.own ? mine + place : common + (place - chain.own); };
        for (int64_t i = 0; i < chain.count; i++) {
            const DraftStep& s = chain.steps[i];
            float* out = at(s.out);
            const float *a = at(s.a), *b = at(s.b), *c = at(s.c);
            switch (s.kind) {
                case WAIT: {
#pragma omp barrier
                    break;
                }
                case TOKEN: widen(chain.embedding + (int64_t)drafted[s.k] * chain.dim, chain.dim, out); break;
                case NORM: rms_norm_share(a, 1, s.n, chain.vectors + s.weight, chain.vectors[s.k], out, 0, 1); break;
                case PRODUCT: {
                    const float* bias = s.b < 0 ? nullptr : chain.vectors + s.b;
                    const DraftMatrix& m = chain.matrices[s.weight];
                    if (m.half) product_share(a, s.k, m.half, s.n, bias, out, thread, threads);
                    else product_share(a, s.k, m.single, s.n, bias, out, thread, threads);
                    break;
                }
                case COPY: memcpy(out, a, s.n * sizeof(float)); break;
                case ZERO: memset(out, 0, s.n * sizeof(float)); break;
                case SUM: each(s.n, out, [=](int64_t j, int n) { return load_some(a + j, n) + load_some(b + j, n); }); break;
                case TIMES: each(s.n, out, [=](int64_t j, int n) { return load_some(a + j, n) * load_some(b + j, n); }); break;
                case SILU: each(s.n, out, [=](int64_t j, int n) { return silu(load_some(a + j, n)); }); break;
                case SIGMOID: each(s.n, out, [=](int64_t j, int n) { return sigmoid(load_some(a + j, n)); }); break;
                case TANH:
                    each(s.n, out, [=](int64_t j, int n) {
                        return splat(2.0f) * sigmoid(splat(2.0f) * load_some(a + j, n)) - splat(1.0f);
                    });
                    break;
                case MIX:  // b where a is 1, c where it is 0
                    each(s.n, out, [=](int64_t j, int n) {
                        vec share = load_some(a + j, n), other = load_some(c + j, n);
                        return share * load_some(b + j, n) + (splat(1.0f) - share) * other;
                    });
                    break;
                case CHOOSE: {
                    int64_t best = largest(a, s.n);
                    drafted[known++] = chain.tokens ? chain.tokens[best] : (int32_t)best;
                    break;
                }
            }
        }
        if (thread == 0) memcpy(tokens, drafted.data(), num_tokens * sizeof(int32_t));
    }
}

}  // namespace gorgon
