// Products of few rows with frozen weights: halves, float32, int8 with a scale per output, NF4 with one per 64 inputs.
//
// A warp takes a tile of 16 outputs for all rows of its block, up to 64 (float32: 32), so that a weight is read from
// memory once. The rows are in shared memory, a chunk of inputs at a time; the weights go straight to registers, many
// loads of 16 bytes in flight, because memory is what a product of few rows waits for. The inputs are split into
// slices, so that a narrow matrix, too, keeps all multiprocessors busy; how many follows from the matrix alone.
//
// Halves, int8 and NF4 go through tensor cores, with rows rounded to halves and sums in float32. int8 are exact as
// halves; an NF4 value is rounded to a half, and its scale, in float32, multiplies the sum of its 64 inputs. float32
// weights and rows stay what they are: one chain of multiply-adds over a slice's inputs.
//
// Row invariance: the order of a sum follows from the matrix alone, and a column of an mma does not know the others.
// Rows past the last are computed from arbitrary data and not stored.
#pragma once

namespace gorgon {

constexpr int TILE_OUTPUTS = 16, TILE_ROWS = 8, PRODUCT_WARPS = 8, PRODUCT_THREADS = 32 * PRODUCT_WARPS;
constexpr int64_t PRODUCT_BLOCKS = 264;  // two for each of 132 multiprocessors; any GPU splits sums as this one does
constexpr int64_t MOST_SLICES = 16, LEAST_STEPS = 4;  // of a slice: 256 inputs

// How weights of type W are packed: the type of a scale and that of a row's elements; inputs are rounded up to `step`.
// A warp loads `piece` inputs of a tile at once, so many `vectors` of 16 bytes a lane, with `ahead` pieces in flight.
template <class S, class I, int P, int V, int A> struct PackedAs {
    typedef S scale;
    typedef I input;
    static constexpr int step = 64, piece = P, vectors = V, ahead = A;
};
template <class W> struct Packing;
template <> struct Packing<uint16_t> : PackedAs<float, uint16_t, 32, 2, 4> {};
template <> struct Packing<int8_t> : PackedAs<float, uint16_t, 32, 1, 8> {};
template <> struct Packing<uint8_t> : PackedAs<uint16_t, uint16_t, 64, 1, 4> {};  // NF4, two codes a byte
template <> struct Packing<float> : PackedAs<float, float, 8, 2, 4> {};
template <class W> constexpr bool is_float = std::is_same<W, float>::value;
template <class W> constexpr bool is_int8 = std::is_same<W, int8_t>::value;
template <class W> constexpr bool is_nf4 = std::is_same<W, uint8_t>::value;

__host__ __device__ inline int64_t tiles_of(int64_t outputs) { return (outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS; }
__host__ __device__ inline int64_t steps_of(int64_t inputs) { return (inputs + 63) / 64; }

// A packed matrix of `outputs` x `inputs`, as ops/packing/tiles.py makes it; scale is not read where there is none.
template <class W> struct Matrix {
    const W* w;
    const typename Packing<W>::scale* scale;
    int64_t outputs, inputs;

    // How many elements of W, and scales, it takes.
    int64_t size() const { return padded() * steps_of(inputs) * Packing<W>::step / (is_nf4<W> ? 2 : 1); }
    int64_t scales() const { return is_int8<W> ? padded() : is_nf4<W> ? padded() * steps_of(inputs) : 0; }
    int64_t padded() const { return tiles_of(outputs) * TILE_OUTPUTS; }
    // The next matrix in memory.
    Matrix after(int64_t next_outputs, int64_t next_inputs) const {
        return {w + size(), scale + scales(), next_outputs, next_inputs};
    }
};

// What a layer's matrices measure.
struct LayerSizes {
    int64_t hidden, heads, kv_heads, head_dim, inner;
    int64_t q_width() const { return heads * head_dim; }
    int64_t qkv() const { return (heads + 2 * kv_heads) * head_dim; }
};

// The weights of a layer, concatenated: queries, keys and values; output; gate, then up; down. scales likewise.
// S: LayerSizes, or what else has hidden, inner, qkv() and q_width().
template <class W> struct Layer {
    const float* norms;  // (2, hidden)
    const W* w;
    const typename Packing<W>::scale* scales;

    template <class S> Matrix<W> qkv(const S& s) const { return {w, scales, s.qkv(), s.hidden}; }
    template <class S> Matrix<W> o(const S& s) const { return qkv(s).after(s.hidden, s.q_width()); }
    template <class S> Matrix<W> gate_up(const S& s) const { return o(s).after(2 * s.inner, s.hidden); }
    template <class S> Matrix<W> down(const S& s) const { return gate_up(s).after(s.hidden, s.inner); }
};

// ---- rows: (blocks of 8, inputs, 8) for float32 weights, the fragments of an mma's second factor for the others ----

template <class W> __host__ __device__ inline int64_t padded_inputs(int64_t inputs) {
    return steps_of(inputs) * Packing<W>::step;
}

// Bytes of packed rows; a multiple of 16.
template <class W> inline int64_t input_bytes(int64_t rows, int64_t inputs) {
    int64_t padded = (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    return padded * padded_inputs<W>(inputs) * sizeof(typename Packing<W>::input);
}

// The place of an element of a row. k and k + 1 are adjacent if k is even and W is not float.
template <class W> __device__ inline int64_t input_position(int64_t inputs, int64_t row, int64_t k) {
    int64_t block = row / TILE_ROWS * padded_inputs<W>(inputs), r = row % TILE_ROWS;
    if (is_float<W>) return (block + k) * TILE_ROWS + r;
    int64_t lane = r * 4 + k % 8 / 2;
    return block * TILE_ROWS + (k / 32 * 32 + lane) * 8 + k % 32 / 8 * 2 + k % 2;
}

__device__ inline uint32_t clamped_half(float x) {
    return float_to_half(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
}

// Writes one element. Every k below padded_inputs has to be written, 0 from `inputs` on; rows beyond the last need not.
template <class W> __device__ inline void put_input(void* packed, int64_t inputs, int64_t row, int64_t k, float value) {
    int64_t at = input_position<W>(inputs, row, k);
    if constexpr (is_float<W>) ((float*)packed)[at] = value;
    else ((uint16_t*)packed)[at] = (uint16_t)clamped_half(value);
}

// Writes elements k and k + 1, k even: for halves one store of four bytes.
template <class W>
__device__ inline void put_inputs(void* packed, int64_t inputs, int64_t row, int64_t k, float first, float second) {
    if constexpr (is_float<W>) {
        put_input<W>(packed, inputs, row, k, first);
        put_input<W>(packed, inputs, row, k + 1, second);
    } else {
        int64_t at = input_position<W>(inputs, row, k);
        ((uint32_t*)packed)[at / 2] = clamped_half(first) | clamped_half(second) << 16;
    }
}

template <class W> __global__ void pack_rows_kernel(const float* x, int64_t rows, int64_t inputs, void* packed) {
    int64_t pairs = padded_inputs<W>(inputs) / 2, i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * pairs) return;
    int64_t row = i / pairs, k = i % pairs * 2;
    const float* from = x + row * inputs;
    put_inputs<W>(packed, inputs, row, k, k < inputs ? from[k] : 0.0f, k + 1 < inputs ? from[k + 1] : 0.0f);
}

// x (rows, inputs) float32 -> packed.
template <class W> inline void pack_rows(const float* x, int64_t rows, int64_t inputs, void* packed) {
    dim3 grid((rows * padded_inputs<W>(inputs) / 2 + 255) / 256);
    launch(pack_rows_kernel<W>, grid, dim3(256), 0, x, rows, inputs, packed);
}

// ---- weights ----

// The values of NF4 as halves, four in each word; ops.packing.quantize.NF4.
__device__ inline uint32_t nf4_half(uint32_t code) {
    uint64_t four = code < 4 ? 0xb652b833b992bc00ull : code < 8 ? 0x0000add4b1eab48dull
                  : code < 12 ? 0x356833e031262d18ull : 0x3c0039c93880370dull;
    return (uint32_t)(four >> code % 4 * 16) & 0xffff;
}

// The place of a weight among a matrix's elements, or of its code among the NF4 codes. For an mma's first factor a
// lane's 8 weights of 16 inputs follow each other, and those of as many tiles as make 16 bytes.
template <class W> __device__ inline int64_t weight_position(int64_t inputs, int64_t output, int64_t k) {
    int64_t tile = output / TILE_OUTPUTS * padded_inputs<W>(inputs), r = output % TILE_OUTPUTS;
    if (is_float<W>) return tile * TILE_OUTPUTS + (k / 4 * TILE_OUTPUTS + r) * 4 + k % 4;
    constexpr int together = is_nf4<W> ? 4 : is_int8<W> ? 2 : 1;
    int64_t lane = r % 8 * 4 + k % 8 / 2, item = (r / 8 + k % 16 / 8 * 2) * 2 + k % 2;
    return tile * TILE_OUTPUTS + ((k / 16 / together * 32 + lane) * together + k / 16 % together) * 8 + item;
}

// Scales of NF4: (tiles, steps, 8, 2), outputs g and g + 8 of a tile adjacent, as a lane reads them.
__device__ inline int64_t scale_position(int64_t inputs, int64_t output, int64_t k) {
    int64_t r = output % TILE_OUTPUTS;
    return (output / TILE_OUTPUTS * steps_of(inputs) + k / 64) * TILE_OUTPUTS + r % 8 * 2 + r / 8;
}

template <class W> __device__ inline float weight_of(const Matrix<W>& m, int64_t output, int64_t k) {
    int64_t at = weight_position<W>(m.inputs, output, k);
    if constexpr (is_float<W>) return m.w[at];
    else if constexpr (is_int8<W>) return (float)m.w[at] * m.scale[output];
    else if constexpr (is_nf4<W>)
        return half_to_float((uint16_t)nf4_half(m.w[at / 2] >> at % 2 * 4 & 15)) *
               half_to_float(m.scale[scale_position(m.inputs, output, k)]);
    else return half_to_float(m.w[at]);
}

template <class W> __global__ void unpack_kernel(Matrix<W> m, int64_t first, int64_t count, float* out) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count * m.inputs) out[i] = weight_of(m, first + i / m.inputs, i % m.inputs);
}

// out (count, inputs) float32: the weights that a product computes with, of `count` outputs from `first` on.
template <class W> inline void unpack(Matrix<W> m, int64_t first, int64_t count, float* out) {
    launch(unpack_kernel<W>, dim3((count * m.inputs + 255) / 256), dim3(256), 0, m, first, count, out);
}

// ---- products ----

// Of out (rows, outputs), the sum over slices; the same as ops.packing.tiles.num_slices.
template <class W> inline int64_t num_slices(int64_t outputs, int64_t inputs) {
    int64_t across = (tiles_of(outputs) + PRODUCT_WARPS - 1) / PRODUCT_WARPS, most = steps_of(inputs) / LEAST_STEPS;
    int64_t slices = PRODUCT_BLOCKS / across;
    slices = slices < MOST_SLICES ? slices : MOST_SLICES;
    slices = slices < most ? slices : most;
    return slices > 1 ? slices : 1;
}

// In shared memory: for NF4 a table, and twice the rows of a chunk of so many steps.
template <class W, int R> struct Staging {
    static constexpr int steps = (R == 8 ? 4 : 16 / R) / (is_float<W> ? 2 : 1);
    static constexpr int step_bytes = Packing<W>::step * TILE_ROWS * sizeof(typename Packing<W>::input);
    static constexpr int table_bytes = is_nf4<W> ? 256 * 32 * 4 : 0;
    static constexpr int bytes = table_bytes + 2 * R * steps * step_bytes;
};
template <class W> struct Piece {  // what a lane holds of a tile's inputs
    uint4 v[Packing<W>::vectors];
    uint32_t scales;  // NF4: of two outputs
};

// A byte of two NF4 codes as two halves: a copy for each lane, so that no two lanes want the same bank. By all threads.
__device__ inline void fill_table(unsigned char* table) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;  // a warp makes 32 entries, one a lane
    uint32_t byte = threadIdx.x, entry = nf4_half(byte & 15) | nf4_half(byte >> 4) << 16;
    for (int i = 0; i < 8; i++) {
        uint32_t x = __shfl_sync(ALL_LANES, entry, i * 4 + lane / 8);
        ((uint4*)table)[(warp * 32 + i * 4) * 8 + lane] = make_uint4(x, x, x, x);
    }
}

