"""Which engine computes the backbone: our own, in Jittor, or transformers on PyTorch.

The choice has to be known before Jittor starts (``prepare_engine``), so nothing here loads either.
"""

from __future__ import annotations

from runtime.entry import suggest

JITTOR, TORCH = "jittor", "torch"
ENGINES = (JITTOR, TORCH)
HELP = "what computes the backbone: jittor, or torch (transformers; heads stay in Jittor)"


def prepare_engine(engine: str) -> None:
    """Called by an entry as soon as it knows the engine, before anything loads Jittor: torch is loaded first.

    Raises ValueError for an unknown engine, and for torch where it is not installed.
    """
    if engine not in ENGINES:
        raise suggest("--backbone-engine", engine, ENGINES)
    if engine == TORCH:
        from runtime.start.bootstrap import import_torch

        import_torch()


def load_engine(engine: str, path=None, dtype: str = "float16", load_in_8bit: bool = False, load_in_4bit: bool = False):
    """The backbone of a Hugging Face directory, None for the embedded one, by this engine. Raises ValueError as
    ``prepare_engine``, ``backbone.model.load_backbone`` and ``backbone.torch_engine.TorchBackbone`` do."""
    prepare_engine(engine)
    if engine == TORCH:
        from backbone.torch_engine import TorchBackbone

        return TorchBackbone(path, dtype, load_in_8bit, load_in_4bit)
    from backbone.model import load_backbone

    return load_backbone(path, dtype, load_in_8bit, load_in_4bit)
