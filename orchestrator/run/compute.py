"""Compute the stages: each reads its inputs from the store and commits one artifact. Plain functions, no Ray.

Imports that take seconds are inside the functions, so that planning does not wait for them.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.run.events import TakeRow
from orchestrator.spec.stages import (
    ConvertStage,
    EvaluateStage,
    PrepareStage,
    PretrainStage,
    ReferenceStage,
    SampleStage,
    SharedStage,
    TrainStage,
)
from orchestrator.store.artifacts import WEIGHTS, Attempt, Store, weights_digest
from trainers.data.records import read_written_pairs, write_pairs
from trainers.errors import DataError
from trainers.models import tiny
from trainers.specs import Placement
from trainers.storage import Location, ObjectPath, remove_tree
from trainers.train.stopping import StopLeft, never

if TYPE_CHECKING:
    from trainers.pairs.packing import References
    from trainers.pairs.tokens import TokenPair
    from trainers.train.inputs import TrainResult

# Reporting every pair would take longer than tokenising it.
PAIRS_A_ROW = 50
# Beside a suite's tokens: which answers to which prompt each pair holds.
PLACES = "places.json"


def run_shared(stage: SharedStage, store: Store, report: TakeRow) -> None:
    """Compute a stage that trials share, unless it is complete. The caller holds its lease."""
    if store.complete(stage.kind, stage.key):
        return
    store.remove_leftovers(stage.kind, stage.key)
    match stage:
        case ConvertStage():
            from trainers.models.loading import convert_gguf

            with store.write(stage.kind, stage.key, gguf=stage.digest, name=stage.name) as attempt:
                convert_gguf(Path(stage.file), attempt.directory / "model")
        case PretrainStage():
            with store.write(stage.kind, stage.key, name=stage.name) as attempt:
                tiny.pretrain(stage.model, attempt.directory / "model", report)
        case SampleStage():
            _run_sample(stage, store, report)
        case PrepareStage():
            _run_prepare(stage, store, report)
        case ReferenceStage():
            _run_reference(stage, store, report)


def _run_sample(stage: SampleStage, store: Store, report: TakeRow) -> None:
    """Draw the answers; those drawn so far are kept with the checkpoints until the stage is complete."""
    from trainers.evaluate.sampling import draw_answers, scored_pairs, write_answers

    base, drawn = stage.base, checkpoint_folder(store, f"{stage.kind}-{stage.key}")
    with store.write(stage.kind, stage.key, model=base.key, prompts=stage.prompts.digest) as attempt:
        pairs = read_written_pairs(store.read("dataset", stage.prompts.digest) / "pairs.jsonl")
        answers = draw_answers(
            base.weights(base.found_at(store)),
            stage.ends,
            pairs,
            stage.draw,
            stage.sampling,
            drawn,
            report,
        )
        write_answers(answers, attempt.directory / "answers.jsonl")
        write_pairs(scored_pairs(answers), attempt.directory / "pairs.jsonl")
        attempt.info.update(name=stage.answers.name, prompts_asked=len(answers))
    remove_tree(drawn)


def _run_prepare(stage: PrepareStage, store: Store, report: TakeRow) -> None:
    from trainers.data.audit import token_findings
    from trainers.evaluate.scores import write_places
    from trainers.pairs.templates import choose_template, load_tokenizer
    from trainers.pairs.tokens import Counts, TokenFile, iter_tokens, write_tokens

    base = stage.base
    inputs = {"dataset": stage.split.digest, "name": stage.split.name, "tokenizer": base.tokenizer_key}
    with store.write(stage.kind, stage.key, **inputs) as attempt:
        pairs = read_written_pairs(store.read(stage.split.kind, stage.split.digest) / "pairs.jsonl")
        if isinstance(base.origin, PretrainStage):
            tokenizer = choose_template(tiny.build_tokenizer(), base.template)
        else:
            location = base.found_at(store)
            tokenizer = load_tokenizer(location, base.revision, base.trust, base.template)
        counts = Counts()
        tokens = iter_tokens(pairs, tokenizer, stage.draw, stage.rendering, counts)
        total = min(len(pairs), stage.draw.max_pairs or len(pairs))
        counted = _counted(tokens, total, report)
        try:
            count = write_tokens(counted, attempt.directory / "pairs.arrow")
        except DataError as error:
            raise DataError(f"data set {stage.split.name}, split {stage.split.split}, {error}") from error
        kept = TokenFile(attempt.directory / "pairs.arrow")
        means = kept.mean_tokens()
        if pairs[0].candidates:
            write_places(attempt.directory / PLACES, (pairs[pair.index].candidates for pair in kept))
        attempt.info.update(pairs=count, mean_tokens=means, **dataclasses.asdict(counts))
    where = f"{stage.split.name}/{stage.split.split}, read by {base.name}"
    for finding in token_findings(where, counts, count):
        report({"notice": finding.said})


def _counted(tokens: "Iterable[TokenPair]", total: int, report: TakeRow) -> "Iterator[TokenPair]":
    """Yield the pairs and report progress; pairs that are left out count as done at the end."""
    for done, pair in enumerate(tokens, 1):
        yield pair
        if done % PAIRS_A_ROW == 0:
            report({"done": done, "total": total})
    report({"done": total, "total": total})


def _run_reference(stage: ReferenceStage, store: Store, report: TakeRow) -> None:
    from trainers.evaluate.scoring import compute_reference, write_reference
    from trainers.pairs.tokens import TokenFile

    base = stage.base
    with store.write(stage.kind, stage.key, model=base.key, data=stage.prepared.key) as attempt:
        model = base.weights(base.found_at(store)).model()
        pairs = TokenFile(store.read("prepare", stage.prepared.key) / "pairs.arrow")
        sums = compute_reference(model, pairs, report=report)
        write_reference(sums, attempt.directory / "reference.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainCall:
    """How a rank trains its stage; `provenance` goes into the manifest."""

    placement: Placement
    checkpoint_steps: int | None = None
    stop: StopLeft = never
    provenance: Mapping[str, Any] = field(default_factory=dict)


def checkpoint_folder(store: Store, name: str) -> Location:
    """Return the folder of an unfinished stage's checkpoints; a training's `name` is its key, another's `<kind>-<key>`."""
    return store.root / "checkpoints" / name