// acc += weights of a piece times R blocks of 8 rows. rows: the chunk's first block at the piece's inputs; `apart`:
// bytes from one block to the next.
template <class W, int R>
__device__ inline void multiply(const Piece<W>& w, const unsigned char* rows, int apart, const unsigned char* table,
                                float (&acc)[R][4]) {
    const int lane = threadIdx.x % 32;
    if constexpr (is_float<W>) {  // a lane: one output, four of eight rows
        const unsigned char* mine = rows + lane / 16 * 16;
        const unsigned eight[] = {w.v[0].x, w.v[0].y, w.v[0].z, w.v[0].w, w.v[1].x, w.v[1].y, w.v[1].z, w.v[1].w};
#pragma unroll
        for (int k = 0; k < 8; k++)
#pragma unroll
            for (int b = 0; b < R; b++) {
                float weight = __int_as_float((int)eight[k]);
                float4 x = *(const float4*)(mine + b * apart + k * TILE_ROWS * 4);
                acc[b][0] = fmaf(weight, x.x, acc[b][0]);
                acc[b][1] = fmaf(weight, x.y, acc[b][1]);
                acc[b][2] = fmaf(weight, x.z, acc[b][2]);
                acc[b][3] = fmaf(weight, x.w, acc[b][3]);
            }
    } else {
        constexpr int TILES = Packing<W>::piece / 16;
        uint32_t a[TILES][4];
        const uint32_t words[] = {w.v[0].x, w.v[0].y, w.v[0].z, w.v[0].w};
        if constexpr (is_nf4<W>) {
#pragma unroll
            for (int i = 0; i < 16; i++) {  // a byte times the 128 bytes of its copies
                uint32_t shifted = i % 4 ? words[i / 4] >> (i % 4 * 8 - 7) : words[i / 4] << 7;
                a[i / 4][i % 4] = *(const uint32_t*)(table + (shifted & 0x7f80 | lane * 4));
            }
        } else if constexpr (is_int8<W>) {
#pragma unroll
            for (int i = 0; i < 4; i++) halves_of_bytes(words[i], a[i / 2][i % 2 * 2], a[i / 2][i % 2 * 2 + 1]);
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++) a[i][0] = w.v[i].x, a[i][1] = w.v[i].y, a[i][2] = w.v[i].z, a[i][3] = w.v[i].w;
        }
        // Some blocks of rows side by side: an mma that adds to what the one before it has made would wait for it.
        constexpr int BESIDE = R < 4 ? R : is_nf4<W> ? 2 : 4;
#pragma unroll
        for (int first = 0; first < R; first += BESIDE) {
            float group[BESIDE][4] = {};  // NF4: sums before their scale
#pragma unroll
            for (int i = 0; i < TILES; i += 2) {
                uint4 x[BESIDE];
#pragma unroll
                for (int b = 0; b < BESIDE; b++)
                    x[b] = *(const uint4*)(rows + (first + b) * apart + (i * 16 + lane) * 16);
#pragma unroll
                for (int b = 0; b < BESIDE; b++) {
                    uint32_t of[2] = {x[b].x, x[b].y};
                    mma(is_nf4<W> ? group[b] : acc[first + b], a[i], of);
                }
#pragma unroll
                for (int b = 0; b < BESIDE; b++) {
                    uint32_t of[2] = {x[b].z, x[b].w};
                    mma(is_nf4<W> ? group[b] : acc[first + b], a[i + 1], of);
                }
            }
            if constexpr (is_nf4<W>) {
                float low = half_to_float((uint16_t)w.scales), high = half_to_float((uint16_t)(w.scales >> 16));
#pragma unroll
                for (int b = 0; b < BESIDE; b++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        acc[first + b][i] = fmaf(i < 2 ? low : high, group[b][i], acc[first + b][i]);
            }
        }
    }
}

