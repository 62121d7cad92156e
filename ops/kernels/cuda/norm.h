// What follows a product: its slices added up, with the residual, and the norm that the next product reads.
//
// linear.h comes first.
#pragma once

namespace gorgon {

// A product as it is left: (num, rows, outputs), to be added up.
struct Slices {
    const float* p;
    int64_t num, rows, outputs;
    __device__ float operator()(int64_t row, int64_t n) const { return collect(p, num, rows, outputs, row, n); }
    // Elements n and n + 1, in loads of 8 bytes where aligned; 0 past the last.
    __device__ float2 pair(int64_t row, int64_t n) const {
        if (n % 2 || outputs % 2) return make_float2((*this)(row, n), n + 1 < outputs ? (*this)(row, n + 1) : 0.0f);
        const float2* at = (const float2*)(p + row * outputs + n);
        float2 sum = *at;
#pragma unroll 4
        for (int64_t s = 1; s < num; s++) {
            const float2 next = at[s * rows * outputs / 2];
            sum.x += next.x, sum.y += next.y;
        }
        return sum;
    }
};

// Elements n and n + 1, n even, of a row of `width`; 0 past the last.
__device__ inline float2 load_pair(const float* row, int64_t n, int64_t width) {
    if (width % 2 == 0) return *(const float2*)(row + n);
    return make_float2(row[n], n + 1 < width ? row[n + 1] : 0.0f);
}
__device__ inline void store_pair(float* row, int64_t n, int64_t width, float2 y) {
    if (width % 2 == 0) {
        *(float2*)(row + n) = y;
    } else {
        row[n] = y.x;
        if (n + 1 < width) row[n + 1] = y.y;
    }
}

// ---- residual and norm: a block for a row ----

// x = from + added; out = x / sqrt(mean(x^2) + eps) * weight.
struct Norm {
    const float* from;     // (rows, width)
    Slices added;          // nothing where p is nullptr
    float* to;             // x; nullptr: nowhere, from is read twice
    const float* weight;   // nullptr: only x is computed
    float eps;
    int64_t width;
    float* normed;         // (rows, width) or nullptr
    void* packed;          // for a product, of rows from first_packed on; or nullptr
    int64_t first_packed;
    const int32_t* place;  // where x goes in `taken`, -1 for nowhere; or nullptr
    float* taken;
    int64_t taken_rows, first_row;  // of the whole pass
};

template <class W> __global__ void norm_kernel(Norm a) {
    GORGON_SHARED(float, shared);
    const int64_t row = blockIdx.x, at = row * a.width;
    const float* x = a.from + at;
    float* taken = nullptr;
    if (a.place && *a.place >= 0) taken = a.taken + (*a.place * a.taken_rows + a.first_row + row) * a.width;
    float squares = 0.0f;
    for (int64_t n = threadIdx.x * 2; n < a.width; n += blockDim.x * 2) {
        float2 y = load_pair(x, n, a.width);
        if (a.added.p) {
            const float2 more = a.added.pair(row, n);
            y.x += more.x, y.y += more.y;
        }
        if (a.to) store_pair(a.to + at, n, a.width, y);
        if (taken) store_pair(taken, n, a.width, y);
        squares = fmaf(y.y, y.y, fmaf(y.x, y.x, squares));
    }
    if (!a.weight) return;
    if (a.to) x = a.to + at;  // each thread reads what it wrote itself
    const float scale = divide(1.0f, sqrtf(over_block<Sum>(squares, shared) / (float)a.width + a.eps));
    const bool packs = a.packed && row >= a.first_packed;
    for (int64_t n = threadIdx.x * 2; n < padded_inputs<W>(a.width); n += blockDim.x * 2) {
        float2 y = make_float2(0.0f, 0.0f);
        if (n < a.width) {
            const float2 weight = load_pair(a.weight, n, a.width);
            y = load_pair(x, n, a.width);
            y = make_float2(y.x * scale * weight.x, y.y * scale * weight.y);
            if (a.normed) store_pair(a.normed + at, n, a.width, y);
        }
        if (packs) put_inputs<W>(a.packed, a.width, row - a.first_packed, n, y.x, y.y);
    }
}

template <class W> inline void norm(const Norm& a, int64_t rows) {
    int64_t warps = (a.width + 255) / 256;  // four pairs a thread
    if (warps > 32) warps = 32;
    launch(norm_kernel<W>, dim3(rows), dim3(32 * warps), warps * sizeof(float), a);
}

}  // namespace gorgon
