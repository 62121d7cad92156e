"""The emulator runs what is right and notices what is wrong."""

import numpy as np
import pytest

from ops.kernel import cuda_header
from runtime import jt

KERNELS = """
namespace gorgon {
// out[i] = the sum of all lanes' x, by halves; then turned round through the block's shared memory.
__global__ void right(const float* x, float* out) {
    GORGON_SHARED(float, s);
    float sum = over_block<Sum>(x[threadIdx.x], s + blockDim.x);
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum + s[blockDim.x - 1 - threadIdx.x];
}
// The next thread's value, with no barrier in between.
__global__ void no_barrier(const float* x, float* out) {
    GORGON_SHARED(float, s);
    s[threadIdx.x] = x[threadIdx.x];
    out[threadIdx.x] = s[(threadIdx.x + 1) % blockDim.x];
}
__global__ void behind_the_end(const float* x, float* out) {
    GORGON_SHARED(float, s);
    s[threadIdx.x + 1] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x + 1];
}
__global__ void half_a_barrier(const float* x, float* out) {
    if (threadIdx.x % 2) __syncthreads();
    else __syncwarp();
    out[threadIdx.x] = x[threadIdx.x];
}
template <int LEFT> __global__ void copied(const float* x, float* out) {
    GORGON_SHARED(float, s);
    if (threadIdx.x < blockDim.x / 4) copy_async(s + 4 * threadIdx.x, x + 4 * threadIdx.x);
    copies_commit();
    copies_wait<LEFT>();
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x];
}
// A copy into what the others have yet to read.
__global__ void overwritten(const float* x, float* out) {
    GORGON_SHARED(float, s);
    s[threadIdx.x] = -x[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == blockDim.x - 1) copy_async(s, x);
    out[threadIdx.x] = s[threadIdx.x];
    __syncthreads();
    copies_commit();
    copies_wait<0>();
}
__global__ void misaligned(const float* x, float* out) {
    GORGON_SHARED(float, s);
    copy_async(s, x + 1);
    copies_commit();
    copies_wait<0>();
    out[threadIdx.x] = s[0];
}
// d (16, 8) = a (16, 16) b (16, 8), both in one array.
__global__ void product(const float* x, float* out) {
    const float *a = x, *b = x + 256;
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 4; i++) {
        const float* p = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
        fa[i] = pack_halves(p[0], p[1]);
    }
    for (int i = 0; i < 2; i++) fb[i] = pack_halves(b[(2 * t + i * 8) * 8 + g], b[(2 * t + 1 + i * 8) * 8 + g]);
    float d[4] = {};
    mma(d, fa, fb);
    for (int i = 0; i < 4; i++) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}
}
"""
NAMES = ["right", "no_barrier", "behind_the_end", "half_a_barrier", "copied<0>", "copied<1>", "overwritten"]
NAMES += ["misaligned", "product"]
CASES = "\n".join(
    f"case {i}: gorgon::launch(gorgon::{name}, dim3(blocks), dim3(threads), shared, in0_p, out0_p); break;"
    for i, name in enumerate(NAMES)
)


def run(name, x, blocks=1, threads=64, shared=4 * 64, count=None):
    numbers = {"which": NAMES.index(name), "blocks": blocks, "threads": threads, "shared": shared}
    return jt.code(
        (count or blocks * threads,),
        "float32",
        [jt.array(x)],
        cpu_header=cuda_header((), True) + KERNELS,
        cpu_src=f"""
        unsigned blocks = data["blocks"], threads = data["threads"];
        size_t shared = data["shared"];
        switch ((int)data["which"]) {{ {CASES} }}
        """,
        data=numbers,
    ).numpy()


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal(64).astype(np.float32)


@pytest.fixture(params=["ascending", "descending"])
def either_order(request, monkeypatch):
    monkeypatch.setenv("GORGON_EMULATOR_ORDER", request.param)


def test_threads_meet_at_barriers_and_exchange_values(either_order, x):
    got = run("right", x, blocks=3, shared=4 * 66).reshape(3, 64)
    np.testing.assert_allclose(got, np.broadcast_to(x.sum() + x[::-1], (3, 64)), atol=1e-5)


def test_a_missing_barrier_shows_in_the_order_of_threads(monkeypatch, x):
    monkeypatch.setenv("GORGON_EMULATOR_ORDER", "ascending")
    first = run("no_barrier", x)
    monkeypatch.setenv("GORGON_EMULATOR_ORDER", "descending")
    assert first.tobytes() != run("no_barrier", x).tobytes()


def test_a_write_behind_the_shared_memory_is_an_error(x):
    with pytest.raises(RuntimeError, match="a write past the shared memory"):
        run("behind_the_end", x)
    assert run("right", x, shared=4 * 66).shape == (64,)  # and the next launch is none the worse


def test_threads_at_different_barriers_are_an_error(x):
    with pytest.raises(RuntimeError, match="threads wait at different barriers"):
        run("half_a_barrier", x)


def test_a_copy_has_come_only_once_it_was_waited_for(x):
    np.testing.assert_array_equal(run("copied<0>", x), x)
    assert run("copied<1>", x).tobytes() != x.tobytes()


def test_a_copy_that_comes_before_the_last_reader_has_done_shows(monkeypatch, x):
    assert run("overwritten", x).tobytes() == (-x).tobytes()
    monkeypatch.setenv("GORGON_EMULATOR_ORDER", "descending")
    assert run("overwritten", x).tobytes() != (-x).tobytes()


def test_sixteen_bytes_at_a_wrong_address_are_an_error(x):
    with pytest.raises(RuntimeError, match="no multiple of 16"):
        run("misaligned", x)


@pytest.mark.parametrize(("threads", "shared"), [(2048, 256), (64, 300_000)])
def test_what_no_gpu_takes_is_refused(x, threads, shared):
    with pytest.raises(RuntimeError, match=r"no GPU takes|more shared memory than a GPU has"):
        run("right", x, threads=threads, shared=shared)


def test_mma_multiplies_halves(either_order):
    a, b = (np.random.default_rng(1).integers(-8, 8, shape).astype(np.float32) for shape in ((16, 16), (16, 8)))
    got = run("product", np.concatenate([a.ravel(), b.ravel()]), threads=32, count=128).reshape(16, 8)
    np.testing.assert_array_equal(got, a @ b)
