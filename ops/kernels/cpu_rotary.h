// The rotary embedding on the CPU.
#pragma once

namespace gorgon {

// Rotate (x_i, x_{i + d/2}) by an angle per row and i; back for direction -1. x, out: (rows, heads, d).
static inline void rotary(const float* x, int64_t rows, int64_t heads, int64_t d, const float* cosine,
                          const float* sine, float direction, float* out) {
    int64_t half = d / 2;
#pragma omp parallel for if (rows * heads * d > 1 << 14)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads; h++) {
            const float *low = x + (r * heads + h) * d, *high = low + half;
            float *out_low = out + (r * heads + h) * d, *out_high = out_low + half;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float c = cosine[r * half + i], s = direction * sine[r * half + i];
                out_low[i] = low[i] * c - high[i] * s;
                out_high[i] = high[i] * c + low[i] * s;
            }
        }
}

}  // namespace gorgon
