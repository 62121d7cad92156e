// Linear cross-entropy in one sweep: chunks of rows whose logits are made, turned into their gradient in place and
// multiplied into the gradients of what they came from, before the next chunk takes their memory.
// vector.h and cpu.h come first: Jittor resolves includes itself and does not find files in this folder.
//
// A chunk's logits are stored vocabulary first, as (vocab, rows). Rows then share a vector, so that no sum over the
// vocabulary crosses lanes, and all three products read the weight and the logits in place. Every logit is one chain of
// fused multiply-adds in ascending order, as in cpu.h: bitwise the same in any chunk, and what a packed product gives.
#pragma once
#include <stdlib.h>
#include <algorithm>

namespace gorgon {

// The logits are the sum over the terms of hidden weight^T. hidden: parts to be stacked, equally many
// rows of (rows, width) each, weight: (vocab, width). Gradients of the same shapes; empty, nullptr: not computed.
struct LinearTerm {
    std::vector<const float*> hidden;
    const float* weight;
    int64_t width;
    std::vector<float*> hidden_grad;
    float* weight_grad;
    // The sweep's own: the first rows with a loss, and packed rows, see pack_across and pack_along.
    std::vector<const float*> rows = {};
    std::vector<float*> grad_rows = {};
    float *across = nullptr, *along = nullptr;
};

// row_weights (rows,): what each row's loss counts in the total. targets (rows,): negative where ignored. soft_ids,
// soft: (rows, num_soft), a distribution in addition to the target, of share soft_share; a negative id is padding.
struct LinearLoss {
    int64_t rows, vocab, num_soft;
    const int32_t *targets, *soft_ids;
    const float *row_weights, *soft;
    float soft_share;
    float *total, *losses;  // (1,), (rows,)
    int32_t* ranks;         // (rows,)
};

// Memory that begins where a cache line does: vectors that straddle two cost a quarter of the sweep.
struct Scratch {
    float* data;
    explicit Scratch(int64_t count) : data((float*)aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)) {}
    Scratch(const Scratch&) = delete;
    ~Scratch() { free(data); }
};

// The buffers of a chunk. lanes: its rows, padded to full vectors. logits (vocab, lanes); highest, wanted, scale
// (lanes,): of a row the largest logit, the target's, and what its exponentials are multiplied with in the end;
// block_max, block_sum, block_rank (blocks of the vocabulary, lanes): partial results.
struct LossChunk {
    int64_t first, num, lanes;  // of the rows that have a loss
    const int64_t* rows;        // (num,), of the problem
    float *logits, *highest, *wanted, *scale, *block_max, *block_sum;
    int32_t *target, *block_rank;
};

// Products go by tiles of 6 x 64 outputs, which take 24 of 32 vector registers, over stretches of 128 terms of a sum,
// so that a panel of 128 x 64 stays in the first-level cache. A thread takes 96 rows of the vocabulary at once.
constexpr int64_t TILE_ROWS = 6, TILE_VECS = 4, TILE_COLUMNS = TILE_VECS * LANES, TILE_DEPTH = 128, VOCAB_BLOCK = 96;

static inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// acc[m][v] += sum_t a[m][t * stride] panel[t][v], a: the first factors of six sums.
template <int NV>
static inline void multiply(const float* const* a, int64_t stride, const float* panel, int64_t depth,
                            vec acc[TILE_ROWS][NV]) {
    const float *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *a4 = a[4], *a5 = a[5];
    for (int64_t t = 0, i = 0; t < depth; t++, i += stride, panel += TILE_COLUMNS) {
        vec b[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) b[v] = load(panel + v * LANES);
        vec each[TILE_ROWS] = {splat(a0[i]), splat(a1[i]), splat(a2[i]), splat(a3[i]), splat(a4[i]), splat(a5[i])};
#pragma GCC unroll 6
        for (int m = 0; m < TILE_ROWS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) acc[m][v] = fma(each[m], b[v], acc[m][v]);
    }
}

// The first ``count`` of NV vectors' numbers, from memory and back.
template <int NV> static inline void load_part(vec acc[NV], const float* from, int64_t count) {
    for (int v = 0; v < NV; v++) {
        if ((v + 1) * LANES <= count) acc[v] = load(from + v * LANES);
        else
            for (int i = 0; v * LANES + i < count; i++) acc[v][i] = from[v * LANES + i];
    }
}

