"""Analyses of untrained models on preference pairs: flags that name both, stages that prepare them, the model itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from orchestrator.cli.analyses import AnalysisOptions
from orchestrator.cli.options import Plan
from orchestrator.cli.session import Session, say_left_out
from orchestrator.spec import selection
from orchestrator.spec.datasets import DatasetReader, ReadingOptions, read_as
from orchestrator.spec.models import identify_model
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs, PrepareStage
from trainers.data.known import DATASETS, PERSONA
from trainers.errors import SpecError
from trainers.specs import DatasetSpec, DrawSpec, Output

SEEN = "seen"


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ReadingOptions, AnalysisOptions):
    """What every analysis of untrained models takes."""

    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]ID|PATH")] = ("llama-64",)
    """Catalog names, hub ids, folders or GGUF files; one analysis each."""
    train_set: Annotated[str, tyro.conf.arg(metavar="[NAME=]NAME|PATH")] = "tiny_world"
    """Its training pairs are those that are trained on; persona=FILE gives Persona's."""
    eval_sets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]NAME|PATH")] = ()
    """Sets whose test pairs are unseen (default: the training set's test pairs and its paraphrases)."""
    max_train_pairs: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """The first N of a seeded permutation."""
    max_eval_pairs: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """The first N of a seeded permutation."""


def declare_models(
    options: ModelOptions, session: Session, *, analysis: str, version: int, parameters: Any
) -> Sequence[AnalyseStage]:
    """One analysis per model. Raises SpecError, ModelError, DataError."""
    trained = selection.parse_dataset(options.train_set, "--train-set")
    unseen = [selection.parse_dataset(text, "--eval-sets") for text in options.eval_sets]
    (trained,), own = read_as([trained], unseen or _own_sets(trained), options)
    unseen = [_placed(item, trained) for item in own]
    if SEEN in {item.name for item in unseen} or len({item.name for item in unseen}) < len(unseen):
        raise SpecError(
            "--eval-sets: two sets have one name, or one is called seen; tell them apart with NAME=."
        )
    models = [selection.parse_model(text) for text in options.models]
    if len({model.name for model in models}) < len(models):
        raise SpecError("--models: two have one name; tell them apart with NAME=.")
    train_draw = selection.draw("--max-train-pairs", options.max_train_pairs, None)
    train_draw = selection.drawn(trained, options.max_train_pairs).train_draw or train_draw
    eval_draw = selection.draw("--max-eval-pairs", options.max_eval_pairs, None)
    fetch = not isinstance(options.command, Plan)
    reader = DatasetReader(session.store, fetch=fetch)
    wanted: list[tuple[str, DatasetSpec, str, DrawSpec]] = [
        (SEEN, trained, trained.train_split, train_draw),
        *((item.name, item, item.test_split, eval_draw) for item in unseen),
    ]
    lock = session.folder / "revisions.lock.json"
    bases = [identify_model(model, session.store, lock=lock, fetch=fetch) for model in models]
    stages = [
        AnalyseStage(
            analysis=analysis,
            version=version,
            parameters=parameters,
            base=base,
            prepared=tuple(
                (name, PrepareStage(base=base, split=reader.split(dataset, split), draw=draw))
                for name, dataset, split, draw in wanted
            ),
        )
        for base in bases
    ]
    say_left_out(session, reader.said_left_out())
    return stages


def _own_sets(trained: DatasetSpec) -> list[DatasetSpec]:
    """The set itself and the catalog's rewritings of it."""
    return [trained, *(item for item in DATASETS if item.rewriting_of == trained.name)]


def _placed(item: DatasetSpec, trained: DatasetSpec) -> DatasetSpec:
    """Persona's sets are all made of the statements that the training pairs are made of."""
    return replace(item, source=trained.source) if item.selection == PERSONA else item


def load_untrained(inputs: AnalysisInputs, output: Output) -> Any:
    """The base model in float64, on a GPU where there is one; the head of an EX-RM is drawn from seed 0."""
    from trainers.models.loading import device, load_model
    from trainers.pairs.templates import load_tokenizer

    base = inputs.base
    assert base is not None
    model = load_model(
        inputs.location,
        tokenizer=load_tokenizer(inputs.location, base.revision, base.trust),
        output=output,
        precision="fp32",
        revision=base.revision,
        head_seed=0 if output == "head" else None,
        trust=base.trust,
    )
    return model.double().to(device())
