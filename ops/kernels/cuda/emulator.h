// The names of device.h on the CPU, so that a CUDA kernel can be tested where there is no GPU.
//
// A block runs at a time. Each of its threads is a fiber with a stack of its own, which runs until it waits for others:
// at a barrier, a shuffle or an mma. GORGON_EMULATOR_ORDER=descending lets the last thread go first; a kernel whose
// result then differs lacks a barrier. Asynchronous copies then arrive at once, otherwise no sooner than they are
// waited for, so that a copy which is read too early shows, and one which comes before the last reader has done. Shared
// memory is filled with NaN before each block and has a guard after it. Not shown: speed, memory beyond the arrays,
// races between blocks, alignment but that of asynchronous copies and load_once.
#pragma once
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__F16C__)
#include <immintrin.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define GORGON_SHARED(T, name) T* name = (T*)gorgon::emulator::block().shared.data()

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace gorgon {

constexpr unsigned ALL_LANES = 0xffffffffu;

// ---- fibers ----

namespace emulator {

constexpr size_t STACK_BYTES = 64 << 10, GUARD_BYTES = 4096;

#if defined(__x86_64__)
// Saves the registers that a call keeps, exchanges the stacks, takes the others up again.
extern "C" void gorgon_exchange_stacks(void** from, void* to);
asm(R"(
    .text
    .weak gorgon_exchange_stacks
    .hidden gorgon_exchange_stacks
    .type gorgon_exchange_stacks, @function
gorgon_exchange_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
struct Context {
    void* stack_pointer = nullptr;
    void prepare(std::vector<unsigned char>& stack, void (*entry)()) {
        uintptr_t top = ((uintptr_t)stack.data() + stack.size()) & ~(uintptr_t)63;
        void** p = (void**)(top - 64);  // at the entry the stack is as after a call: 8 bytes off a multiple of 16
        *--p = nullptr;
        *--p = (void*)entry;
        for (int i = 0; i < 6; i++) *--p = nullptr;
        stack_pointer = p;
    }
    void exchange(Context& to) { gorgon_exchange_stacks(&stack_pointer, to.stack_pointer); }
};
#else
struct Context {
    ucontext_t context;
    void prepare(std::vector<unsigned char>& stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack.data();
        context.uc_stack.ss_size = stack.size();
        makecontext(&context, entry, 0);
    }
    void exchange(Context& to) { swapcontext(&context, &to.context); }
};
#endif

struct Meeting {  // a barrier: `alive` threads come, then `round` goes up
    int alive = 0, here = 0;
    uint64_t round = 0;
    void leave() {
        alive--;
        if (alive && here == alive) go();
    }
    void go() {
        here = 0;
        round++;
    }
};

struct Copy { void* to; const void* from; };

struct Fiber {
    Context context;
    std::vector<unsigned char> stack = std::vector<unsigned char>(STACK_BYTES);
    std::deque<std::vector<Copy>> copies;
    std::vector<Copy> open;
    Meeting* waits = nullptr;
    uint64_t round = 0;
    bool done = false;
    dim3 index;
};

struct Warp {
    Meeting meeting;
    uint64_t value[32];
    float a[16][16], b[16][8];
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Meeting meeting;
    std::vector<unsigned char> shared;
    Context scheduler;
    std::function<void()> body;
    size_t current = 0;
    std::string failure;
    bool copies_at_once = false;

    Fiber& fiber() { return fibers[current]; }
    Warp& warp() { return warps[current / 32]; }
    int lane() const { return (int)(current % 32); }
    void yield() { fiber().context.exchange(scheduler); }
    void meet(Meeting& at) {
        if (++at.here == at.alive) return at.go();
        fiber().waits = &at;
        fiber().round = at.round;
        yield();
    }
};
static inline Block& block() {
    static Block* held = new Block;  // never freed: kernels may run while the process ends
    return *held;
}

static void entry() {
    Block& b = block();
    try {
        b.body();
    } catch (const std::exception& error) {
        b.failure = error.what();
    }
    b.fiber().done = true;
    b.warp().meeting.leave();
    b.meeting.leave();
    b.yield();
}

static inline void run_block(size_t shared_bytes, bool descending) {
    Block& b = block();
    size_t count = b.fibers.size();
    b.shared.assign(shared_bytes + GUARD_BYTES, 0xff);
    b.warps.assign((count + 31) / 32, Warp());
    b.meeting = Meeting();
    b.meeting.alive = (int)count;
    for (size_t i = 0; i < count; i++) {
        Fiber& f = b.fibers[i];
        f.context.prepare(f.stack, entry);
        f.copies.clear();
        f.open.clear();
        f.waits = nullptr;
        f.done = false;
        f.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
        b.warps[i / 32].meeting.alive++;
    }
    for (size_t left = count; left;) {
        bool moved = false;
        for (size_t n = 0; n < count; n++) {
            b.current = descending ? count - 1 - n : n;
            Fiber& f = b.fiber();
            if (f.done || (f.waits && f.waits->round == f.round)) continue;
            f.waits = nullptr;
            threadIdx = f.index;
            b.scheduler.exchange(f.context);
            moved = true;
            left -= f.done;
        }
        if (!b.failure.empty()) throw std::runtime_error(std::exchange(b.failure, ""));
        if (!moved) throw std::runtime_error("emulated kernel: threads wait at different barriers");
    }
    for (size_t i = shared_bytes; i < b.shared.size(); i++)
        if (b.shared[i] != 0xff) throw std::runtime_error("emulated kernel: a write past the shared memory");
}

static inline uint64_t exchange_lanes(uint64_t value, int lane) {
    Block& b = block();
    Warp& w = b.warp();
    w.value[b.lane()] = value;
    b.meet(w.meeting);
    uint64_t got = w.value[lane & 31];
    b.meet(w.meeting);
    return got;
}

}  // namespace emulator

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... arguments) {
    const char* order = getenv("GORGON_EMULATOR_ORDER");
    bool descending = order && !strcmp(order, "descending");
    size_t threads = (size_t)block.x * block.y * block.z;
    if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
        throw std::runtime_error("emulated kernel: a grid or block that no GPU takes");
    if (shared > 227 * 1024) throw std::runtime_error("emulated kernel: more shared memory than a GPU has");
    emulator::Block& b = emulator::block();
    if (b.fibers.size() != threads) b.fibers = std::vector<emulator::Fiber>(threads);
    b.copies_at_once = descending;
    gridDim = grid;
    blockDim = block;
    b.body = [&] { kernel((P)arguments...); };
    size_t blocks = (size_t)grid.x * grid.y * grid.z;
    for (size_t n = 0; n < blocks; n++) {
        size_t i = descending ? blocks - 1 - n : n;
        blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        emulator::run_block(shared, descending);
    }
}

// ---- the host's ----

class Stopwatch {
    std::chrono::steady_clock::time_point begin, end;

public:
    void start() { begin = std::chrono::steady_clock::now(); }
    void stop() { end = std::chrono::steady_clock::now(); }
    double seconds() const { return std::chrono::duration<double>(end - begin).count(); }
};

static inline int64_t multiprocessors() { return 2; }
static inline int64_t cache_bytes() { return 1 << 20; }

// ---- halves ----

static inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    _Float16 x;
    memcpy(&x, &h, 2);
    return x;
#endif
}
static inline uint16_t float_to_half(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, 0);
#else
    _Float16 h = (_Float16)x;
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return bits;
#endif
}
static inline uint32_t pack_halves(float low, float high) {
    return (uint32_t)float_to_half(low) | (uint32_t)float_to_half(high) << 16;
}
static inline void halves_of_bytes(uint32_t four, uint32_t& low, uint32_t& high) {
    low = pack_halves((int8_t)four, (int8_t)(four >> 8));
    high = pack_halves((int8_t)(four >> 16), (int8_t)(four >> 24));
}
[[noreturn]] static inline void fail(const char* message) { throw std::runtime_error(message); }
// Through memory: with fast arithmetic the compiler would divide several by one reciprocal, or vectorise exp, in one
// kernel and not in another, and bits would differ where they do not on a GPU.
static inline float divide(float a, float b) {
    volatile float by = b;
    return a / by;
}
static inline float exponential(float x) {
    volatile float of = x;
    return expf(of);
}

