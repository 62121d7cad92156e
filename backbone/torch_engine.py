"""The backbone computed by transformers in PyTorch; heads train and draft in Jittor.

For models that Jittor does not hold well, and as an independent check of our own engine. It has the interface of
``backbone.model.Backbone``; ``backbone.engines`` chooses between the two. The results of a pass stay in torch until
they are read.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from transformers import BitsAndBytesConfig, DynamicCache, LlamaForCausalLM, MistralForCausalLM
from transformers.utils.logging import disable_progress_bar

from backbone.cache import KVCache
from backbone.config import BackboneConfig, read_config
from backbone.files.layout import META, PICKLE, layouts
from backbone.model import DTYPES, EMBEDDED, Backbone
from backbone.weights import fingerprint, read_backbone
from ops.linear import PackedLinear
from ops.row_plan import RowPlan
from runtime import jt

MODELS = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM}
QUANTIZERS = ("bitsandbytes", "accelerate")
QUANTIZED = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
# Rows of a padded batch per real row. On a CPU, 12 conversations of 33 to 512 tokens took 3 times as long in one batch
# as one by one, 2 times under a block-diagonal mask, and no longer in batches of this bound.
MOST_PADDING = 1.2


class TorchBackbone(Backbone):
    """A frozen transformers model with weights in float16 or float32, or its layers in 8 or 4 bits (bitsandbytes).

    On the CPU all arithmetic is float32, also for weights in float16, which are rounded to it and held in float32
    (twice the memory): torch's own float16 arithmetic takes 3 to 4 times as long there, and rounds after each
    operation. So this engine and ours compute the same from the same weights, except for the order of sums and our
    float16 cache. On a GPU, arithmetic and cache are in the weights' type. In 8 and 4 bits the arithmetic is
    bitsandbytes'.

    ``fingerprint`` names the weights as read, as our engine's does: heads fit both. ``storage`` starts with "torch-":
    feature caches of the two are not mixed. A row is not bitwise what it is alone: torch sums in another order when the
    pass has other rows.
    """

    def __init__(self, path=None, dtype: str = "float16", load_in_8bit: bool = False, load_in_4bit: bool = False):
        """path: a Hugging Face directory, read without a network; None: the embedded tiny-vicuna.

        Raises ValueError as ``backbone.model.load_backbone`` does, and for 8 or 4 bits without bitsandbytes.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if load_in_8bit and load_in_4bit:
            raise ValueError("weights in 8 bits and in 4 bits exclude each other; choose one")
        storage = "int8" if load_in_8bit else "nf4" if load_in_4bit else dtype
        if storage != dtype:
            check_quantizers()
        directory = Path(path) if path else EMBEDDED
        if layouts(directory)[:1] in ([META], [PICKLE]):
            raise ValueError(
                f"--backbone-engine torch reads Hugging Face directories, and {directory} is not one; "
                f"convert it: python weight_convert.py {directory} --to safetensors --out DIR"
            )
        self.config, self.dtype, self.path = read_config(directory), dtype, str(path) if path else None
        self.storage = f"torch-{storage}"
        self.fingerprint = fingerprint(self.config, read_backbone(directory, self.config))
        self.device = choose_device()
        self.model = load_model(directory, self.config, dtype, storage, self.device)
        self._begin_rotary()

    @property
    def blocks(self):
        """Raises ValueError: the layers' matrices are not available to heads that change them."""
        raise ValueError(
            "--backbone-engine torch does not give its layers' matrices, which a head that adapts the backbone needs; "
            "use --backbone-engine jittor, or another head"
        )

    @functools.cached_property
    def embedding(self):
        """(vocab, dim) in Jittor: a copy for heads that embed tokens, made on first use."""
        return jt.array(self._matrix(self.model.model.embed_tokens)).stop_grad()

    @functools.cached_property
    def lm_head(self) -> PackedLinear:
        """The language-model head in Jittor: a copy for heads that borrow it, made on first use."""
        return PackedLinear(self._matrix(self.model.lm_head))

    def _matrix(self, module) -> np.ndarray:
        return module.weight.detach().to("cpu", getattr(torch, self.dtype)).numpy()

    def _make_cache(self, max_length: int) -> TorchCache:
        return TorchCache(max_length)

    @torch.inference_mode()
    def _run(self, token_ids, plan: RowPlan, cache, layers, logits) -> TorchOutput:
        if cache is not None and not isinstance(cache, TorchCache):
            raise ValueError(
                f"a pass of --backbone-engine torch needs a cache of its own, got a {type(cache).__name__}"
            )
        batch, rows = token_ids.shape
        ids = token_ids.numpy() if isinstance(token_ids, jt.Var) else np.asarray(token_ids)
        ids = torch.from_numpy(ids.astype(np.int64).reshape(1, -1)).to(self.device)
        shape = plan_shape(plan)
        if cache is None and shape.lengths is not None:
            states = self._run_sequences(ids[0], shape.lengths, layers)
        else:
            states = self._run_rows(ids, plan, shape, cache, layers)
        states = {index: state.reshape(batch, rows, -1) for index, state in states.items()}
        hidden = states.pop(None)
        scored = {"all": hidden, "last": hidden[:, rows - 1 :], None: None}[logits]
        return TorchOutput(hidden, states, None if scored is None else self.model.lm_head(scored))

    def _run_rows(self, ids, plan: RowPlan, shape: PlanShape, cache, layers) -> dict:
        """Rows after a cache, or a tree without one. ids: (1, rows). Returns states, (1, rows, dim)."""
        base = cache.length if cache is not None else 0
        positions = torch.from_numpy(plan.positions.astype(np.int64) + base)[None].to(self.device)
        # transformers makes the mask of a chain itself, where attention needs one.
        mask = None if shape.is_chain else shape.mask(base, self.model.dtype, self.device)
        past = {} if cache is None else {"past_key_values": cache.past(shape)}
        return self._states(layers, ids, position_ids=positions, attention_mask=mask, use_cache=bool(past), **past)

    def _run_sequences(self, ids, lengths: np.ndarray, layers) -> dict:
        """Causal sequences from position 0 in padded batches of about the same length; no row sees the padding, which
        comes after it. ids: (tokens,), end to end. Returns states, (tokens, dim)."""
        ends, found = np.cumsum(lengths), {}
        for group in similar(lengths):
            places = [torch.arange(ends[i] - lengths[i], ends[i], device=self.device) for i in group]
            batch = torch.nn.utils.rnn.pad_sequence([ids[place] for place in places], batch_first=True)
            longest = torch.arange(batch.shape[1], device=self.device)
            real = longest < torch.from_numpy(lengths[group]).to(self.device)[:, None]
            for index, state in self._states(layers, batch, use_cache=False).items():
                rows = found.setdefault(index, state.new_empty(len(ids), state.shape[-1]))
                rows[torch.cat(places)] = state[real]
        return found

    def _states(self, layers: Iterable[int], ids, **settings) -> dict:
        """Hidden states by index: 0 is the embedding, i the output of layer i, None the last one after the final norm.
        Each of the others is the input of the next module."""
        modules, found = [*self.model.model.layers, self.model.model.norm], {}
        with contextlib.ExitStack() as hooks:
            for index in sorted(set(layers)):

                def record(module, inputs, index=index):
                    found[index] = inputs[0]

                hooks.callback(modules[index].register_forward_pre_hook(record).remove)
            found[None] = self.model.model(ids, **settings).last_hidden_state
        return found


