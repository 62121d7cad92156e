"""An engine measurement on a terminal: a table per shape, then what the tables do not hold, one line each."""

from __future__ import annotations

import pandas as pd

from bench.record.engine import EngineRecord, Loop, Machine, Shape
from bench.tables.terminal import show_table


def show_engine(record: EngineRecord) -> None:
    """Print the tables and the lines."""
    for shape in record.shapes:
        title = f"{shape.name}, {shape.dtype}, {shape.weight_bytes / 1e6:.0f} MB of weights"
        show_table(title + (", fits in the cache" if shape.fits_in_cache else ""), pass_cells(shape))
    lines = machine_lines(record.machine, "threads" if record.device == "cpu" else "multiprocessors")
    for shape in record.shapes:
        lines += shape_lines(shape)
    print("\n".join(lines + (loop_lines(record.loop) if record.loop else [])))


def pass_cells(shape: Shape) -> pd.DataFrame:
    """The passes of a shape, a row each."""
    return pd.DataFrame(
        [
            {
                "rows": str(each.rows),
                "context": str(each.context),
                "ms": f"{each.ms:.3f}",
                "quartiles": f"{each.ms_low:.3f} to {each.ms_high:.3f}",
                "GB/s": f"{each.bytes / each.ms / 1e6:.1f}",
                "of memory": f"{100 * each.bandwidth_share:.0f}%",
                "GFLOP/s": f"{each.flops / each.ms / 1e6:.1f}",
                "of peak": f"{100 * each.peak_share:.0f}%",
                "roofline ms": f"{each.roofline_ms:.3f}",
            }
            for each in shape.passes
        ]
    )


def machine_lines(m: Machine, workers: str) -> list[str]:
    """What the machine allows."""
    cache = "" if m.cache_read_gb_s is None else f", {m.cache_read_gb_s:.1f} from the cache"
    lines = [
        f"machine, at best: reads {m.read_gb_s:.1f} GB/s{cache}, copies {m.copy_gb_s:.1f} GB/s, "
        f"multiplies {m.fma_gflop_s:.0f} GFLOP/s, {m.threads} {workers}"
    ]
    if m.mma_tflop_s is not None:
        lines.append(
            f"machine, at best: multiplies halves at {m.mma_tflop_s:.0f} TFLOP/s; a launch takes the host "
            f"{m.launch_host_us:.1f} us, the device {m.launch_device_us:.1f} us"
        )
    return lines


def shape_lines(shape: Shape) -> list[str]:
    """Bounds, products, launching, memory and the peer of one shape."""
    memory, peer, matrix, bounds = shape.memory, shape.transformers, shape.largest_matrix, shape.bounds
    products = ", ".join(f"{each.rows}: {each.ms:.3f}" for each in shape.linear)
    lines = [
        f"meanwhile the memory gave {bounds.read_gb_s:.1f} GB/s and the multiply-adds {bounds.fma_gflop_s:.0f} GFLOP/s",
        f"{matrix.name} {matrix.num_out} x {matrix.num_in}, ms by rows: {products}",
        *floor_lines(shape),
    ]
    for each in shape.host:
        lines.append(
            f"{each.rows} rows: the call returns after {each.call.ms:.3f} ms, queued passes take {each.queued.ms:.3f} "
            f"ms each: the host is {'hidden' if each.hidden else 'the slower one'}, {100 * each.share:.1f}% of a lone "
            "pass waits for it"
        )
    if memory.ratio is not None:
        total = (memory.weight_bytes + memory.cache_bytes) / 1e6
        text = f"memory grew by {memory.ratio:.2f} of weights and cache ({total:.0f} MB)"
        if memory.host_growth_bytes is not None:
            text += f" on the device, on the host by {memory.host_growth_bytes / 1e6:.0f} MB"
        lines.append(text)
    if peer:
        unit = "token" if peer.what == "generate" else "pass of one row"
        lines.append(
            f"{peer.ours.ms:.3f} ms per {unit}, transformers in {peer.dtype} {peer.theirs.ms:.3f}: "
            f"{peer.speedup:.2f} times"
        )
    return [f"{shape.name}: {line}" for line in lines]


def floor_lines(shape: Shape) -> list[str]:
    """By context: a one-row pass over the time of reading its bytes once, and the most rows over one."""
    lines = []
    for context in sorted({each.context for each in shape.passes}):
        found = {each.rows: each for each in shape.passes if each.context == context}
        if 1 not in found:
            continue
        one, most = found[1], max(found)
        text = f"after {context} rows, one row takes {1 / one.bandwidth_share:.2f} of reading its bytes once"
        lines.append(text + (f", {most} rows {found[most].ms / one.ms:.2f} of one" if most > 1 else ""))
    return lines


def loop_lines(loop: Loop) -> list[str]:
    """The decoding loop."""
    lines = [f"loop: a pass with nothing to compute takes {loop.empty_pass.ms:.3f} ms"]
    for stage in (loop.autoregressive, loop.tree):
        lines.append(
            f"loop, {stage.nodes} node(s): {stage.step_ms:.3f} ms per step, {stage.outside_ms:.3f} outside the kernels "
            f"(host {stage.host_ms:.3f}, accept {stage.accept_ms:.3f}, cache {stage.cache_ms:.3f}); the stages miss "
            f"{stage.wall_gap_percent:.2f}% of the wall clock"
        )
    if loop.soak:
        soak = loop.soak
        sizes = ", ".join(f"{size / 1e6:.1f}" for size in (soak.start_bytes, soak.middle_bytes, soak.end_bytes))
        lines.append(f"soak: {soak.steps} steps, {soak.texts} texts; MB at start, middle and end: {sizes}")
    return lines