template <int NV> static inline void store_part(float* to, const vec acc[NV], int64_t count) {
    for (int v = 0; v < NV; v++) {
        if ((v + 1) * LANES <= count) store(to + v * LANES, acc[v]);
        else
            for (int i = 0; v * LANES + i < count; i++) to[v * LANES + i] = acc[v][i];
    }
}

// Asks for ``count`` numbers that are needed soon.
static inline void prefetch(const float* from, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) __builtin_prefetch(from + i, 0, 2);
}

// What the numbers k0 .. k0 + depth - 1 of every hidden row add to rows v0 .. v1 - 1 of the vocabulary, for the rows of
// one panel, r0 on.
template <int NV>
static inline void logits_tiles(const LinearLoss& l, const LinearTerm& t, bool first_term, const LossChunk& c,
                                int64_t v0, int64_t v1, int64_t r0, int64_t k0, int64_t depth) {
    const float* panel = t.across + r0 * t.width + k0 * TILE_COLUMNS;
    for (int64_t v = v0; v < v1; v += TILE_ROWS) {
        int64_t real = std::min(TILE_ROWS, v1 - v);
        const float* a[TILE_ROWS];
        for (int64_t m = 0; m < TILE_ROWS; m++) {
            a[m] = t.weight + std::min(v + m, l.vocab - 1) * t.width + k0;
            if (r0 == 0 && v + TILE_ROWS + m < v1) prefetch(a[m] + TILE_ROWS * t.width, depth);
        }
        vec acc[TILE_ROWS][NV] = {};
        float* out = c.logits + v * c.lanes + r0;
        // The chain continues where it stopped; a further term has a chain of its own, which is added.
        for (int64_t m = 0; first_term && k0 && m < real; m++)
            load_part<NV>(acc[m], out + m * c.lanes, NV * LANES);
        multiply<NV>(a, 1, panel, depth, acc);
        for (int64_t m = 0; m < real; m++)
            for (int i = 0; i < NV; i++) {
                float* o = out + m * c.lanes + i * LANES;
                store(o, first_term ? acc[m][i] : load(o) + acc[m][i]);
            }
    }
}

// Rows v0 .. v1 - 1 of the weight's gradient in the columns of one panel, d0 on.
template <int NV>
static inline void weight_tiles(const LinearTerm& t, bool first_chunk, const LossChunk& c, int64_t v0, int64_t v1,
                                int64_t d0) {
    int64_t count = std::min(TILE_COLUMNS, t.width - d0);
    for (int64_t v = v0; v < v1; v += TILE_ROWS) {
        int64_t real = std::min(TILE_ROWS, v1 - v);
        const float* a[TILE_ROWS];
        for (int64_t m = 0; m < TILE_ROWS; m++) a[m] = c.logits + std::min(v + m, v1 - 1) * c.lanes;
        vec acc[TILE_ROWS][NV] = {};
        float* out = t.weight_grad + v * t.width + d0;
        for (int64_t m = TILE_ROWS; m < 2 * TILE_ROWS && v + m < v1; m++) prefetch(out + m * t.width, count);
        for (int64_t m = 0; !first_chunk && m < real; m++) load_part<NV>(acc[m], out + m * t.width, count);
        multiply<NV>(a, 1, t.along + d0 * c.num, c.num, acc);
        for (int64_t m = 0; m < real; m++) store_part<NV>(out + m * t.width, acc[m], count);
    }
}

// What ``depth`` rows of the vocabulary, v0 on, add to the hidden gradient of rows r0 .. r1 - 1 in the columns of one
// panel, d0 on.
template <int NV>
static inline void hidden_tiles(const LinearLoss& l, const LinearTerm& t, const LossChunk& c, int64_t r0, int64_t r1,
                                int64_t v0, int64_t depth, int64_t d0, const float* panel) {
    int64_t count = std::min(TILE_COLUMNS, t.width - d0), next = v0 + TILE_DEPTH;
    int64_t share = parts(TILE_DEPTH, parts(r1 - r0, TILE_ROWS));  // of the weight's next rows, for each strip
    for (int64_t r = r0; r < r1; r += TILE_ROWS, next += share) {
        for (int64_t v = next; v < next + share && v < l.vocab; v++) prefetch(t.weight + v * t.width + d0, count);
        int64_t real = std::min(TILE_ROWS, r1 - r);
        vec acc[TILE_ROWS][NV] = {};
        for (int64_t m = 0; v0 && m < real; m++)
            load_part<NV>(acc[m], t.grad_rows[c.first + r + m] + d0, count);
        const float* a[TILE_ROWS];
        for (int64_t m = 0; m < TILE_ROWS; m++) a[m] = c.logits + v0 * c.lanes + std::min(r + m, c.lanes - 1);
        multiply<NV>(a, c.lanes, panel, depth, acc);
        for (int64_t m = 0; m < real; m++) {
            for (int v = 0; v < NV && v0 + depth == l.vocab; v++) acc[m][v] = acc[m][v] * splat(c.scale[r + m]);
            store_part<NV>(t.grad_rows[c.first + r + m] + d0, acc[m], count);
        }
    }
}

