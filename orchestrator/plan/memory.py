"""Peak memory of one rank of a training, from numbers alone. Each term and its source stands in docs/planning.md.

A step has three moments at which memory peaks: the beginning of the backward pass (all activations, few gradients), its
end (all gradients, no activations), and the update. The peak is what is always there plus the largest of the three.

Units: bytes inside, GB (10⁹ bytes) outside. `width` is the bytes of a weight: 4 in fp32, 2 in bf16.
"""

import math
from dataclasses import dataclass, replace

from trainers.models.architecture import (
    LOGITS_BLOCK,
    SCORED_TOKENS,
    UNMEASURED_GB,
    UNMEASURED_SHARE,
    Architecture,
    scoring_gb,
)
from trainers.rewards import RewardSpec
from trainers.specs import LoraSpec, OptimSpec, Placement, Precision

GB = 1e9
# Defaults of DeepSpeed 0.19.8 that trainers/train/engine.py leaves as they are: elements of a reduction bucket, of a
# ZeRO-3 sub-group, of prefetched weights, and of weights that stay gathered for reuse.
BUCKET = 500_000_000
SUB_GROUP = 1_000_000_000
PREFETCHED = 50_000_000
REUSED = 500_000_000
# trainers/models/unembedding.py: elements of a block of logits on a CPU, and its fewest vocabulary entries.
LOGITS_BLOCK_ON_CPU, SMALLEST_BLOCK = 1 << 21, 256
# Pinned memory is given in powers of two: 1.1 of what an 8B's layers take, ASSUMED of others.
PINNED = 1.25


def weight_bytes(precision: Precision) -> int:
    return 2 if precision == "bf16" else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTokens:
    """Tokens of a pair's parts: of the longest pair, or the mean over pairs."""

    prompt: float
    chosen: float
    rejected: float

    @property
    def total(self) -> float:
        """Tokens of the packed pair, its prompt counted once."""
        return self.prompt + self.chosen + self.rejected

    @property
    def responses(self) -> float:
        """Tokens whose log-probabilities IM-RM needs."""
        return self.chosen + self.rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What memory and time depend on besides the placement. `pair` is the longest that the draw lets through.

    With `lora`, only the adapter has gradients and optimiser state.
    """

    architecture: Architecture
    reward: RewardSpec
    optim: OptimSpec
    precision: Precision
    pair: PairTokens
    lora: LoraSpec | None = None
    # 2 if each pair is computed together with its rewriting.
    copies: int = 1

    @property
    def trainable(self) -> int:
        """Number of trained parameters; an adapter on some layers is counted as one on all of them."""
        shapes, output = self.architecture, self.reward.type.output
        if self.lora is None:
            return shapes.trained(output)
        queries, keys = shapes.heads * shapes.head_width, shapes.key_heads * shapes.head_width
        # Inputs and outputs of a layer's matrices: queries, keys and values (one matrix in GPT-NeoX), output, feed-forward.
        ends = (1 if shapes.family == "gpt_neox" else 3) * shapes.hidden + queries + 2 * keys
        ends += queries + shapes.hidden
        ends += (3 if shapes.gated else 2) * (shapes.hidden + shapes.intermediate)
        return self.lora.rank * ends * shapes.layers + (shapes.hidden if output != "unembedding" else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Memory of one rank in GB, by use. `unmeasured` is a margin (0 on a CPU); `host` is host memory, not in the total."""

    weights: float
    masters: float
    optimizer: float
    gradients: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    gathered: float = 0.0
    buckets: float = 0.0
    unmeasured: float = 0.0
    host: float = 0.0

    @property
    def state(self) -> float:
        """Weights, gradients and optimiser state."""
        return self.weights + self.masters + self.optimizer + self.gradients

    @property
    def total(self) -> float:
        """Everything on the device."""
        work = self.activations + self.logits + self.gathered + self.buckets
        return self.state + work + self.unmeasured


