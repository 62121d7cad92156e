"""The schema of a result: one JSON file per measurement, with everything needed to judge its numbers.

Units are part of the keys (``time_s`` is seconds) and ``null`` is unknown. The per-prompt rows are included, so that
intervals can be recomputed without measuring again.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from runtime.records import Amount, Count, FileRecord, Interval, Model, Rate

AUTOREGRESSIVE = "autoregressive"  # the head's name in the record of the baseline

# How the matrices of the backbone's layers are stored; "torch-" if another engine than ours computes.
Storage = Literal["float16", "float32", "int8", "nf4", "torch-float16", "torch-float32", "torch-int8", "torch-nf4"]


class BackboneInfo(Model):
    path: str
    fingerprint: str
    dtype: str
    hidden_size: Count
    num_layers: Count
    vocab_size: Count
    engine: Literal["jittor", "torch"]
    storage: Storage | None = None


class Decoding(Model):
    """num_nodes counts the root. tree lists the paths of child ranks below it; null for a dynamic tree, which expands
    tree_width nodes per depth and leaves out nodes below min_confidence. batch_size: prompts decoded together.
    draft_dtype: of the matrices if the head drafted a chain in one call, else null.

    accept: the acceptance rule (``decoding.options``); greedy: whether it is "greedy". draft: the head's best guesses
    or sampled ones. temperature, top_p, top_k: of sampled texts, null for greedy ones; epsilon, alpha: of typical
    acceptance.
    """

    greedy: bool
    max_new_tokens: Count
    num_nodes: Count
    tree_depth: Count
    tree: list[list[Count]] | None
    cache_length: Count | None
    template: str | None
    tree_width: Count | None = None
    min_confidence: Rate | None = None
    batch_size: Annotated[int, Field(ge=1)] = 1
    accept: Literal["greedy", "lossless", "typical"] = "greedy"
    temperature: Amount | None = None
    top_p: Rate | None = None
    top_k: Count | None = None
    draft: Literal["top", "sampled"] = "top"
    epsilon: Rate | None = None
    alpha: Amount | None = None
    draft_dtype: Literal["float16", "float32"] | None = None

    @model_validator(mode="after")
    def _greedy_is_a_rule(self):
        if self.greedy != (self.accept == "greedy"):
            raise ValueError(f"greedy is {self.greedy}, accept {self.accept!r}")
        if not self.greedy and self.temperature is None:
            raise ValueError(f"accept is {self.accept!r}, but there is no temperature")
        return self


class RunConfig(Model):
    """head: the head's resolved options. repeats: times each prompt was decoded; rows hold the median."""

    backbone: BackboneInfo
    decoding: Decoding
    head: dict[str, Any]
    repeats: Annotated[int, Field(ge=1)]


class Checkpoint(Model):
    """train_steps, train_tokens, train_s: of the complete run. seed: of the training. expected_accept_length: tokens
    per pass on held-out text with a tree of ``tree_nodes`` nodes, as training scored this checkpoint."""

    path: str
    sha256: str
    parameters: Count
    train_steps: Count | None
    train_tokens: Count | None
    train_s: Amount | None
    seed: Count | None = None
    expected_accept_length: float | None = None
    tree_nodes: Count | None = None


class Data(Model):
    """num_prompts: prompts to decode. dropped: reason -> number left out while reading the file."""

    path: str
    sha256: str
    num_prompts: Count
    dropped: dict[str, Count]


class Baseline(Model):
    """Autoregressive decoding by the original backbone in the same process. pass_s: median seconds per pass; total_s
    does not include the prefill."""

    tokens_per_s: Amount | None
    pass_s: Amount | None
    total_s: Amount | None
    tokens: Count


class Metrics(Model):
    """Defined in ``bench.record.metrics``. accept_rate[d]: share of depth d + 1 accepted, given that depth d was;
    null if never tried. total_variation: mean over emitted tokens, of a rule that changes the distribution."""

    accept_length: Amount | None
    accept_rate: list[Rate | None]
    tokens_per_s: Amount | None
    speedup: Amount | None
    speedup_ci: Interval | None
    accept_length_ci: Interval | None
    overhead: Amount | None
    tokens: Count
    passes: Count
    total_variation: Rate | None = None


class Timing(Model):
    """Amount summed over the rows of per_prompt; total_s includes prefill_s."""

    prefill_s: Amount | None
    draft_s: Amount | None
    verify_s: Amount | None
    accept_s: Amount | None
    cache_s: Amount | None
    host_s: Amount | None
    total_s: Amount | None


class FirstDifference(Model):
    """position counts generated tokens; a token is null if that text had already ended. baseline_token: of
    autoregressive decoding by the backbone that the head decodes with."""

    prompt_id: str
    position: Count
    baseline_token: Count | None
    head_token: Count | None
    logit_gap: float | None


class Parity(Model):
    """Of ``prompts`` compared with greedy autoregressive decoding, ``identical`` agreed token for token. The
    comparison uses the backbone that the head decodes with, which a head may have adapted."""

    prompts: Count
    identical: Count
    first_difference: FirstDifference | None

    @model_validator(mode="after")
    def _identical_is_a_part(self):
        if self.identical > self.prompts:
            raise ValueError(f"identical ({self.identical}) exceeds prompts ({self.prompts})")
        return self


