"""The measurement of an engine: its parts on a GPU in emulation, its command line, and the file that it leaves."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from backbone.cache import KVCache
from bench import engine
from bench.clock import machine, passes, shapes
from bench.clock.footprint import describe_memory, pass_calls
from bench.clock.passes import (
    Work,
    cache_rows,
    describe_host,
    fill,
    fitting_contexts,
    host_calls,
)
from bench.clock.shapes import SHAPES, cache_bytes, pass_bytes, pass_flops, weight_bytes
from bench.record.engine import EngineRecord
from ops.kernel import emulated_cuda
from runtime.entry import run_entry
from tests.small import small_config


def test_a_filled_cache_has_keys_in_every_row_and_padding_stays_zero():
    config = small_config()
    cache = KVCache(config, 10, "float16")
    assert not cache.data.numpy().any()
    fill(cache, config)
    rows = cache.data.numpy()
    assert (np.abs(rows[..., : config.head_dim]).max(-1) > 0).all() and not rows[..., config.head_dim :].any()


def test_a_cache_has_room_for_the_longest_context_and_its_rows():
    work = Work([1, 64], None, 1, "float16", 8)
    assert fitting_contexts(SHAPES["7b"], work) == [128, 1024, 3968] and cache_rows(SHAPES["7b"], work) == 4096
    assert fitting_contexts(SHAPES["110m"], work) == [128, 512, 1024] and cache_rows(SHAPES["110m"], work) == 1152
    short = dataclasses.replace(work, contexts=[5, 200])
    assert fitting_contexts(small_config(), short) == [5] and cache_rows(small_config(), short) == 128


# A GPU ---------------------------------------------------------------------------------------------------------------


def test_the_free_memory_is_the_device_s_where_there_is_one(monkeypatch):
    def answer(free, total):
        free._obj.value, total._obj.value = 7_000, 9_000
        return status[0]

    status = [0]
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: SimpleNamespace(cuMemGetInfo_v2=answer))
    assert machine.free_memory() > 9_000  # this process runs on the CPU
    assert machine.free_device_memory() == 7_000
    status[0] = 201
    with pytest.raises(OSError, match="CUresult 201"):
        machine.free_device_memory()


def host_seconds(lone, call, queued):
    return {("pass", 4, 9): [lone], ("host", 4): [call], ("queued", 4): [queued], "machine": [0.1]}


@pytest.mark.parametrize(
    ("lone", "call", "queued", "hidden", "share"),
    [(5e-3, 1e-3, 4.5e-3, True, 0.1), (5e-3, 5e-3, 5e-3, False, 1.0), (5e-3, 1e-3, 5.1e-3, True, 0.0)],
)
def test_the_host_s_share_of_a_pass_is_what_the_device_waits_for(lone, call, queued, hidden, share):
    (found,) = describe_host(host_seconds(lone, call, queued), context=9)
    assert (found.rows, found.context, found.hidden) == (4, 9, hidden)
    assert found.share == pytest.approx(share) and found.queued.ms == pytest.approx(1e3 * queued)
    assert describe_host({("pass", 4, 9): [lone], "machine": [1.0]}, 9) == []  # on the CPU there is none


def test_the_memory_of_a_backbone_counts_from_before_it_was_built():
    config = small_config()
    found = describe_memory(config, "float16", 100, before=1_000_000, peak=5_000_000, after=4_000_000, where="device")
    held = weight_bytes(config, "float16") + cache_bytes(config, "float16", 100)
    assert (found.where, found.growth_bytes, found.ratio) == ("device", 4_000_000, 4_000_000 / held)
    unknown = describe_memory(config, "float16", 100, before=1_000_000, peak=None, after=4_000_000)
    assert (unknown.growth_bytes, unknown.ratio, unknown.where) == (None, None, "host")


def test_random_weights_made_on_the_device_give_passes_that_are_finite():
    """The shapes as a GPU builds and times them, emulated at a small size."""
    config, dtype = small_config(), "float16"
    with emulated_cuda():
        backbone = shapes.build_backbone("small", config, dtype)
        cache = backbone.new_cache(20)
        fill(cache, config)
        logits = [call().numpy() for call in pass_calls(backbone, cache, [1, 3], [9]).values()]
        assert [each.shape for each in logits] == [(1, 1, 64), (1, 3, 64)]
        assert all(np.isfinite(each).all() and each.std() > 0.1 for each in logits)
        calls = host_calls(backbone, cache, [1, 3], 9)
        assert list(calls) == [("host", 1), ("queued", 1), ("host", 3), ("queued", 3)]
        assert all(call() > 0 for call in calls.values())
        held = [backbone.embedding, backbone.lm_head.packed, *[block.packed for block in backbone.blocks]]
        assert {str(each.dtype) for each in held} == {dtype}
        other = shapes.build_backbone("small", config, dtype)
        np.testing.assert_array_equal(other.blocks[1].packed.numpy(), backbone.blocks[1].packed.numpy())


def test_the_parts_of_an_engine_that_a_gpu_runs_make_a_valid_record(small_shape, tmp_path, monkeypatch, capsys):
    """The branch for GPUs, in emulation: only the device's name and the driver's answers are made up."""
    monkeypatch.setattr(passes.runtime, "device", "cuda", raising=False)
    monkeypatch.setattr(passes, "free_memory", lambda: 10**10)
    monkeypatch.setattr(passes, "Readings", StandInReadings)
    with emulated_cuda():
        run_small(tmp_path / "engine.json", "--no-loop")
    record = EngineRecord.read(tmp_path / "engine.json")
    (shape,) = record.shapes
    assert shape.memory.where == "device" and shape.transformers is None
    assert [(each.rows, each.context) for each in shape.host] == [(1, 5), (3, 5)]
    assert any("transformers is measured on the CPU only" in note for note in record.notes)
    out = capsys.readouterr().out
    assert "small: after 5 rows, one row takes" in out and "3 rows" in out
    assert "of a lone pass waits for it" in out and "on the device, on the host by" in out


class StandInReadings(machine.Readings):
    """Bandwidths of a made-up device, which would take long to measure in emulation."""

    def __init__(self):
        self.cache_bytes, self._memory, self._small = None, None, None
        self.rows = []

    def sample(self):
        speeds = dict.fromkeys(("read_gb_s", "copy_gb_s", "fma_gflop_s", "mma_tflop_s"), 1000.0)
        self.rows.append({**speeds, "launch_host_us": 4.0, "launch_device_us": 2.0})


def test_the_readings_of_a_device_are_its_own(monkeypatch):
    """Emulated, so the figures mean nothing; the test is that they are taken and stored in the right places."""
    with emulated_cuda():
        readings = machine.Readings(machine.Load(buffer=1 << 12, cache_sweeps=2, fma=2, mma=2))
        readings.sample()
        found, most = readings.bounds(), machine.best([readings])
    assert most.threads >= 1 and min(found.read_gb_s, found.fma_gflop_s, found.mma_tflop_s, most.copy_gb_s) > 0
    assert most.launch_host_us >= 0 and most.launch_device_us >= 0
    assert (
        found.peak_gflop_s("float16") == 1e3 * found.mma_tflop_s and found.peak_gflop_s("float32") == found.fma_gflop_s
    )
    on_cpu = found.model_copy(update={"mma_tflop_s": None})
    assert on_cpu.peak_gflop_s("float16") == found.fma_gflop_s


# The command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1.1g"], r"Unknown shape '1.1g'. Did you mean '1.1b'\? Available: 1.1b, 110m, 7b, tiny-vicuna"),
        (["--rows", "0,4"], "--rows must be at least 1, got 0"),
        (["--rows", "1,two"], "--rows takes whole numbers separated by commas, such as 1,2,4; got '1,two'"),
        (["--steps", "5", "--no-loop"], "--steps is part of the decoding loop"),
        (["--plot", "picture.gif"], "a plot ends in"),
        (["--shape", "tiny-vicuna", "--contexts", "500"], "none of the contexts .500. leaves room for 64 rows"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("bench.clock.passes.time_shape", lambda *a: pytest.fail("measured anyway"))
    assert run_entry(engine.main, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        engine.main(arguments)


def test_memory_is_checked_before_anything_is_built(monkeypatch):
    monkeypatch.setattr("bench.clock.passes.free_memory", lambda: 10**9)
    monkeypatch.setattr("bench.clock.passes.time_shape", lambda *a: pytest.fail("measured anyway"))
    with pytest.raises(ValueError, match=r"shape 1\.1b in float16 needs"):
        engine.main(["--shape", "110m", "1.1b", "--no-loop"])


@pytest.fixture
def small_shape(monkeypatch):
    """The shape "small": the random backbone of the other tests."""
    monkeypatch.setitem(SHAPES, "small", small_config())


def run_small(path, *more):
    arguments = ["--shape", "small", "--rows", "1,3", "--contexts", "5,40,200", "--repeats", "2", "--out", str(path)]
    assert run_entry(engine.main, [*arguments, *more]) == 0


def test_a_run_leaves_a_valid_file_a_plot_and_the_same_json(small_shape, tmp_path, capsys):
    path, plot = tmp_path / "deep" / "engine.json", tmp_path / "engine.png"
    run_small(path, "--no-transformers", "--plot", str(plot), "--tokens", "6", "--steps", "20")
    record = EngineRecord.read(path)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == json.loads(path.read_text())
    assert plot.read_bytes().startswith(b"\x89PNG")
    (shape,) = record.shapes
    assert [(each.context, each.rows) for each in shape.passes] == [(5, 1), (5, 3), (40, 1), (40, 3)]
    assert any("contexts [200] left out" in note for note in record.notes)
    for each in shape.passes:
        assert each.flops == pass_flops(small_config(), each.rows, each.context)
        assert each.bytes == pass_bytes(small_config(), "float16", each.rows, each.context)
        assert 0 < each.ms_low <= each.ms <= each.ms_high
        assert each.bandwidth_share == pytest.approx(each.bytes / each.ms / 1e6 / shape.bounds.read_gb_s)
    assert [each.rows for each in shape.linear] == [1, 3] and shape.largest_matrix.name == "gate_up"
    assert shape.fits_in_cache in (True, None) and shape.transformers is None
    assert shape.memory.late_kernels in (0, None) and record.loop.late_kernels in (0, None)
    assert record.loop.soak.steps >= 20 and record.loop.tree.nodes == 16
    assert record.loop.autoregressive.tokens == record.loop.tree.tokens == 6
    assert abs(record.loop.tree.wall_gap_percent) < 50  # the stages make up most of the clock, however busy it is here
    with pytest.raises(ValueError, match="shapes"):
        EngineRecord.parse({**json.loads(path.read_text()), "shapes": [{"name": "small"}]})