def footprint(training: Training, placement: Placement) -> Footprint:
    """Predict the peak memory of one rank in the heaviest forward, in which every pair is the longest."""
    unit = training.copies * training.pair.total
    share = unit * math.ceil(training.optim.effective_batch / placement.world_size)
    forward = max(unit, min(placement.forward_tokens, share))
    pairs, several = forward / training.pair.total, forward < share
    shapes, output = training.architecture, training.reward.type.output
    width = weight_bytes(training.precision)
    # Half precision without ZeRO is run as ZeRO-1 (trainers/train/engine.py).
    stage = max(placement.zero_stage, 1) if width == 2 else placement.zero_stage
    on_gpu = placement.device == "cuda"
    hosted = placement.offload_optimizer and on_gpu
    everything, count = shapes.trained(output), training.trainable
    everything += count if training.lora else 0
    part = count / placement.world_size if stage else count
    table = shapes.vocabulary * shapes.hidden * width

    copied = stage in (1, 2) or (stage == 3 and (width == 2 or placement.offload_optimizer))
    always = Footprint(
        weights=width * everything / (placement.world_size if stage == 3 else 1) / GB,
        masters=4 * part / GB if copied and not hosted else 0.0,
        optimizer=0.0 if hosted else _moments_bytes(training.optim) * part / GB,
        host=(4 + _moments_bytes(training.optim) + 4 * (stage >= 2)) * part / GB if hosted else 0.0,
    )

    # Gradients are summed and sent in fp32 whatever the weights are (trainers/train/engine.py). Half precision is run by
    # DeepSpeed's BF16_Optimizer at stage 1, which reduces its sums in place, and at stage 2 widens each bucket to send it.
    in_place = width == 2 and stage == 1 and not placement.offload_optimizer
    # On a CPU, allocated memory counts only once it is written to. A tensor larger than a bucket is sent by itself.
    filled = BUCKET if on_gpu else min(count, BUCKET)
    widened = filled if training.lora else max(filled, shapes.vocabulary * shapes.hidden)
    bucket = 0.0 if in_place else float(2 * filled + 4 * widened if width == 2 and stage == 2 else 4 * filled)
    kept = 0.0 if hosted and stage >= 2 else float(4 * (count if stage <= 1 else part))
    gathered = 0.0
    if stage == 3 and placement.world_size > 1:
        gathered = width * min(everything, REUSED + PREFETCHED + shapes.vocabulary * shapes.hidden)
    backward_begins = replace(
        always,
        gradients=kept / GB if several or stage == 3 or in_place else 0.0,
        activations=_activation_bytes(training, placement, pairs, width) / GB,
        logits=_logit_bytes(training, placement, pairs, width) / GB,
        gathered=gathered / GB,
        buckets=bucket / GB if stage >= 2 else 0.0,
    )
    # The embeddings' gradient, as large as their table, comes last: beside the unembedding's if they are tied, and in
    # half precision beside the sum that it is added to.
    last = 0 if training.lora else table * ((shapes.tied and output != "head") + (width == 2))
    backward_ends = replace(
        always,
        gradients=(kept + last) / GB,
        gathered=min(gathered, table) / GB,
        buckets=bucket / GB if stage >= 1 else 0.0,
    )
    # A flat copy of the gradients. Half precision needs it at stage 3 only: at lower stages its sums are flat already.
    flat = (4 * min(count, BUCKET), 4 * part, 4 * part, 4 * min(part, SUB_GROUP))[stage]
    if width == 2 and stage < 3:
        flat = 0.0
    copies = (bucket if stage == 3 else 0.0) + (0.0 if hosted else flat)
    update = replace(always, gradients=kept / GB, buckets=copies / GB)

    peak = max(backward_begins, backward_ends, update, key=lambda moment: moment.total)
    return replace(peak, unmeasured=UNMEASURED_GB + UNMEASURED_SHARE * peak.total) if on_gpu else peak


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How one GPU scores with a model: GB on the GPU, GB of pinned host memory, and GB copied to the GPU in each forward.

    A model that it does not hold stays in host memory, and two of its layers are on the GPU (trainers/models/streaming.py).
    """

    gb: float
    host_gb: float = 0.0
    copied_gb: float = 0.0


def scoring(training: Training, gpu_gb: float) -> Scoring:
    """Predict how a GPU of that memory scores with the model."""
    shapes, output = training.architecture, training.reward.type.output
    width = weight_bytes(training.precision)
    tokens = max(SCORED_TOKENS, training.pair.total)
    held = float(width * shapes.trained(output))
    tables = 1 if shapes.tied or output == "head" else 2
    outside = float(width * tables * shapes.vocabulary * shapes.hidden)

    def gb(weights: float) -> float:
        return scoring_gb(weights, shapes.hidden, shapes.intermediate, width, tokens)

    if gb(held) <= gpu_gb:
        return Scoring(gb=gb(held))
    layers = held - outside
    return Scoring(
        gb=gb(outside + min(2, shapes.layers) * layers / shapes.layers),
        host_gb=PINNED * layers / GB,
        copied_gb=layers / GB,
    )


def _moments_bytes(optim: OptimSpec) -> int:
    """Return the bytes of optimiser state per parameter; it is in fp32."""
    if optim.optimizer == "adamw":
        return 8
    momentum = 4 if optim.momentum else 0
    return momentum if optim.optimizer == "sgd" else 4 + momentum


def _activation_bytes(training: Training, placement: Placement, pairs: float, width: int) -> float:
    """Return the bytes that the forward pass saves, and the working memory of one layer's backward pass."""
    shapes, pair = training.architecture, training.pair
    tokens = pairs * pair.total
    scores = _score_bytes(shapes, pair, placement.device)
    layer = tokens * _layer_bytes_per_token(shapes, pair, width, placement.device)
    layer += pairs * scores
    layers = shapes.layers * layer
    if placement.checkpointing:
        layers = shapes.layers * tokens * shapes.hidden * width + layer
    final_norm = tokens * shapes.hidden * _norm_bytes(shapes, width, before=True)
    masks = 0.0
    if placement.device == "cpu":
        masks = pairs * pair.rejected * (pair.prompt + pair.rejected) * width
    work = max(tokens * (3 * shapes.intermediate + 2 * shapes.hidden) * width, scores)
    return layers + final_norm + masks + work