class Adaptation(Model):
    """How a head that adapts the backbone changed its greedy text (``bench.record.metrics.agreement``).

    stats: figures of the checkpoint. greedy_agreement: share of the prompts whose text, all turns, equals the original
    backbone's. token_agreement: tokens before the first difference of each turn, over the original's tokens.
    """

    stats: dict[str, Any]
    greedy_agreement: Rate | None
    token_agreement: Rate | None


class Quantization(Model):
    """How storing the layers' matrices in fewer bits changed the backbone.

    layer_bytes: of the layers' weights. perplexity: of the assistant's tokens in the held-out conversations of the
    embedded corpus. greedy_agreement: share of the prompts whose first reply equals the original backbone's;
    token_agreement: tokens before the first difference, over the original's.
    """

    bits: Annotated[int, Field(ge=1)]
    layer_bytes_before: Count
    layer_bytes_after: Count
    perplexity_before: Annotated[float, Field(gt=0)]
    perplexity_after: Annotated[float, Field(gt=0)]
    greedy_agreement: Rate | None
    token_agreement: Rate | None


class Failure(Model):
    prompt_id: str
    error: str


class CategoryResult(Model):
    prompts: Count
    tokens: Count
    passes: Count
    accept_length: Amount | None
    tokens_per_s: Amount | None
    speedup: Amount | None


class AdaptedText(Model):
    """Autoregressive decoding by the adapted backbone. tokens: of the decoding passes. agreeing_tokens: before the
    first difference from the original's text, summed over the turns, the first token of a turn included."""

    tokens: Count
    agreeing_tokens: Count


class PromptRow(Model):
    """One prompt, its turns summed. Head and baseline read the same prompts and count alike.

    tokens, passes, time_s: of the decoding passes; the prefill with its seconds and its token is not counted.
    reached_by_depth[d]: passes that accepted depth d (depth 0 is the root) and had a candidate at depth d + 1;
    accepted_by_depth[d]: those of them that accepted depth d + 1. baseline_*: null if not measured. identical: the
    tokens equal those of autoregressive decoding by the same backbone, which is the baseline unless ``adapted`` is
    set; null if texts are sampled. total_variation: summed over the emitted tokens; null for exact rules.
    """

    prompt_id: str
    category: str
    turns: Count
    prompt_tokens: Count
    tokens: Count
    passes: Count
    accepted_by_depth: list[Count]
    reached_by_depth: list[Count]
    accept_length: Amount | None
    time_s: Amount
    baseline_tokens: Count | None
    baseline_passes: Count | None
    baseline_time_s: Amount | None
    draft_s: Amount | None
    verify_s: Amount | None
    identical: bool | None
    finish_reason: str
    adapted: AdaptedText | None = None
    total_variation: Amount | None = None

    @model_validator(mode="after")
    def _counts_agree(self):
        accepted, reached = self.accepted_by_depth, self.reached_by_depth
        if len(accepted) != len(reached) or any(a > r for a, r in zip(accepted, reached, strict=True)):
            raise ValueError(f"accepted_by_depth {accepted} does not fit reached_by_depth {reached}")
        if any(deeper > above for deeper, above in zip(reached[1:], accepted, strict=False)):
            raise ValueError(f"a depth was reached more often than the one above was accepted: {reached}, {accepted}")
        expected, whose = self.baseline_tokens, "baseline"
        if self.adapted:
            expected, whose = self.adapted.tokens, "adapted backbone"
            most = self.turns + min(expected, expected if self.baseline_tokens is None else self.baseline_tokens)
            if self.adapted.agreeing_tokens > most:
                raise ValueError(f"agreeing_tokens is {self.adapted.agreeing_tokens}, of at most {most}")
        if self.identical and expected not in (None, self.tokens):
            raise ValueError(f"identical, but {self.tokens} tokens against the {whose}'s {expected}")
        return self


class Prediction(Model):
    """What the head's calibration predicts of this tree (``bench.record.calibration``).

    tokens_per_s: as timed on the calibration's texts. prompts_sha256: of its prompts. same_machine: whether device,
    dtype and threads are those of this run.
    """

    accept_length: Amount
    accept_length_ci: Interval | None
    tokens_per_s: Amount
    autoregressive_tokens_per_s: Amount
    calibration: str
    prompts_sha256: str
    same_machine: bool


class Record(FileRecord):
    """A result file. baseline and parity are null in the record of the baseline itself, parity also for sampled texts.

    checkpoint: null for a head with nothing to train. head_stats: the head's own figures on held-out text.
    adaptation: null for a head that does not change the backbone. quantization: null for a backbone that is not
    quantized.
    """

    KIND: ClassVar[str] = "generation"

    schema_version: Literal[1]
    kind: Literal["generation"]
    status: Literal["complete", "interrupted"]
    head: str
    config: RunConfig
    provenance: dict[str, Any]
    checkpoint: Checkpoint | None
    data: Data
    baseline: Baseline | None
    metrics: Metrics
    timing: Timing
    parity: Parity | None
    failures: list[Failure]
    categories: dict[str, CategoryResult]
    per_prompt: list[PromptRow]
    head_stats: dict[str, Any] = Field(default_factory=dict)
    adaptation: Adaptation | None = None
    prediction: Prediction | None = None
    quantization: Quantization | None = None

    @model_validator(mode="after")
    def _prompt_ids_are_unique(self):
        ids = [row.prompt_id for row in self.per_prompt]
        if len(set(ids)) != len(ids):
            repeated = next(name for name in ids if ids.count(name) > 1)
            raise ValueError(f"per_prompt holds {repeated!r} twice")
        return self
