"""From the words on a command line to the models, data sets and draws of a grid. Every fault is a SpecError."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from orchestrator.spec import catalog
from orchestrator.spec.axes import NO_AXES, Axes, Row, axes_of, column, parse_axes, rows_choice
from orchestrator.spec.models import HUB_ID
from orchestrator.spec.trials import KeepEpochs, PlacementRule, Recipe, Sweep, TrialSpec, grid, only
from orchestrator.store.records import CATEGORIES, Category
from trainers.data.files import file_stem
from trainers.data.known import DATASETS, PERSONA
from trainers.data.sources import split_off
from trainers.errors import SpecError, nearest
from trainers.evaluate.suites import SUITES
from trainers.rewards import PAPER_BETA, RewardSpec, reward_variants
from trainers.specs import DatasetSpec, DrawSpec, ModelSpec, clean_name, given_name

_NAMED = re.compile(r"([^\W_][^\s=/\\:]*)=(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What an experiment file builds its sweep from: the profile's choices, overridden by flags."""

    name: str
    models: tuple[ModelSpec, ...]
    rewards: tuple[RewardSpec, ...]
    train_sets: tuple[DatasetSpec, ...]
    eval_sets: tuple[DatasetSpec, ...]
    seeds: tuple[int, ...]
    train_draw: DrawSpec
    eval_draw: DrawSpec
    recipe: Recipe
    categories: tuple[tuple[str, str, Category], ...]
    only: tuple[tuple[str, str], ...]
    max_trials: int | None
    placements: tuple[PlacementRule, ...]
    keep_epochs: KeepEpochs = ()
    axes: Axes = NO_AXES

    def trials(
        self,
        *,
        label: str = "",
        axes: Mapping[str, Sequence[Any]] = MappingProxyType({}),
        settings: Mapping[str, Any] = MappingProxyType({}),
        **changes: Any,
    ) -> tuple[TrialSpec, ...]:
        """Return every model with every reward type on every training set at every seed, at every point of the axes.

        `axes` are the experiment's own values, which a flag of that axis replaces; `settings` are single values that go
        before those of the flags. `changes` replace fields of the selection; `label` stands behind the reward type's name.
        """
        chosen = dataclasses.replace(self, **changes)
        return grid(
            models=chosen.models,
            rewards=chosen.rewards,
            train_sets=chosen.train_sets,
            eval_sets=chosen.eval_sets,
            seeds=chosen.seeds,
            recipe=chosen.recipe,
            train_draw=chosen.train_draw,
            eval_draw=chosen.eval_draw,
            keep_epochs=chosen.keep_epochs,
            label=label,
            axes=axes_of(axes, chosen.axes),
            settings=settings,
        )

    def sweep(
        self, trials: Iterable[TrialSpec], categories: Iterable[tuple[str, str, Category]] = ()
    ) -> Sweep:
        """Return the sweep of the trials that --only and --max-trials leave; --category goes before `categories`.

        Raises SpecError where a value that a flag gives is one that no trial uses.
        """
        trials = tuple(trials)
        self.axes.require_use(trials)
        given = {(train_set, eval_set) for train_set, eval_set, _ in self.categories}
        return Sweep(
            name=self.name,
            trials=only(trials, self.only)[: self.max_trials],
            categories=(*(item for item in categories if item[:2] not in given), *self.categories),
            placements=self.placements,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many pairs are drawn of a set, how long they may be (None where the flag is not given), how they are rendered."""

    max_train_pairs: int | None = None
    max_eval_pairs: int | None = None
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise SpecError(f"--{field.name.replace('_', '-')} {value}: give at least 1.")

    def train_draw(self, default: int | None = None) -> DrawSpec:
        """Draw training pairs: at most `default` where the flags say no number."""
        return self._limited(DrawSpec(max_pairs=self.max_train_pairs or default))

    def eval_draw(self, default: int | None = None) -> DrawSpec:
        """Draw test pairs: at most `default` where the flags say no number."""
        return self._limited(DrawSpec(max_pairs=self.max_eval_pairs or default))

    def within(self, spec: DatasetSpec) -> DatasetSpec:
        """Limit the draw that a set declares for itself, and drop it where another number of pairs is given."""
        own = spec.train_draw
        if own is None:
            return spec
        kept = self._limited(own) if self.max_train_pairs in (None, own.max_pairs) else None
        return dataclasses.replace(spec, train_draw=kept)

    def _limited(self, draw: DrawSpec) -> DrawSpec:
        return dataclasses.replace(
            draw,
            max_prompt_tokens=self.max_prompt_tokens or draw.max_prompt_tokens,
            max_response_tokens=self.max_response_tokens or draw.max_response_tokens,
        )


def parse_model(text: str) -> ModelSpec:
    """`[NAME=]ID|PATH`, where ID is a catalog name or a hub id."""
    name, source = _split_name(text)
    if source in catalog.MODELS:
        known = catalog.MODELS[source]
        return dataclasses.replace(known, name=name or known.name)
    path = _found(source)
    if path is not None:
        stem = path.absolute().stem if path.is_file() else path.absolute().name
        return ModelSpec(name=name or clean_name(stem), source=str(path))
    if _looks_like_path(source) or not HUB_ID.fullmatch(source):
        raise SpecError(
            f"--models {source}: no such file or folder, and no known model; {nearest(source, catalog.MODELS)}"
        )
    return ModelSpec(name=name or clean_name(source.split("/")[-1].lower()), source=source)


def parse_dataset(text: str, flag: str) -> DatasetSpec:
    """`[NAME=]NAME|PATH|ID[:SPLIT]`. A catalog NAME in front of a path keeps what the catalog declares of it."""
    whole, split = split_off(text)
    if split:
        spec = parse_dataset(whole, flag)
        if flag == "--train-sets":
            return dataclasses.replace(spec, train_split=split)
        return dataclasses.replace(spec, test_split=split)
    name, source = _split_name(text)
    given = name
    known = {spec.name: spec for spec in DATASETS}
    if source in known:
        return dataclasses.replace(known[source], name=name or source)
    path = _found(source)
    if path is None and (_looks_like_path(source) or not HUB_ID.fullmatch(source)):
        raise SpecError(
            f"{flag} {source}: no such file or folder, and no known data set; {nearest(source, known)}"
        )
    if not name:
        name = clean_name(file_stem(path or Path(source)).lower())
    if path is not None and (given in SUITES or (name in known and known[name].selection == PERSONA)):
        return dataclasses.replace(known[name], source=str(path))
    rewriting_of = known[name].rewriting_of if name in known else None
    # A folder may be called as a catalog set by chance.
    train_draw = known[name].train_draw if given in known else None
    return DatasetSpec(
        name=name,
        source=source if path is None else str(path),
        rewriting_of=rewriting_of,
        train_draw=train_draw,
    )


def _split_name(text: str) -> tuple[str, str]:
    if not text.strip():
        raise SpecError("an empty word names no model and no data set; is a shell variable unset?")
    match = _NAMED.fullmatch(text)
    if match is None or _found(text) is not None:
        return "", text
    return given_name("NAME", match[1]), match[2]


def _found(text: str) -> Path | None:
    """Find a file or folder; None where there is none, or where no file could have that name."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _looks_like_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~")) or text.count("/") > 1