def _layer_bytes_per_token(shapes: Architecture, pair: PairTokens, width: int, device: str) -> float:
    queries, keys = shapes.heads * shapes.head_width, shapes.key_heads * shapes.head_width
    if shapes.family == "gpt_neox":
        # Two layer norms of the same input: it and both outputs.
        norms = 3 * width * shapes.hidden
    else:
        after = 2 if shapes.family == "gemma2" else 0
        norms = shapes.hidden * (
            2 * _norm_bytes(shapes, width, before=True) + after * _norm_bytes(shapes, width, before=False)
        )
    if device == "cuda":
        # FlexAttention reads grouped keys and values as they are; its output is copied once.
        attention = 1.0 * width * (3 * queries + 2 * keys)
    else:
        # Keys and values are repeated for every head, and once more for prompt and rejected response.
        again = (pair.prompt + pair.rejected) / pair.total
        attention = width * queries * (5 + 2 * again)
    feed_forward = width * shapes.intermediate * (4 if shapes.gated else 2)
    return norms + attention + feed_forward


def _norm_bytes(shapes: Architecture, width: int, *, before: bool) -> int:
    """Return the bytes per element that an RMS norm saves: input, normalised input, and output if a matrix reads it."""
    if width == 4:
        return 12 if before else 8
    # In half precision it works on an fp32 copy; Gemma's normalised input stays fp32, too.
    normalised = 4 if shapes.family == "gemma2" else 2
    return 4 + normalised + (2 if before else 0)


def _score_bytes(shapes: Architecture, pair: PairTokens, device: str) -> float:
    """Return the bytes of a pair's attention scores, which are saved only if soft-capped without a fused kernel."""
    if not shapes.softcapped or device == "cuda":
        return 0.0
    first = (pair.prompt + pair.chosen) ** 2
    second = pair.rejected * (pair.prompt + pair.rejected)
    # Capped scores and their softmax: 8 bytes in either precision.
    return 8.0 * shapes.heads * (first + second)


def _logit_bytes(training: Training, placement: Placement, pairs: float, width: int) -> float:
    """Return the bytes of the unembedding's backward pass: a block of logits, and the gradients of both factors."""
    shapes, reward = training.architecture, training.reward.type
    if reward.output == "head":
        return 0.0
    # The generative reward needs only three log-probabilities a pair.
    asked = training.pair.responses if reward.rendering == "response" else 3
    tokens = pairs * asked
    held = LOGITS_BLOCK_ON_CPU if placement.device == "cpu" else LOGITS_BLOCK
    block = min(shapes.vocabulary, max(SMALLEST_BLOCK, held // tokens))
    logits = 4 * tokens * block * (2 if shapes.softcapped else 1)
    hidden = tokens * shapes.hidden * (width + 4 + (4 if width == 2 else 0))
    products = 4 * block * shapes.hidden * (2 if width == 2 else 1)
    # Beside an adapter the table has no gradient.
    table = 0 if training.lora else shapes.vocabulary * shapes.hidden * width
    return logits + hidden + products + table