// Grid: R blocks of rows, 8 tiles, slices. Blocks with the same weights follow each other, to share the L2 cache.
template <class W, int R>
__global__ void __launch_bounds__(PRODUCT_THREADS, 2)
    product_kernel(const unsigned char* packed, int rows, Matrix<W> m, int num_slices, float* slices) {
    constexpr int CHUNK = Staging<W, R>::steps, BYTES = Staging<W, R>::step_bytes;
    constexpr int PIECES = Packing<W>::step / Packing<W>::piece, VECTORS = Packing<W>::vectors;
    constexpr int AHEAD = Packing<W>::ahead / (R == 8 && is_nf4<W> ? 2 : 1);  // with more the registers spill
    constexpr int LANES_APART = is_float<W> ? 16 : 32;                        // that read different weights
    static_assert(CHUNK * PIECES % AHEAD == 0, "what is in flight divides a chunk");
    GORGON_SHARED(unsigned char, shared);
    unsigned char* staged = shared + Staging<W, R>::table_bytes;
    const int lane = threadIdx.x % 32;
    const int tile = blockIdx.y * PRODUCT_WARPS + threadIdx.x / 32, steps = (int)steps_of(m.inputs);
    const int first = steps * blockIdx.z / num_slices, count = steps * (blockIdx.z + 1) / num_slices - first;
    const int first_block = blockIdx.x * R, blocks = (rows + TILE_ROWS - 1) / TILE_ROWS - first_block;
    const int pieces = tile < tiles_of(m.outputs) ? count * PIECES : 0;
    const int64_t begin_of_tile = (int64_t)tile * steps + first;
    const uint4* source = (const uint4*)m.w + begin_of_tile * (PIECES * VECTORS * LANES_APART) + lane % LANES_APART;
    const uint32_t* scales = is_nf4<W> ? (const uint32_t*)m.scale + begin_of_tile * 8 + lane / 4 : nullptr;

    auto load = [&](Piece<W>& w, int piece) {
#pragma unroll
        for (int v = 0; v < VECTORS; v++) w.v[v] = load_once(source + (piece * VECTORS + v) * LANES_APART);
        if constexpr (is_nf4<W>) w.scales = __ldg(scales + piece * 8);
    };
    auto stage = [&](int chunk) {  // the rows of a chunk, where there are any
        const int begin = chunk * CHUNK, vectors = (count - begin < CHUNK ? count - begin : CHUNK) * (BYTES / 16);
#pragma unroll 2
        for (int b = 0; b < R; b++)
            if (b < blocks)
                for (int i = threadIdx.x; i < vectors; i += PRODUCT_THREADS)
                    copy_async(staged + ((chunk % 2 * R + b) * CHUNK) * BYTES + i * 16,
                               packed + ((int64_t)(first_block + b) * steps + first + begin) * BYTES + i * 16);
        copies_commit();
    };

    Piece<W> w[AHEAD];
    float acc[R][4] = {};
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (i < pieces) load(w[i], i);
    stage(0);
    if constexpr (is_nf4<W>) fill_table(shared);
    for (int chunk = 0; chunk * CHUNK < count; chunk++) {
        copies_wait<0>();
        __syncthreads();  // the chunk has come for all threads, and all have done with the one before it
        if ((chunk + 1) * CHUNK < count) stage(chunk + 1);
        const unsigned char* here = staged + chunk % 2 * R * CHUNK * BYTES;
        const int begin = chunk * CHUNK * PIECES;
        for (int p = 0; p < CHUNK * PIECES && begin + p < pieces; p += AHEAD)
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                if (begin + p + i >= pieces) break;
                if constexpr (R == 8) __syncwarp();  // or the compiler starts the next piece and runs out of registers
                multiply<W, R>(w[i], here + (p + i) * (BYTES / PIECES), CHUNK * BYTES, shared, acc);
                if (begin + p + i + AHEAD < pieces) load(w[i], begin + p + i + AHEAD);
            }
    }

