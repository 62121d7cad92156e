// A float32 matrix packed for the products of linear.h on the device: ops.packing.tiles.pack_tiles makes the same on
// the host.
#pragma once

namespace gorgon {

// A thread makes four inputs of an output, 16 bytes next to its neighbors'. A warp reads 32 bytes of each of
// 16 rows, whole sectors, so that nothing is fetched twice.
__global__ void pack_weight_kernel(const float* w, int64_t outputs, int64_t inputs, float4* packed) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, fours = padded_inputs<float>(inputs) / 4;
    if (i >= tiles_of(outputs) * TILE_OUTPUTS * fours) return;
    int64_t output = i / (TILE_OUTPUTS * fours) * TILE_OUTPUTS + i % TILE_OUTPUTS, k = i / TILE_OUTPUTS % fours * 4;
    const float* from = w + output * inputs + k;
    int64_t left = output < outputs ? inputs - k : 0;
    packed[i] = make_float4(left > 0 ? from[0] : 0.0f, left > 1 ? from[1] : 0.0f, left > 2 ? from[2] : 0.0f,
                            left > 3 ? from[3] : 0.0f);
}

// w (outputs, inputs) -> packed, as weight_position<float> has it, zeros where there is no weight.
inline void pack_weight(const float* w, int64_t outputs, int64_t inputs, float* packed) {
    int64_t pieces = tiles_of(outputs) * TILE_OUTPUTS * (padded_inputs<float>(inputs) / 4);
    launch(pack_weight_kernel, dim3((pieces + 255) / 256), dim3(256), 0, w, outputs, inputs, (float4*)packed);
}

}  // namespace gorgon