// ---- memory ----

static inline void check_aligned(const void* p) {
    if ((uintptr_t)p % 16) throw std::runtime_error("emulated kernel: 16 bytes at an address that is no multiple of 16");
}
static inline uint4 load_once(const uint4* p) {
    check_aligned(p);
    return *p;
}
static inline void prefetch(const void*) {}
static inline void copy_async(void* shared, const void* global) {
    check_aligned(shared);
    check_aligned(global);
    if (emulator::block().copies_at_once) memcpy(shared, global, 16);
    else emulator::block().fiber().open.push_back({shared, global});
}
static inline void copies_commit() {
    emulator::Fiber& f = emulator::block().fiber();
    f.copies.push_back(std::move(f.open));
    f.open.clear();
}
template <int N> static inline void copies_wait() {
    auto& copies = emulator::block().fiber().copies;
    for (; copies.size() > N; copies.pop_front())
        for (auto& copy : copies.front()) memcpy(copy.to, copy.from, 16);
}

// ---- a warp's work together ----

static inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::Block& block = emulator::block();
    emulator::Warp& w = block.warp();
    int g = block.lane() / 4, t = block.lane() % 4;
    for (int i = 0; i < 2; i++)
        for (int part = 0; part < 4; part++)
            w.a[g + part % 2 * 8][2 * t + i + part / 2 * 8] = half_to_float((uint16_t)(a[part] >> 16 * i));
    for (int i = 0; i < 2; i++)
        for (int part = 0; part < 2; part++) w.b[2 * t + i + part * 8][g] = half_to_float((uint16_t)(b[part] >> 16 * i));
    block.meet(w.meeting);
    for (int i = 0; i < 4; i++) {
        float sum = d[i];
        for (int k = 0; k < 16; k++) sum = fmaf(w.a[g + i / 2 * 8][k], w.b[k][2 * t + i % 2], sum);
        d[i] = sum;
    }
    block.meet(w.meeting);
}

}  // namespace gorgon

static inline void __syncthreads() { gorgon::emulator::block().meet(gorgon::emulator::block().meeting); }
static inline void __syncwarp(unsigned = 0xffffffffu) {
    gorgon::emulator::block().meet(gorgon::emulator::block().warp().meeting);
}
template <class T> static inline T gorgon_exchange(T value, int lane) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a value of 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = gorgon::emulator::exchange_lanes(bits, lane);
    memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T> static inline T __shfl_sync(unsigned, T value, int lane) { return gorgon_exchange(value, lane); }
template <class T> static inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return gorgon_exchange(value, gorgon::emulator::block().lane() ^ mask);
}
static inline unsigned __ballot_sync(unsigned, int predicate) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; lane++) bits |= (unsigned)(gorgon_exchange(predicate != 0, lane)) << lane;
    return bits;
}
template <class T> static inline T __ldg(const T* p) { return *p; }
static inline float __int_as_float(int i) { float x; memcpy(&x, &i, 4); return x; }