#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int n = tile * TILE_OUTPUTS + (is_float<W> ? lane % 16 : lane / 4 + i / 2 * 8);
        if (n >= m.outputs) continue;
        const float scale = is_int8<W> ? (float)m.scale[n] : 1.0f;
#pragma unroll
        for (int b = 0; b < R; b++) {
            const int row = (first_block + b) * TILE_ROWS + (is_float<W> ? lane / 16 * 4 + i : lane % 4 * 2 + i % 2);
            if (row >= rows) continue;
            slices[((int64_t)blockIdx.z * rows + row) * m.outputs + n] = is_int8<W> ? acc[b][i] * scale : acc[b][i];
        }
    }
}

template <class W, int R>
inline void launch_product(const void* packed, int64_t rows, Matrix<W> m, float* slices) {
    int64_t across = (tiles_of(m.outputs) + PRODUCT_WARPS - 1) / PRODUCT_WARPS;
    int64_t split = num_slices<W>(m.outputs, m.inputs);
    dim3 grid((rows + R * TILE_ROWS - 1) / (R * TILE_ROWS), across, split);
    launch(product_kernel<W, R>, grid, dim3(PRODUCT_THREADS), Staging<W, R>::bytes, (const unsigned char*)packed,
           (int)rows, m, (int)split, slices);
}