def parse_rewards(kinds: Sequence[str]) -> tuple[RewardSpec, ...]:
    """Reward types by name, variants such as `ex_rm_mean` included, with the paper's β."""
    known = reward_variants(PAPER_BETA)
    for kind in kinds:
        if kind not in known:
            raise SpecError(f"--rewards {kind}: {nearest(kind, known)}")
    return tuple(spec for name, spec in known.items() if name in kinds)


def parse_categories(
    texts: Sequence[str], train_names: Iterable[str], eval_names: Iterable[str]
) -> tuple[tuple[str, str, Category], ...]:
    """`TRAIN/EVAL=VALUE`, where VALUE is a category, spaces or hyphens alike."""
    by_text: Mapping[str, Category] = {category.replace(" ", "-"): category for category in CATEGORIES}
    known = (("trains on", set(train_names)), ("evaluates on", set(eval_names)))
    parsed: dict[tuple[str, str], Category] = {}
    for text in texts:
        pair, _, value = text.rpartition("=")
        train, slash, evaluated = pair.partition("/")
        category = by_text.get(value.strip().replace(" ", "-"))
        if not slash or category is None:
            raise SpecError(f"--category {text}: give TRAIN/EVAL=VALUE, VALUE one of {', '.join(by_text)}.")
        for name, (role, names) in zip((train, evaluated), known, strict=True):
            if name not in names:
                raise SpecError(
                    f"--category {text}: no set that this sweep {role} is {name}; {nearest(name, names)}"
                )
        if (train, evaluated) in parsed:
            raise SpecError(f"--category {text}: {train}/{evaluated} is given twice.")
        parsed[train, evaluated] = category
    return tuple((train, evaluated, category) for (train, evaluated), category in parsed.items())


def parse_only(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`KEY=GLOB`."""
    patterns = []
    for text in texts:
        key, equals, glob = text.partition("=")
        if not equals or not glob:
            raise SpecError(f"--only {text}: give KEY=GLOB, as in --only model=llama*.")
        patterns.append((key, glob))
    return tuple(patterns)


def parse_keep_epochs(texts: Sequence[str]) -> KeepEpochs:
    """`every`, or epochs from 1."""
    if list(texts) == ["every"]:
        return "every"
    if not all(text.isdecimal() and int(text) >= 1 for text in texts):
        raise SpecError(f"--keep-epochs {' '.join(texts)}: give epochs from 1, or the one word every.")
    return unique("--keep-epochs", [int(text) for text in texts])


def chosen_axes(options: Any, chosen: Selection, rows: Sequence[Row]) -> Axes:
    """Return what the flags and the rows of --trials say of the axes of a selection. Raises SpecError."""
    models, sets, rewards = (
        {spec.name: spec.name for spec in specs}
        for specs in (chosen.models, chosen.train_sets, chosen.rewards)
    )
    if not rows:
        return parse_axes(options, models, rewards)
    # A row may say what the flag would, or the name that the flag has given.
    for word in set(column(rows, "model")) - models.keys():
        if (name := parse_model(word).name) in models:
            models[word] = name
    for word in set(column(rows, "train-set")) - sets.keys():
        if (name := parse_dataset(word, "--train-sets").name) in sets:
            sets[word] = name
    seeds = {str(seed): str(seed) for seed in chosen.seeds}
    names = {"model": models, "reward": rewards, "train-set": sets, "seed": seeds}
    return parse_axes(options, models, rewards, rows_choice(options.trials, rows, names))


def unique(what: str, values: Sequence[int]) -> tuple[int, ...]:
    """Refuse a list of values in which one stands twice."""
    if len(set(values)) != len(values):
        raise SpecError(f"{what} {' '.join(map(str, values))}: a value stands twice.")
    return tuple(values)