// A call with the number of vectors, NV, that ``columns`` columns of a panel fill.
#define WITH_VECTORS(columns, call)                      \
    switch (std::min(TILE_VECS, parts(columns, LANES))) { \
        case 1: { constexpr int NV = 1; call; break; }   \
        case 2: { constexpr int NV = 2; call; break; }   \
        case 3: { constexpr int NV = 3; call; break; }   \
        default: { constexpr int NV = 4; call; }         \
    }

// The functions below are called by all threads of a parallel region, and share the work.

// across: panels of 64 of the chunk's rows, (width, 64) each, filled up with zeros.
static inline void pack_across(const LinearTerm& t, const LossChunk& c) {
#pragma omp for schedule(static)
    for (int64_t j = 0; j < parts(c.num, TILE_COLUMNS) * TILE_COLUMNS; j++) {
        float* column = t.across + j / TILE_COLUMNS * TILE_COLUMNS * t.width + j % TILE_COLUMNS;
        const float* x = j < c.num ? t.rows[c.first + j] : nullptr;
        for (int64_t k = 0; k < t.width; k++) column[k * TILE_COLUMNS] = x ? x[k] : 0.0f;
    }
}

// along: panels of 64 columns of the chunk's rows, (rows, 64) each, every row multiplied with its scale, which the same
// thread has found: a static schedule deals the rows out as in finish_rows. A barrier comes later.
static inline void pack_along(const LinearTerm& t, const LossChunk& c) {
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < c.num; r++)
        for (int64_t d0 = 0; d0 < t.width; d0 += TILE_COLUMNS) {
            const float* x = t.rows[c.first + r] + d0;
            float* row = t.along + d0 * c.num + r * TILE_COLUMNS;
            for (int64_t d = 0; d < TILE_COLUMNS; d++) row[d] = d0 + d < t.width ? x[d] * c.scale[r] : 0.0f;
        }
}

template <int TERMS>
static inline void make_logits(const LinearLoss& l, const LinearTerm (&terms)[TERMS], const LossChunk& c) {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < parts(l.vocab, VOCAB_BLOCK); b++) {
        int64_t v0 = b * VOCAB_BLOCK, v1 = std::min(v0 + VOCAB_BLOCK, l.vocab);
        for (int i = 0; i < TERMS; i++)
            for (int64_t k0 = 0; k0 < terms[i].width; k0 += TILE_DEPTH) {
                int64_t depth = std::min(TILE_DEPTH, terms[i].width - k0);
                for (int64_t r0 = 0; r0 < c.num; r0 += TILE_COLUMNS)
                    WITH_VECTORS(c.num - r0, (logits_tiles<NV>(l, terms[i], i == 0, c, v0, v1, r0, k0, depth)))
            }
        for (int64_t r = 0; r < c.lanes; r += LANES) {
            vec highest = load(c.logits + v0 * c.lanes + r);
            for (int64_t v = v0 + 1; v < v1; v++) {
                vec x = load(c.logits + v * c.lanes + r);
                highest = x > highest ? x : highest;
            }
            store(c.block_max + b * c.lanes + r, highest);
        }
    }
}

static inline bool listed(const LinearLoss& l, int64_t i) {
    return l.soft_ids[i] >= 0 && l.soft_ids[i] < l.vocab && l.soft[i] > 0;
}

// The soft target's part of a row's loss but for the logarithm of the sum: sum_i p_i (log p_i - x_i), and sum_i p_i.
static inline void soft_sums(const LinearLoss& l, const LossChunk& c, int64_t r, float* known, float* mass) {
    *known = *mass = 0.0f;
    for (int64_t i = c.rows[r] * l.num_soft; i < (c.rows[r] + 1) * l.num_soft; i++)
        if (listed(l, i)) {
            *mass += l.soft[i];
            *known += l.soft[i] * (__builtin_logf(l.soft[i]) - c.logits[l.soft_ids[i] * c.lanes + r]);
        }
}

