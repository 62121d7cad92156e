// The arguments of a pass that both bodies share.
#pragma once

#ifdef __CUDACC__
#define GORGON_DEVICE __device__
#else
#define GORGON_DEVICE
#endif

namespace gorgon {

// One row of a pass. The keys it sees, in logical order: `contiguous` slots from `start`, then the row's extras.
struct Plan {
    const int32_t* meta;    // (rows, 4): position, slot, start, contiguous; all but start count from `base`
    const int32_t* extras;  // (rows, width): slots after base, -1 past the end
    int64_t width, base;
    Plan from(int64_t rows) const { return {meta + rows * 4, extras + rows * width, width, base}; }
    GORGON_DEVICE int64_t position(int64_t r) const { return base + meta[r * 4]; }
    GORGON_DEVICE int64_t slot(int64_t r) const { return base + meta[r * 4 + 1]; }
    GORGON_DEVICE int64_t start(int64_t r) const { return meta[r * 4 + 2]; }
    GORGON_DEVICE int64_t contiguous(int64_t r) const { return base + meta[r * 4 + 3]; }
    GORGON_DEVICE int64_t keys(int64_t r) const {
        int64_t more = 0;
        while (more < width && extras[r * width + more] >= 0) more++;
        return contiguous(r) + more;
    }
    GORGON_DEVICE int64_t key(int64_t r, int64_t j) const {  // the slot of the j-th key of a row
        return j < contiguous(r) ? start(r) + j : base + extras[r * width + j - contiguous(r)];
    }
};

// What goes around the layers. E: the type of the embedding and of the language-model head.
template <class E> struct Ends {
    const int32_t* token_ids;  // (rows,)
    const E* embedding;        // (vocab, hidden)
    const float* norm;         // (hidden,)
    const E* lm_head;          // packed
    int64_t vocab, logit_rows; // logits of the last `logit_rows` rows
    const int32_t* wanted;     // (layers + 1,): the place of the state before layer i in `taken`, -1 for none
};

}  // namespace gorgon
