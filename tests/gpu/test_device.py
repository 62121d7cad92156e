"""What is special about a GPU: where weights and caches lie, that they stay there, and that its numbers are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import runtime
from backbone.tokenizer import EMBEDDED, load_tokenizer
from bench.clock.memory import rss
from bench.measure.attempts import Setup
from bench.measure.warmup import loaded_kernels, warm_up
from decoding.generate import first_difference, generate, generate_autoregressive
from decoding.tree import Tree, default_tree
from heads.checkpoint import load_head
from heads.registry import build
from runtime import jt, synchronize
from tests.gpu.cpu_training import train
from tests.small import draw_weights, save_hugging_face, small_backbone, small_config

ROOT = Path(__file__).resolve().parents[2]
TREE = default_tree(16, 2)
MEBI = 1 << 20
# Of logits, as a share of their standard deviation: the cache holds halves, and CUDA's bodies multiply halves with an
# input that is rounded to halves. Seen: 1.6e-2 on the CPU and emulated, 2e-5 in float32.
TOLERANCE = {"float16": 4e-2, "float32": 1e-3}
# Of a loss of 0.4 to 5.7: halves through the frozen backbone, sums in another order. Seen: 3e-3 after 20 steps.
LOSS_TOLERANCE = 2e-2
TRAINED_HEADS = ("mlp", "gated_rnn")


def address(var) -> int:
    """The address of a Var's elements, as kernels see it. ``Var.raw_ptr`` would move them to the host."""
    place = jt.code(
        (1,),
        "int64",
        [var],
        cpu_src="*(long long*)out0_p = (long long)in0_p;",
        cuda_header="__global__ static void gorgon_place(long long* place, const void* at) { *place = (long long)at; }",
        cuda_src="gorgon_place<<<1, 1>>>((long long*)out0_p, (const void*)in0_p);",
    )
    return int(place.numpy()[0])


def held_vars(*objects) -> dict[str, object]:
    """name -> Var of everything that objects hold in attributes, lists and dictionaries, however deep."""
    found, seen = {}, set()

    def walk(name, value):
        if isinstance(value, jt.Var):
            found[name] = value
        elif isinstance(value, dict):
            for key, each in value.items():
                walk(f"{name}.{key}", each)
        elif isinstance(value, (list, tuple)):
            for index, each in enumerate(value):
                walk(f"{name}.{index}", each)
        elif hasattr(value, "__dict__") and not isinstance(value, type) and id(value) not in seen:
            seen.add(id(value))
            walk(name, dict(vars(value)))

    for each in objects:
        walk(type(each).__name__, each)
    return found


def make_head(name, backbone):
    """An untrained head that drafts two tokens."""
    head = build(name, {} if name == "prompt_lookup" else {"num_depths": 2}, backbone)
    head.eval()
    return head


def in_both(backbone, head, prompt, new_tokens, cache):
    """(autoregressive text, the tree's text, passes of both together)."""
    baseline = generate_autoregressive(backbone, prompt, max_new_tokens=new_tokens, cache=cache)
    tree = Tree.chain(4) if not head.trained else TREE
    ours = generate(backbone, head, prompt, tree, max_new_tokens=new_tokens, cache=cache)
    return baseline.token_ids, ours.token_ids, baseline.num_passes + ours.num_passes


# Numbers -------------------------------------------------------------------------------------------------------------