// Each row's largest logit, its target and the target's logit; known, mass (lanes,): see soft_sums.
static inline void find_targets(const LinearLoss& l, const LossChunk& c, float* known, float* mass) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < c.lanes; r += LANES) {
        vec highest = load(c.block_max + r);
        for (int64_t b = 1; b < parts(l.vocab, VOCAB_BLOCK); b++) {
            vec x = load(c.block_max + b * c.lanes + r);
            highest = x > highest ? x : highest;
        }
        store(c.highest + r, highest);
        for (int64_t i = r; i < r + LANES; i++) {
            c.target[i] = i < c.num ? l.targets[c.rows[i]] : 0;
            c.wanted[i] = c.logits[c.target[i] * c.lanes + i];
            if (i < c.num) soft_sums(l, c, i, known + i, mass + i);
        }
    }
}

// Counts what ranks before the target, and turns logits x into exp(x - highest) where a gradient is needed.
static inline void exponentiate(const LinearLoss& l, const LossChunk& c, bool wants_grad) {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < parts(l.vocab, VOCAB_BLOCK); b++)
        for (int64_t r = 0; r < c.lanes; r += LANES) {
            vec wanted = load(c.wanted + r), highest = load(c.highest + r), sum = {};
            veci target, before = {};
            memcpy(&target, c.target + r, sizeof target);
            for (int64_t v = b * VOCAB_BLOCK; v < (b + 1) * VOCAB_BLOCK && v < l.vocab; v++) {
                vec x = load(c.logits + v * c.lanes + r), e = exp_vec(x - highest);
                before -= (x > wanted) | ((x == wanted) & (target > (int32_t)v));
                sum += e;
                if (wants_grad) store(c.logits + v * c.lanes + r, e);
            }
            store(c.block_sum + b * c.lanes + r, sum);
            memcpy(c.block_rank + b * c.lanes + r, &before, sizeof before);
        }
}

// Losses and ranks. With e = exp(x - highest), Z = sum e, w = row weight, held = hard + share mass, a logit's gradient,
//     w (held e / Z - hard [target] - share p) = scale (e - (hard [target] + share p) Z / held),  scale = w held / Z,
// leaves the scale to the products. known gets the row's part of the total. A barrier comes later.
static inline void finish_rows(const LinearLoss& l, const LossChunk& c, bool wants_grad, float* known,
                               const float* mass) {
    float hard = 1.0f - l.soft_share;
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < c.num; r++) {
        int64_t row = c.rows[r];
        float sum = 0;
        int32_t before = 0;
        for (int64_t b = 0; b < parts(l.vocab, VOCAB_BLOCK); b++) {
            sum += c.block_sum[b * c.lanes + r];
            before += c.block_rank[b * c.lanes + r];
        }
        float log_sum = c.highest[r] + __builtin_logf(sum), held = hard + l.soft_share * mass[r];
        l.ranks[row] = before;
        l.losses[row] = log_sum - c.wanted[r];
        known[r] = l.row_weights[row] * (hard * l.losses[row] + l.soft_share * (known[r] + mass[r] * log_sum));
        c.scale[r] = l.row_weights[row] * held / sum;
        if (!wants_grad || held == 0) continue;
        c.logits[c.target[r] * c.lanes + r] -= sum * hard / held;
        for (int64_t i = row * l.num_soft; i < (row + 1) * l.num_soft; i++)
            if (listed(l, i))
                c.logits[l.soft_ids[i] * c.lanes + r] -= sum * l.soft_share * l.soft[i] / held;
    }
}

static inline void add_weight_grad(const LinearLoss& l, const LinearTerm& t, bool first_chunk, const LossChunk& c) {
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < parts(l.vocab, VOCAB_BLOCK); b++)
        for (int64_t d0 = 0; d0 < t.width; d0 += TILE_COLUMNS) {
            int64_t v0 = b * VOCAB_BLOCK, v1 = std::min(v0 + VOCAB_BLOCK, l.vocab);
            WITH_VECTORS(t.width - d0, (weight_tiles<NV>(t, first_chunk, c, v0, v1, d0)))
        }
}