def run_train(stage: TrainStage, call: TrainCall, store: Store, report: TakeRow) -> None:
    """Train as one rank of a gang, or alone, from the last checkpoint if there is one.

    Rank 0 commits the weights and then the log, which makes the training complete.
    """
    from trainers.pairs.tokens import held_out
    from trainers.train.checkpoints import Checkpoints
    from trainers.train.inputs import TrainInputs
    from trainers.train.loop import train

    placement = call.placement
    pairs, reference = _tokens(stage, store)
    pairs, validation = held_out(pairs, stage.validation)
    inputs = TrainInputs(
        name=stage.base.name,
        location=stage.base.found_at(store),
        revision=stage.base.revision,
        trust=stage.base.trust,
        template=stage.base.template,
        precision=stage.base.precision,
        reward=stage.reward,
        optim=stage.optim,
        placement=placement,
        seed=stage.seed,
        pairs=pairs,
        reference=reference,
        keep_epochs=stage.keep_epochs,
        validation=validation,
        loss=stage.loss,
        lora=stage.lora,
        dataset=stage.prepared.split.name,
    )
    kept = checkpoint_folder(store, stage.key)
    checkpoints = Checkpoints(
        folder=store.local / "checkpoints" / stage.key,
        mirror=kept if isinstance(kept, ObjectPath) else None,
        every_steps=call.checkpoint_steps,
    )
    run = functools.partial(train, inputs, report=report, checkpoints=checkpoints, stop=call.stop)
    if int(os.environ.get("RANK", "0")) > 0:
        run(out_dir=Path())
        return
    with (
        store.write(stage.kind, stage.key, model=stage.base.key, data=stage.prepared.key) as attempt,
        store.write(WEIGHTS, stage.key) as weights,
    ):
        attempt.info.update(pairs=len(pairs), **call.provenance)
        _note(run(out_dir=weights.directory), stage, placement, attempt)
    remove_tree(kept)


def _note(result: "TrainResult", stage: TrainStage, placement: Placement, attempt: Attempt) -> None:
    """Write the training log, and the results into its manifest."""
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(result.log), attempt.directory / "log.parquet")
    if stage.validation is not None:
        validated = [row["validation_accuracy"] for row in result.log]
        attempt.info.update(validation_accuracy=[value for value in validated if value is not None])
    attempt.info.update(
        train_accuracy=result.train_accuracy,
        perf=result.perf,
        placement={name: getattr(placement, name) for name in Placement.__slots__},
    )


def run_evaluations(stages: Sequence[EvaluateStage], store: Store, report: TakeRow) -> None:
    """Score one trained model on several sets, one artifact each; load each epoch's weights once."""
    missing = [stage for stage in stages if not store.complete(stage.kind, stage.key)]
    for epoch in sorted({stage.epoch for stage in missing}):
        _evaluate_epoch([stage for stage in missing if stage.epoch == epoch], store, report)
    for train in {stage.train.key for stage in missing}:
        # No other stage reads these weights, and the next training needs the room.
        store.forget_fetched(WEIGHTS, train)


def _evaluate_epoch(missing: Sequence[EvaluateStage], store: Store, report: TakeRow) -> None:
    from trainers.evaluate.scores import read_places, write_scores
    from trainers.evaluate.scoring import score_pairs
    from trainers.models.generation import Weights
    from trainers.models.reward_parts import RewardModule
    from trainers.train.checkpoints import model_folder

    train = missing[0].train
    folder = model_folder(missing[0].epoch, train.optim.epochs)
    weights, found = store.manifest_and_folder(WEIGHTS, train.key, folder)
    trained = Weights(
        location=str(found / folder),
        revision=None,
        precision=train.base.precision,
        trust=train.base.trust,
        base=(train.base.found_at(store), train.base.revision) if train.lora else None,
    )
    reward = RewardModule(trained.model(train.reward.type.output), train.reward)
    for stage in missing:
        name = stage.prepared.split.name
        with store.write(stage.kind, stage.key, train=train.key, data=stage.prepared.key) as attempt:
            pairs, reference = _tokens(stage, store)
            # A tie has no ranking to be right about.
            pairs = [pair for pair in pairs if not pair.tie]
            chosen, rejected = score_pairs(
                reward,
                pairs,
                reference=reference,
                report=lambda row, name=name: report({**row, "dataset": name}),  # type: ignore[misc]
            )
            places = read_places(store.read("prepare", stage.prepared.key) / PLACES)
            file = attempt.directory / "scores.parquet"
            metrics = write_scores(file, name, pairs, chosen, rejected, places)
            attempt.info.update(metrics=metrics, dataset=name, weights=weights_digest(weights))


def _tokens(
    stage: TrainStage | EvaluateStage, store: Store
) -> "tuple[Sequence[TokenPair], References | None]":
    """Return the stage's pairs, and for im_rm their reference log-probs."""
    from trainers.evaluate.scoring import read_reference
    from trainers.pairs.tokens import TokenFile

    pairs = TokenFile(store.read("prepare", stage.prepared.key) / "pairs.arrow")
    if stage.reference is None:
        return pairs, None
    return pairs, read_reference(store.read("reference", stage.reference.key) / "reference.parquet", pairs)