class TorchOutput:
    """A ``BackboneOutput`` whose parts are copied to Jittor, as float32, on first use.

    On the CPU that is one copy of a NumPy view of the tensor into a Var; from a GPU one more to the host, and where
    Jittor runs on a GPU too, one back. Greedy decoding reads ``chosen`` only, and a head the hidden states; the logits
    of a pass, its largest part, then stay in torch.
    """

    def __init__(self, hidden, states: dict, logits):
        """torch tensors. hidden: (batch, rows, dim); states: the same by layer index; logits: (batch, rows, vocab),
        (batch, 1, vocab) or None."""
        self._hidden, self._states, self._logits = hidden, states, logits

    @functools.cached_property
    def hidden(self):
        """(batch, rows, dim) float32, after the final norm."""
        return to_jittor(self._hidden)

    @functools.cached_property
    def layers(self) -> dict:
        """(batch, rows, dim) float32 by layer index, before any norm."""
        return {index: to_jittor(state) for index, state in self._states.items()}

    @functools.cached_property
    def logits(self):
        """(batch, rows, vocab) or (batch, 1, vocab) float32, or None."""
        return None if self._logits is None else to_jittor(self._logits)

    @functools.cached_property
    def chosen(self):
        """(batch, rows) or (batch, 1) int32, the argmax of each row of logits, the first of equals; None without."""
        return None if self._logits is None else jt.array(self._logits.argmax(-1).int().cpu().numpy())