def torch_logits(place, tokens, dtype, directory):
    """What transformers computes in float32 on the CPU, of weights in ``dtype``. tokens: (1, rows) -> (rows, vocab)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if place.name != "gpu":
        config = small_config()
        rounded = {name: w.astype(dtype).astype(np.float32) for name, w in draw_weights(config).items()}
        save_hugging_face(directory, config, rounded)
    path = EMBEDDED if place.name == "gpu" else directory
    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(tokens.astype(np.int64))).logits[0].numpy()


def distance(ours, theirs) -> float:
    """The largest difference as a share of the standard deviation."""
    return float(np.abs(ours - theirs).max() / theirs.std())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_logits_are_those_of_transformers_on_the_cpu(place, tokens, dtype, tmp_path):
    backbone = place.load(dtype)
    ids = tokens(backbone, 40)
    theirs = torch_logits(place, ids, dtype, tmp_path / "model")
    assert distance(backbone.forward(ids).logits.numpy()[0], theirs) < TOLERANCE[dtype]
    cache = backbone.new_cache(64)  # the same, a part of it after a cache
    backbone.forward(ids[:, :33], cache=cache, logits=None)
    cache.commit(np.arange(33))
    after = backbone.forward(ids[:, 33:], cache=cache).logits.numpy()[0]
    assert distance(after, theirs[33:]) < TOLERANCE[dtype]
    assert distance(after, theirs[32:-1]) > 0.5  # the control: one row off


def test_a_row_s_bits_do_not_depend_on_the_rows_beside_it(place, tokens):
    backbone = place.load("float16")
    ids = tokens(backbone, 24)
    cache = backbone.new_cache(64)
    whole = backbone.forward(ids, cache=cache).logits.numpy()[0]
    alone = []
    for row in range(ids.shape[1]):
        alone.append(backbone.forward(ids[:, row : row + 1], cache=cache).logits.numpy()[0, 0])
        cache.commit([0])
    np.testing.assert_array_equal(np.stack(alone), whole)


@pytest.mark.parametrize("name", ["prompt_lookup", "mlp", "eagle"])
def test_a_tree_gives_the_autoregressive_text(place, name):
    backbone = place.load("float16")
    head, cache = make_head(name, backbone), backbone.new_cache(backbone.config.max_positions)
    for number, prompt in enumerate(place.prompts):
        baseline, ours, _ = in_both(backbone, head, prompt, place.new_tokens, cache)
        where = first_difference(baseline, ours)
        assert where is None, f"prompt {number} differs from token {where} on"


@pytest.mark.parametrize("name", TRAINED_HEADS)
def test_training_gives_the_losses_of_the_cpu_and_a_checkpoint_that_decodes(place, name, tmp_path):
    steps = 20 if place.name == "gpu" else 6
    backbone = small_backbone("float16")
    head, losses = train(backbone, name, steps, tmp_path / "here")
    command = [sys.executable, "-m", "tests.gpu.cpu_training", name, str(steps), str(tmp_path / "cpu")]
    environment = {**os.environ, "GORGON_DEVICE": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert not done.returncode, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert len(losses) == len(theirs) == steps
    np.testing.assert_allclose(losses, theirs, rtol=0, atol=LOSS_TOLERANCE)
    falls = sum(theirs[0]) - sum(theirs[-1])
    assert sum(losses[-1]) < sum(losses[0]) - falls / 2 and falls > 5 * LOSS_TOLERANCE  # steps out of order would show
    trained, _ = load_head(tmp_path / "here" / "checkpoint", backbone)
    for ours, saved in zip(head.parameters(), trained.parameters(), strict=True):
        np.testing.assert_array_equal(ours.numpy(), saved.numpy())
    cache = backbone.new_cache(64)
    prompt = [(3 + i) % 61 + 3 for i in range(9)]
    baseline, ours, _ = in_both(backbone, trained, prompt, 12, cache)
    assert ours == baseline


# Where things lie ----------------------------------------------------------------------------------------------------


def test_weights_and_cache_stay_where_the_kernels_are(place):
    backbone = place.load("float16")
    head, cache = make_head("mlp", backbone), backbone.new_cache(backbone.config.max_positions)
    in_both(backbone, head, place.prompts[0], place.new_tokens, cache)
    held = held_vars(backbone, cache.data, dict(head.named_parameters()))
    assert len(held) > 8
    fixed = [cache.data, backbone.lm_head.packed, *[block.packed for block in backbone.blocks]]
    before = [address(var) for var in fixed]
    assert {name: var.location() for name, var in held.items()} == dict.fromkeys(held, place.location)
    in_both(backbone, head, place.prompts[-1], place.new_tokens, cache)
    synchronize()
    assert {name: var.location() for name, var in held.items()} == dict.fromkeys(held, place.location)
    assert [address(var) for var in fixed] == before
    if place.name == "gpu":  # the control: what a careless read does is seen
        backbone.norm.data  # noqa: B018
        assert backbone.norm.location() == "cpu"


def device_or_host_bytes() -> int:
    """What Jittor holds of the memory that kernels use."""
    jt.gc()
    info = jt.get_mem_info()
    return info.total_cuda_used if runtime.device == "cuda" else info.total_cpu_used


def test_memory_is_constant_and_nothing_is_compiled_after_the_warm_up(place):
    backbone = place.load("float16")
    head, cache = make_head("mlp", backbone), backbone.new_cache(backbone.config.max_positions)
    warm_up(Setup(backbone, load_tokenizer(), cache, place.new_tokens, head=head, tree=TREE))
    for prompt in place.prompts[:2]:
        in_both(backbone, head, prompt, place.new_tokens, cache)
    kernels, held, host, done, turn = loaded_kernels(), device_or_host_bytes(), rss(), 0, 0
    while done < place.steps:
        done += in_both(backbone, head, place.prompts[turn % 2], place.new_tokens, cache)[2]
        turn += 1
    assert loaded_kernels() == kernels
    assert device_or_host_bytes() - held <= MEBI
    assert rss() - host <= 32 * MEBI


def test_the_check_of_the_memory_notices_what_is_kept(place):
    kept, held = [], device_or_host_bytes()
    for _ in range(held // (4 * MEBI) + 2):  # what Jittor holds for later is taken up first
        kept.append(jt.ones((MEBI,)))
        kept[-1].sync(True)
        if device_or_host_bytes() - held > MEBI:
            return
    pytest.fail("more was kept than was held before, and it did not show")
