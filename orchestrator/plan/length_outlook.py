"""What a sweep will leave out for length, said by `plan`: counted where rows and tokenizer are at hand, else estimated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.spec.datasets import pairs_of
from orchestrator.spec.stages import PrepareStage, PretrainStage
from orchestrator.spec.trial_plan import TrialPlan
from orchestrator.store.artifacts import Store
from trainers.data import sources
from trainers.data.records import Message, Pair
from trainers.errors import DataError, ModelError
from trainers.specs import BUILTIN, PERSONA, DatasetSpec, DrawSpec

# Of more pairs so many are looked at, the first that are drawn.
MOST = 2000
# Where the tokenizer is not at hand; English text under today's vocabularies.
BYTES_PER_TOKEN = 4
# No tokenizer makes more tokens than bytes, and no template adds more to a message.
TEMPLATE_TOKENS = 128

_Wanted = dict[tuple[str, str, DrawSpec], tuple[PrepareStage, DatasetSpec, list[str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TooLong:
    """Pairs of a split over the limits, of those looked at; `models` share a tokenizer."""

    models: tuple[str, ...]
    dataset: str
    split: str
    too_long: int
    pairs: int
    known: Literal["prepared", "counted", "sampled", "estimated"]
    draw: DrawSpec

    def __str__(self) -> str:
        about = {
            "sampled": f", of the first {self.pairs} that are drawn",
            "estimated": f", about: taking {BYTES_PER_TOKEN} bytes for a token",
        }.get(self.known, "")
        return (
            f"over --max-prompt-tokens {self.draw.max_prompt_tokens} or --max-response-tokens "
            f"{self.draw.max_response_tokens}, left out: {self.too_long} of {self.pairs} pairs of {self.dataset}/{self.split} "
            f"for {', '.join(self.models)}{about}"
        )


def too_long(plans: Sequence[TrialPlan], store: Store) -> list[TooLong]:
    """Return what each set loses to the length limits; sets whose rows were never fetched are not looked at."""
    wanted: _Wanted = {}
    for plan in plans:
        last = plan.evaluations[-len(plan.spec.eval_sets) :]
        sets = [(plan.train.prepared, plan.spec.train_set)]
        sets += [(item.prepared, spec) for item, spec in zip(last, plan.spec.eval_sets, strict=False)]
        for stage, spec in sets:
            place = (stage.base.tokenizer_key, stage.split.digest, stage.draw)
            models = wanted.setdefault(place, (stage, spec, []))[2]
            models += [] if stage.base.name in models else [stage.base.name]
    rows: dict[str, Sequence[Pair]] = {}
    found = []
    for stage, spec, models in wanted.values():
        counted = _prepared(stage, store)
        if counted is None:
            if stage.split.digest not in rows:
                rows[stage.split.digest] = _rows(stage, spec, store)
            counted = _counted(stage, rows[stage.split.digest])
        left_out, pairs, known = counted
        if left_out:
            found.append(
                TooLong(
                    models=tuple(models),
                    dataset=stage.split.name,
                    split=stage.split.split,
                    too_long=left_out,
                    pairs=pairs,
                    known=known,
                    draw=stage.draw,
                )
            )
    return found


_Counted = tuple[int, int, Literal["prepared", "counted", "sampled", "estimated"]]


def _prepared(stage: PrepareStage, store: Store) -> _Counted | None:
    manifest = store.sound_manifest(stage.kind, stage.key)
    if manifest is None or "too_long" not in manifest["info"]:
        return None
    left_out = int(manifest["info"]["too_long"])
    return left_out, int(manifest["info"]["pairs"]) + left_out, "prepared"


def _rows(stage: PrepareStage, spec: DatasetSpec, store: Store) -> Sequence[Pair]:
    kept = pairs_of(store, stage.split.digest)
    if kept or not (spec.source.startswith(BUILTIN) or Path(spec.source.removeprefix(PERSONA)).exists()):
        return kept
    return list(sources.iter_pairs(spec, stage.split.split, []))


def _counted(stage: PrepareStage, pairs: Sequence[Pair]) -> _Counted:
    from trainers.pairs import Counts, draw_order, iter_tokens

    draw = stage.draw
    if not any(_over(pair, draw, bytes_per_token=1, added=TEMPLATE_TOKENS) for pair in pairs):
        return 0, len(pairs), "counted"
    sampled = len(pairs) > MOST and (draw.max_pairs or len(pairs)) > MOST
    if sampled:
        pairs = [pairs[row] for row in draw_order(len(pairs), draw)[:MOST]]
        draw = replace(draw, max_pairs=None)
    tokenizer = _tokenizer(stage)
    if tokenizer is None:
        drawn = [pairs[row] for row in draw_order(len(pairs), draw)[: draw.max_pairs]]
        over = sum(_over(pair, draw, bytes_per_token=BYTES_PER_TOKEN, added=0) for pair in drawn)
        return over, len(drawn), "estimated"
    counts, kept = Counts(), 0
    try:
        for _ in iter_tokens(pairs, tokenizer, draw, "response", counts):
            kept += 1
    except (DataError, ModelError):
        # Where not all of them are too long, another fault of the data or the model, which `run` says.
        if kept or counts.too_long < len(pairs):
            return 0, len(pairs), "counted"
    return counts.too_long, counts.too_long + kept, "sampled" if sampled else "counted"


def _over(pair: Pair, draw: DrawSpec, *, bytes_per_token: int, added: int) -> bool:
    """Whether a text is over its limit at so many bytes a token, and so many tokens added to each message."""

    def tokens(*messages: Message) -> float:
        texts = (message.content + message.fields for message in messages)
        return sum(len(text.encode()) / bytes_per_token + added for text in texts)

    prompt = tokens(*pair.prompt) + len(pair.tools.encode()) / bytes_per_token
    responses = (tokens(*turns) for turns in pair.responses)
    return prompt > draw.max_prompt_tokens or max(responses) > draw.max_response_tokens


def _tokenizer(stage: PrepareStage) -> Any:
    """The tokenizer where it is on this machine; None elsewhere."""
    from trainers import tiny
    from trainers.templates import load_tokenizer

    base = stage.base
    if isinstance(base.origin, PretrainStage):
        return tiny.build_tokenizer()
    if base.origin is None and Path(base.location).is_dir():
        return load_tokenizer(base.location, base.revision, base.trust)
    return None