// packed rows -> slices (num_slices, rows, outputs) float32.
template <class W> inline void product(const void* packed, int64_t rows, Matrix<W> m, float* slices) {
    int64_t blocks = (rows + TILE_ROWS - 1) / TILE_ROWS;
    if (blocks <= 1) launch_product<W, 1>(packed, rows, m, slices);
    else if (blocks <= 2) launch_product<W, 2>(packed, rows, m, slices);
    else if (blocks <= 4 || is_float<W>) launch_product<W, 4>(packed, rows, m, slices);
    else if constexpr (!is_float<W>) launch_product<W, 8>(packed, rows, m, slices);
}

// An element of the product: the slices' sum, in ascending order. num: num_slices of the matrix.
__device__ inline float collect(const float* slices, int64_t num, int64_t rows, int64_t outputs, int64_t row,
                                int64_t n) {
    float sum = slices[row * outputs + n];
#pragma unroll 4
    for (int64_t s = 1; s < num; s++) sum += slices[(s * rows + row) * outputs + n];
    return sum;
}

__global__ void collect_kernel(const float* slices, int64_t num, int64_t rows, int64_t outputs, float* out) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < rows * outputs) out[i] = collect(slices, num, rows, outputs, i / outputs, i % outputs);
}

// x (rows, inputs) float32 -> out (rows, outputs) float32. packed: input_bytes of scratch. slices: (num_slices, rows,
// outputs) of scratch, not touched where there is one slice.
template <class W>
inline void linear(const float* x, int64_t rows, Matrix<W> m, void* packed, float* slices, float* out) {
    int64_t split = num_slices<W>(m.outputs, m.inputs);
    pack_rows<W>(x, rows, m.inputs, packed);
    product<W>(packed, rows, m, split > 1 ? slices : out);
    dim3 grid((rows * m.outputs + 255) / 256);
    if (split > 1) launch(collect_kernel, grid, dim3(256), 0, (const float*)slices, split, rows, m.outputs, out);
}

}  // namespace gorgon
