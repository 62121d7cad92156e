// A pass of a decoder over a key-value cache, kernel after kernel: embedding, layers, final norm, logits.
//
// The work between two products is one kernel: it adds up the slices that the first one leaves and packs its result as
// the second one reads it. So a layer takes 9 launches, 10 where attention splits the keys. Rows go through a layer in
// stretches of at most `stretch`, which bounds the scratch that a long prompt takes; a row sees earlier rows alone, and
// those have written their keys by then.
//
// Row invariance: every kernel computes a row from that row alone, with as many threads as the matrices' sizes say.
// linear.h, norm.h, attention_halves.h and select.h come first.
#pragma once
#include <stdexcept>
#include <vector>

namespace gorgon {

struct Shape {
    int64_t rows, hidden, heads, kv_heads, head_dim, inner, max_length;
    int64_t group() const { return heads / kv_heads; }
    int64_t q_width() const { return heads * head_dim; }
    int64_t qkv() const { return (heads + 2 * kv_heads) * head_dim; }
};

// ---- rotary embedding and cache rows: a warp for a head of a row ----

template <class C> __device__ inline void put(C* p, float x) {
    if constexpr (std::is_same<C, float>::value) *p = x;
    else *p = clamped_half(x);
}

// Turns (x_i, x_{i + d/2}) by position * frequency_i, the half-split layout of Hugging Face's Llama; queries go where
// attention reads them, keys and values into the cache. Also clears the padding of the next product's inputs.
template <int D, class W, class C>
__global__ void rope_kernel(Slices qkv, Attention a, const float* cosine, const float* sine, C* queries, C* cache) {
    const int64_t row = blockIdx.x;
    if (blockIdx.y == 0)
        for (int64_t k = a.width() + threadIdx.x; k < padded_inputs<W>(a.width()); k += blockDim.x)
            put_input<W>(a.out, a.width(), row, k, 0.0f);
    const int head = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    const int half = a.head_dim / 2;
    if (head >= a.heads + 2 * a.kv_heads) return;
    C* to = head < a.heads ? queries + (row * a.heads + head) * D
                           : cache + ((head - a.heads) * a.max_length + a.plan.slot(row)) * D;
    const float* cosines = cosine + a.plan.position(row) * half;
    const float* sines = sine + a.plan.position(row) * half;
    for (int i = lane; i < half; i += 32) {
        const float x = qkv(row, (int64_t)head * a.head_dim + i), y = qkv(row, (int64_t)head * a.head_dim + half + i);
        const bool turns = head < a.heads + a.kv_heads;
        put(to + i, turns ? fmaf(x, cosines[i], -(y * sines[i])) : x);
        put(to + half + i, turns ? fmaf(y, cosines[i], x * sines[i]) : y);
    }
    for (int i = a.head_dim + lane; i < D; i += 32) put(to + i, 0.0f);
}

// ---- silu(gate) up ----

template <class W> __global__ void gate_kernel(Slices gate_up, int64_t inner, void* packed) {
    const int64_t row = blockIdx.y, n = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 2;
    if (n >= padded_inputs<W>(inner)) return;
    float y[2] = {0.0f, 0.0f};
    if (n < inner) {
        const float2 gates = gate_up.pair(row, n), ups = gate_up.pair(row, inner + n);
        y[0] = divide(gates.x, 1.0f + exponential(-gates.x)) * ups.x;
        if (n + 1 < inner) y[1] = divide(gates.y, 1.0f + exponential(-gates.y)) * ups.y;
    }
    put_inputs<W>(packed, inner, row, n, y[0], y[1]);
}

// ---- a layer ----

// Hands out stretches of one buffer; a multiple of 256 bytes each, as ops.decoder_pass adds them up.
class Workspace {
    unsigned char *next, *end;

public:
    Workspace(void* p, int64_t bytes) : next((unsigned char*)p), end(next + bytes) {}
    template <class T> T* take(int64_t count) {
        unsigned char* p = next;
        next += (count * (int64_t)sizeof(T) + 255) / 256 * 256;
        if (next > end) throw std::runtime_error("a decoder pass got too little scratch");
        return (T*)p;
    }
    bool spent() const { return next == end; }
};

// How the rows of a pass are dealt out, as RowPlan.tiles does it.
struct Dealt {
    const int32_t* tiles;   // (stretches, most, 4)
    int64_t stretch, most;  // rows and tiles of a stretch
    int64_t parts;          // how often 16 queries a tile has at most
    int64_t keys;           // the most that a row sees
    bool whole;             // a block takes all of a query's keys
};

// Buffers that the layers share. W: type of the weights, C: of the cache.
template <class W, class C> struct Scratch {
    float* x;                // (rows, hidden)
    unsigned char* normed;   // packed rows of the hidden width, by stretches
    int64_t normed_bytes;    // of a stretch
    void *attended, *gated;  // packed rows of a stretch
    C* queries;
    float *slices, *partial, *stats;

    static int64_t largest(const Shape& s, int64_t outputs, int64_t inputs, int64_t before) {
        int64_t elements = num_slices<W>(outputs, inputs) * s.rows * outputs;
        return elements > before ? elements : before;
    }
    // all: rows of the pass; s: of a stretch.
    Scratch(Workspace& room, const Shape& s, int64_t all, int64_t padded, const Dealt& dealt) {
        int64_t stretches = (all + dealt.stretch - 1) / dealt.stretch, queried = s.rows * s.heads;
        int64_t chunks = (dealt.keys + CHUNK_KEYS - 1) / CHUNK_KEYS;
        if (dealt.whole || chunks == 1) chunks = 0;
        x = room.take<float>(all * s.hidden);
        normed_bytes = input_bytes<W>(s.rows, s.hidden);
        normed = room.take<unsigned char>(stretches * normed_bytes);
        attended = room.take<unsigned char>(input_bytes<W>(s.rows, s.q_width()));
        gated = room.take<unsigned char>(input_bytes<W>(s.rows, s.inner));
        queries = room.take<C>(queried * padded);
        int64_t elements = largest(s, s.qkv(), s.hidden, 0);
        elements = largest(s, s.hidden, s.q_width(), elements);
        elements = largest(s, 2 * s.inner, s.hidden, elements);
        elements = largest(s, s.hidden, s.inner, elements);
        slices = room.take<float>(elements);
        partial = room.take<float>(chunks * queried * padded);
        stats = room.take<float>(chunks * queried * 2);
    }
};

template <class W> inline Slices multiplied(const void* packed, int64_t rows, const Matrix<W>& m, float* slices) {
    product<W>(packed, rows, m, slices);
    return {slices, num_slices<W>(m.outputs, m.inputs), rows, m.outputs};
}

// One layer for the rows of a stretch, whose norm has been packed: leaves x as it is after attention, and returns what
// is to be added to it.
template <int D, class W, class C>
inline Slices layer_rows(const Shape& s, const Plan& plan, const Dealt& dealt, int64_t first, const Layer<W>& layer,
                         const float* cosine, const float* sine, float eps, C* cache, const Scratch<W, C>& room) {
    void* normed = room.normed + first / dealt.stretch * room.normed_bytes;
    float* x = room.x + first * s.hidden;
    Attention a = {};
    a.plan = plan.from(first);
    a.tiles = dealt.tiles + first / dealt.stretch * dealt.most * 4;
    a.queries = room.queries, a.cache = cache;
    a.rows = s.rows, a.max_length = s.max_length;
    a.heads = (int)s.heads, a.kv_heads = (int)s.kv_heads, a.head_dim = (int)s.head_dim;
    a.chunks = (int)((dealt.keys + CHUNK_KEYS - 1) / CHUNK_KEYS), a.whole = dealt.whole;
    a.partial = room.partial, a.stats = room.stats, a.out = room.attended;

    Slices sums = multiplied(normed, s.rows, layer.qkv(s), room.slices);
    launch(rope_kernel<D, W, C>, dim3(s.rows, (s.heads + 2 * s.kv_heads + 3) / 4), dim3(128), 0, sums, a, cosine, sine,
           room.queries, cache);
    attention<D, W, C>(a, dealt.most, dealt.parts);
    Norm second = {};
    second.from = second.to = x, second.weight = layer.norms + s.hidden, second.eps = eps;
    second.added = multiplied(room.attended, s.rows, layer.o(s), room.slices);
    second.width = s.hidden, second.packed = normed;
    norm<W>(second, s.rows);
    sums = multiplied(normed, s.rows, layer.gate_up(s), room.slices);
    launch(gate_kernel<W>, dim3((padded_inputs<W>(s.inner) / 2 + 127) / 128, s.rows), dim3(128), 0, sums, s.inner,
           room.gated);
    return multiplied(room.gated, s.rows, layer.down(s), room.slices);
}

// Calls of(stretch's shape, its first row) for stretches of rows, one after the other.
template <class Of> inline void stretch_by_stretch(Shape s, int64_t stretch, Of of) {
    const int64_t rows = s.rows;
    for (int64_t first = 0; first < rows; first += stretch) {
        s.rows = rows - first < stretch ? rows - first : stretch;
        of(s, first);
    }
}

// The shape of the largest stretch.
inline Shape largest_stretch(Shape s, const Dealt& dealt) {
    if (s.rows > dealt.stretch) s.rows = dealt.stretch;
    return s;
}

// ---- a pass ----

template <class E>
__global__ void embed_kernel(const int32_t* token_ids, const E* embedding, int64_t vocab, int64_t hidden, float* x) {
    const int64_t row = blockIdx.x, id = token_ids[row];
    if (id < 0 || id >= vocab) return fail("a token is not in the vocabulary");
    for (int64_t d = threadIdx.x; d < hidden; d += blockDim.x) {
        if constexpr (std::is_same<E, float>::value) x[row * hidden + d] = embedding[id * hidden + d];
        else x[row * hidden + d] = half_to_float(embedding[id * hidden + d]);
    }
}

// hidden: (rows, hidden), taken: (wanted, rows, hidden), logits: (logit_rows, vocab), chosen: their largest's index and
// best its value.
template <int D, class W, class E, class C>
inline void decoder_pass(const Shape& all, const Plan& plan, const Dealt& dealt, const Ends<E>& ends,
                         const std::vector<Layer<W>>& layers, const float* cosine, const float* sine, float eps,
                         C* cache, int64_t cache_stride, Workspace work, float* hidden, float* taken, float* logits,
                         int32_t* chosen) {
    const int64_t quiet = all.rows - ends.logit_rows;  // rows without logits
    Scratch<W, C> room(work, largest_stretch(all, dealt), all.rows, D, dealt);
    unsigned char* scored = work.take<unsigned char>(input_bytes<E>(ends.logit_rows, all.hidden));
    const Matrix<E> head = {ends.lm_head, nullptr, ends.vocab, all.hidden};
    const int64_t scored_rows = ends.logit_rows < dealt.stretch ? ends.logit_rows : dealt.stretch;
    const int64_t split = num_slices<E>(ends.vocab, all.hidden);
    float* parts = work.take<float>(split > 1 ? split * scored_rows * ends.vocab : 0);
    float* best = work.take<float>(ends.logit_rows);
    if (!work.spent()) throw std::runtime_error("a decoder pass got too much scratch");

    // The norm before layer i, or the final one: x takes up what the layer before has left.
    auto settle = [&](const Shape& s, int64_t first, size_t i, Slices added) {
        Norm a = {};
        a.from = a.to = room.x + first * s.hidden, a.added = added, a.eps = eps, a.width = s.hidden;
        a.place = ends.wanted + i, a.taken = taken, a.taken_rows = all.rows, a.first_row = first;
        if (i < layers.size()) {
            a.weight = layers[i].norms;
            a.packed = room.normed + first / dealt.stretch * room.normed_bytes;
            return norm<W>(a, s.rows);
        }
        a.weight = ends.norm, a.normed = hidden + first * s.hidden;
        // Row 0 of `scored` is the pass's row `quiet`, which may be before or after this stretch.
        a.packed = ends.logit_rows ? scored : nullptr, a.first_packed = quiet - first;
        norm<E>(a, s.rows);
    };
    stretch_by_stretch(all, dealt.stretch, [&](const Shape& s, int64_t first) {
        launch(embed_kernel<E>, dim3(s.rows), dim3(128), 0, ends.token_ids + first, ends.embedding, ends.vocab,
               s.hidden, room.x + first * s.hidden);
        settle(s, first, 0, {});
    });
    for (size_t i = 0; i < layers.size(); i++)
        stretch_by_stretch(all, dealt.stretch, [&](const Shape& s, int64_t first) {
            settle(s, first, i + 1, layer_rows<D>(s, plan, dealt, first, layers[i], cosine, sine, eps,
                                                  cache + i * cache_stride, room));
        });
    if (!ends.logit_rows) return;
    Shape rows = all;
    rows.rows = ends.logit_rows;
    stretch_by_stretch(rows, dealt.stretch, [&](const Shape& s, int64_t first) {
        float* out = logits + first * ends.vocab;
        product<E>(scored + first / dealt.stretch * input_bytes<E>(dealt.stretch, s.hidden), s.rows, head,
                   split > 1 ? parts : out);
        if (split > 1)
            launch(collect_kernel, dim3((s.rows * ends.vocab + 255) / 256), dim3(256), 0, (const float*)parts, split,
                   s.rows, ends.vocab, out);
    });
    top_k(logits, ends.logit_rows, ends.vocab, 1, best, chosen);
}

// ---- cache rows ----

constexpr int MOVED_AT_ONCE = 8;

// A thread for 16 bytes of a plane's rows. No row is a target before it has been a source, so several may be read
// before the first of them is written.
__global__ void keep_rows_kernel(uint4* cache, int64_t planes, int64_t max_length, int64_t vectors,
                                 const int32_t* sources, const int32_t* targets, int64_t count) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= planes * vectors) return;
    uint4* plane = cache + i / vectors * max_length * vectors + i % vectors;
    for (int64_t first = 0; first < count; first += MOVED_AT_ONCE) {
        uint4 held[MOVED_AT_ONCE];
#pragma unroll
        for (int n = 0; n < MOVED_AT_ONCE; n++)
            if (first + n < count) held[n] = plane[sources[first + n] * vectors];
#pragma unroll
        for (int n = 0; n < MOVED_AT_ONCE; n++)
            if (first + n < count) plane[targets[first + n] * vectors] = held[n];
    }
}

// Moves rows from `sources` to `targets`, in this order, for every plane (layer, key or value, head) of the cache.
template <class C>
inline void keep_rows(C* cache, int64_t planes, int64_t max_length, int64_t padded, const int32_t* sources,
                      const int32_t* targets, int64_t count) {
    const int64_t vectors = padded * sizeof(C) / 16;
    launch(keep_rows_kernel, dim3((planes * vectors + 127) / 128), dim3(128), 0, (uint4*)cache, planes, max_length,
           vectors, sources, targets, count);
}

}  // namespace gorgon
