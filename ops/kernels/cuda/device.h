// What kernels are written with, on a GPU: CUDA itself and a few names for what it has no portable word for. The same
// names, emulated on the CPU: emulator.h. A kernel that keeps to both is the same text in both.
//
//   GORGON_SHARED(T, name)      the block's dynamic shared memory, as T*; no other shared memory is used
//   launch(kernel, grid, block, shared_bytes, arguments...)
//   half_to_float, float_to_half, pack_halves(low, high)      halves are uint16_t in memory, two in a uint32_t
//   load_once(const uint4*)     a load that leaves the first-level cache to others
//   prefetch(global)            fetches the 128 bytes around it into the second-level cache
//   copy_async(shared, global)  16 bytes; copies_commit(), copies_wait<N>(): all groups but the last N have come
//   mma(d, a, b)                d += a b of m16n8k16 in halves, sums in float32
//   halves_of_bytes(four, low, high)      four int8 as halves, the first two in low
//   fail(message)               ends the kernel over what the host could not look at, and with it all use of the device
//   divide, exponential         of float32, the same whatever the flags for fast arithmetic say
//   Stopwatch                   start(), stop(), seconds(): what the device took for the launches between; on the host
//   multiprocessors(), cache_bytes()     of the device, its second-level cache; on the host
#pragma once
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#define GORGON_SHARED(T, name)                                     \
    extern __shared__ __align__(128) unsigned char gorgon_shared[]; \
    T* name = (T*)gorgon_shared

namespace gorgon {

constexpr unsigned ALL_LANES = 0xffffffffu;

// Shared memory of a launch beyond 48 KB has to be requested by an attribute.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... arguments) {
    cudaError_t error = cudaSuccess;
    if (shared > 48 * 1024)
        error = cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (error == cudaSuccess) {
        kernel<<<grid, block, shared>>>((P)arguments...);
        error = cudaPeekAtLastError();
    }
    if (error != cudaSuccess) throw std::runtime_error(std::string("a kernel's launch failed: ") + cudaGetErrorString(error));
}

inline void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA failed: ") + cudaGetErrorString(error));
}

class Stopwatch {
    cudaEvent_t begin, end;

public:
    Stopwatch() { check(cudaEventCreate(&begin)), check(cudaEventCreate(&end)); }
    Stopwatch(const Stopwatch&) = delete;
    ~Stopwatch() { cudaEventDestroy(begin), cudaEventDestroy(end); }
    void start() { check(cudaEventRecord(begin)); }
    void stop() { check(cudaEventRecord(end)); }
    double seconds() {
        float milliseconds = 0;
        check(cudaEventSynchronize(end)), check(cudaEventElapsedTime(&milliseconds, begin, end));
        return milliseconds / 1e3;
    }
};

inline int64_t attribute(cudaDeviceAttr which) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device)), check(cudaDeviceGetAttribute(&value, which, device));
    return value;
}
inline int64_t multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
inline int64_t cache_bytes() { return attribute(cudaDevAttrL2CacheSize); }

__device__ inline float half_to_float(uint16_t h) { return __half2float(__ushort_as_half(h)); }
__device__ inline uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ inline uint32_t pack_halves(float low, float high) {
    return (uint32_t)float_to_half(low) | (uint32_t)float_to_half(high) << 16;
}

// 0x6400 + b is the half 1024 + b; made unsigned, a byte is 128 larger than it was.
__device__ inline void halves_of_bytes(uint32_t four, uint32_t& low, uint32_t& high) {
    const uint32_t moved = four ^ 0x80808080u;
    const __half2 offset = __half2half2(__ushort_as_half(0x6480));  // 1152
    uint32_t pairs[2] = {__byte_perm(moved, 0x64646464u, 0x4140), __byte_perm(moved, 0x64646464u, 0x4342)};
    __half2 first = __hsub2(*(__half2*)&pairs[0], offset), second = __hsub2(*(__half2*)&pairs[1], offset);
    low = *(uint32_t*)&first;
    high = *(uint32_t*)&second;
}

__device__ inline void fail(const char*) { __trap(); }  // only the emulator has a way to say the message
__device__ inline float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline float exponential(float x) { return __expf(x); }

__device__ inline uint4 load_once(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

__device__ inline void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
__device__ inline void copy_async(void* shared, const void* global) {
    unsigned target = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
}
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ inline void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Fragments of a lane, g = lane / 4, t = lane % 4 (PTX ISA, mma.m16n8k16): a holds rows g, g + 8, g, g + 8 of columns
// 2t (+1), 2t, 2t + 8, 2t + 8; b holds rows 2t (+1) and 2t + 8 of column g; d rows g, g, g + 8, g + 8 of columns 2t, 2t
// + 1.
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace gorgon