class TorchCache(KVCache):
    """A ``KVCache`` around the DynamicCache of transformers, which each pass extends by a copy. Rows that were written
    and not committed are cropped when the next pass starts."""

    def __init__(self, max_length: int):
        self._begin(max_length)
        self.dynamic = DynamicCache()

    def past(self, shape: PlanShape) -> DynamicCache:
        """The rows of the sequence, for a pass that appends to them. Raises ValueError for a plan that does not."""
        shape.check_appends()
        surplus = self.dynamic.get_seq_length() - self.length
        assert surplus >= 0, (self.dynamic.get_seq_length(), self.length)
        self.dynamic.crop(-surplus)
        return self.dynamic

    @torch.inference_mode()
    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        sources, targets = (torch.from_numpy(np.asarray(each, np.int64)) for each in (sources, targets))
        for layer in self.dynamic.layers:
            for part in (layer.keys, layer.values):  # (1, kv_heads, rows, head_dim)
                part[:, :, targets.to(part.device)] = part[:, :, sources.to(part.device)]


class PlanShape:
    """A RowPlan in torch's terms. lengths: (sequences,) when its rows are complete causal sequences end to end, else
    None. is_chain: whether they are a single one."""

    def __init__(self, plan: RowPlan):
        self.plan = plan
        position, _, start, contiguous = plan.meta_array.T
        rows, first = np.arange(plan.num_rows), np.flatnonzero(position == 0)
        plain = (
            len(first) > 0 and first[0] == 0 and (plan.extras_array < 0).all() and (contiguous == position + 1).all()
        )
        lengths = np.diff(np.append(first, plan.num_rows))
        plain = plain and all((each == np.repeat(first, lengths)).all() for each in (start, rows - position))
        self.lengths = lengths if plain else None
        self.is_chain = plain and len(lengths) == 1

    def check_appends(self) -> None:
        """Raises ValueError unless the rows follow each other and continue one sequence."""
        _, slot, start, _ = self.plan.meta_array.T
        if start.any() or (slot != np.arange(len(slot))).any():
            raise ValueError("several texts in one cache (--batch-size) need --backbone-engine jittor; torch takes one")

    @functools.cached_property
    def among(self):
        """The mask of the pass's rows against each other, (rows, rows) float32, on the host."""
        seen = torch.from_numpy(self.plan.mask(0, self.plan.num_rows))
        return torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float16).min)

    def mask(self, base: int, dtype, device):
        """What is added to the scores, (1, 1, rows, base + rows): 0 for what a row sees, which is the cache, its
        ancestors in this pass and itself; elsewhere a number so low that the weight is 0.

        A root with two children after one row in the cache, # for 0: [# #], [# # #], [# #   #].
        """
        rows = self.plan.num_rows
        return torch.cat([torch.zeros(rows, base), self.among], 1).to(device, dtype)[None, None]


@functools.lru_cache(maxsize=64)
def plan_shape(plan: RowPlan) -> PlanShape:
    """Made once per plan."""
    return PlanShape(plan)


def similar(lengths: np.ndarray) -> list[np.ndarray]:
    """Sequences that share a padded batch: indices, the longest first, each batch at most MOST_PADDING of its tokens.

    Worked example: lengths 10, 3, 9, 10 give [0, 3, 2] and [1]: 30 rows for 29 tokens, and 3 for 3.
    """
    groups: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        fits = (
            groups
            and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= MOST_PADDING * lengths[[*groups[-1], index]].sum()
        )
        if fits:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [np.array(group) for group in groups]


def to_jittor(tensor):
    """A float32 Var of the tensor's numbers."""
    return jt.array(tensor.float().cpu().contiguous().numpy())


def choose_device():
    """The first GPU that torch sees, unless GORGON_DEVICE says cpu; else the CPU."""
    wanted = os.environ.get("GORGON_DEVICE", "auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def check_quantizers() -> None:
    """Raises ValueError where bitsandbytes or accelerate is not installed."""
    missing = [name for name in QUANTIZERS if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"8 or 4 bits with --backbone-engine torch need {' and '.join(missing)}: pip install {' '.join(missing)}; "
            "or use --backbone-engine jittor"
        )


def load_model(directory: Path, config: BackboneConfig, dtype: str, storage: str, device):
    """The transformers model, frozen. storage: of its layers' matrices, ``dtype`` or a name in QUANTIZED.

    Raises ValueError naming weights that are missing, or not finite in ``dtype``.
    """
    disable_progress_bar()
    settings = {"dtype": getattr(torch, dtype), "local_files_only": True, "output_loading_info": True}
    if storage in QUANTIZED:
        settings["quantization_config"] = BitsAndBytesConfig(**QUANTIZED[storage])
        settings["device_map"] = {"": device}
    model, found = MODELS[config.model_type].from_pretrained(directory, **settings)
    if found["missing_keys"] or found["mismatched_keys"]:
        names = sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"]))
        raise ValueError(f"{directory}: transformers did not find {', '.join(names[:10])}")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} is not finite in {dtype}; load it with dtype float32, or check the file")
    if storage not in QUANTIZED:
        model = model.to(device)
        if device.type == "cpu":
            model = model.float()
    return model.eval().requires_grad_(False)