// panel: memory of this thread for 128 x 64 numbers of the weight.
static inline void make_hidden_grad(const LinearLoss& l, const LinearTerm& t, const LossChunk& c, float* panel) {
    // Columns go to threads; where they do not go round evenly, each thread takes a part of the rows too.
    int64_t columns = parts(t.width, TILE_COLUMNS), threads = omp_get_num_threads(), strips = parts(c.num, TILE_ROWS);
    int64_t groups = columns % threads ? std::min(threads, strips) : 1;
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < columns * groups; task++) {
        int64_t d0 = task / groups * TILE_COLUMNS, g = task % groups, count = std::min(TILE_COLUMNS, t.width - d0);
        int64_t r0 = strips * g / groups * TILE_ROWS, r1 = std::min(strips * (g + 1) / groups * TILE_ROWS, c.num);
        for (int64_t v0 = 0; v0 < l.vocab; v0 += TILE_DEPTH) {
            int64_t depth = std::min(TILE_DEPTH, l.vocab - v0);
            for (int64_t v = 0; v < depth; v++)
                memcpy(panel + v * TILE_COLUMNS, t.weight + (v0 + v) * t.width + d0, count * sizeof(float));
            WITH_VECTORS(count, (hidden_tiles<NV>(l, t, c, r0, r1, v0, depth, d0, panel)))
        }
    }
}

// All of it, at most ``chunk_rows`` rows at once. Gradients are made with the row weights, as those of the total.
template <int TERMS>
static inline void linear_cross_entropy(const LinearLoss& l, LinearTerm (&terms)[TERMS], int64_t chunk_rows) {
    std::vector<int64_t> kept;
    for (int64_t r = 0; r < l.rows; r++) {
        l.losses[r] = 0.0f, l.ranks[r] = -1;
        if (l.targets[r] >= 0) kept.push_back(r);
    }
    bool wants_grad = false;
    for (auto& t : terms) {
        wants_grad |= t.hidden_grad.size() || t.weight_grad;
        if (t.weight_grad && kept.empty()) memset(t.weight_grad, 0, l.vocab * t.width * sizeof(float));
        for (int64_t r = 0; r < l.rows; r++) {
            int64_t part = l.rows / t.hidden.size(), at = r % part * t.width;
            float* grad = t.hidden_grad.size() ? t.hidden_grad[r / part] + at : nullptr;
            if (l.targets[r] >= 0) {
                t.rows.push_back(t.hidden[r / part] + at);
                t.grad_rows.push_back(grad);
            } else if (grad) memset(grad, 0, t.width * sizeof(float));
        }
    }
    l.total[0] = 0.0f;
    if (kept.empty()) return;
    // The chunks are evened out.
    int64_t num = kept.size(), most = parts(parts(num, parts(num, chunk_rows)), LANES) * LANES;
    int64_t blocks = parts(l.vocab, VOCAB_BLOCK), across = parts(most, TILE_COLUMNS) * TILE_COLUMNS, panels = 0;
    for (auto& t : terms) panels += t.width * across + parts(t.width, TILE_COLUMNS) * TILE_COLUMNS * most;
    Scratch logits(l.vocab * most), packed(panels), partial((3 * blocks + 6) * most);
    Scratch own(omp_get_max_threads() * TILE_DEPTH * TILE_COLUMNS);
    float* next = packed.data;
    for (auto& t : terms) {
        t.across = next, t.along = next + t.width * across;
        next = t.along + parts(t.width, TILE_COLUMNS) * TILE_COLUMNS * most;
    }
    LossChunk c;
    c.logits = logits.data, c.block_max = partial.data;
    c.block_sum = c.block_max + blocks * most;
    c.block_rank = (int32_t*)(c.block_sum + blocks * most);
    c.target = c.block_rank + blocks * most;
    c.highest = (float*)(c.target + most);
    c.wanted = c.highest + most, c.scale = c.wanted + most;
    float *known = c.scale + most, *mass = known + most;
    double total = 0;
    for (int64_t first = 0; first < num; first += most) {
        c.first = first, c.num = std::min(most, num - first);
        c.lanes = parts(c.num, LANES) * LANES;
        c.rows = kept.data() + first;
#pragma omp parallel
        {
            for (auto& t : terms) pack_across(t, c);
            make_logits(l, terms, c);
            find_targets(l, c, known, mass);
            exponentiate(l, c, wants_grad);
            finish_rows(l, c, wants_grad, known, mass);
            for (auto& t : terms)
                if (t.weight_grad) pack_along(t, c);
#pragma omp barrier
            for (auto& t : terms) {
                if (t.weight_grad) add_weight_grad(l, t, first == 0, c);
                if (t.hidden_grad.size())
                    make_hidden_grad(l, t, c, own.data + omp_get_thread_num() * TILE_DEPTH * TILE_COLUMNS);
            }
        }
        for (int64_t r = 0; r < c.num; r++) total += known[r];
    }
    l.total[0] = total;
}

}  // namespace gorgon
