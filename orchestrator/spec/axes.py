"""The axes of a sweep: every field of a trial that can change its result, and the values that a command gives them.

The type of a field says how its values are read, and its spec validates them. A field that is added to one of these specs
becomes an axis. Models, reward types, sets and seeds have flags of their own.
"""

import csv
import itertools
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from trainers.errors import SpecError, nearest
from trainers.rewards import RewardSpec, reward_types
from trainers.specs import DrawSpec, LoraSpec, LossSpec, ModelSpec, Optimizer, OptimSpec, ValidationSpec

# A TrialSpec, which is defined by what is here.
Trial = Any
# Words by column: one trial of a file, or one value of each axis.
Row = dict[str, str]

NONE = "none"
# Specs that a trial may lack, with the field that is then 0.
_SWITCHES = {"lora": "rank", "validation": "share"}
# These fields hold for training and evaluation alike.
_OF_BOTH_DRAWS = ("max_prompt_tokens", "max_response_tokens", "system", "reasoning")
# Unused where all pairs are taken.
_USUAL_DRAW = {name: getattr(DrawSpec(), name) for name in ("seed", "permutation")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A field of the spec that TrialSpec has as `home`."""

    name: str
    home: str
    spec: type[Any]
    field: str

    @property
    def parameter(self) -> str:
        """Its name among a trial's parameters and the flags."""
        return "max_train_pairs" if self.name == "train-pairs" else self.name.replace("-", "_")

    def unread(self, trial: Trial) -> str:
        """Say why the trial does not have or read this field; "" where it does."""
        if self.home == "reward" and self.field not in trial.reward.type.options:
            having = (kind for kind, reward in reward_types().items() if self.field in reward.options)
            return f"it is an option of {', '.join(having)}"
        if self.home == "loss" and trial.reward.type.own_loss:
            return "the reward type has a loss of its own"
        if self.home == "train_draw" and self.field in _USUAL_DRAW and trial.train_draw.max_pairs is None:
            return "all pairs are taken; give --max-train-pairs"
        if self.home == "optim" and trial.optim.optimizer not in (
            by := OptimSpec.READ_BY.get(self.field, get_args(Optimizer))
        ):
            return f"it is read by --optimizer {' or '.join(by)}"
        switch = _SWITCHES.get(self.home, self.field)
        return (
            f"give --{self.home}-{switch}" if switch != self.field and not getattr(trial, self.home) else ""
        )

    def of(self, trial: Trial) -> Any:
        """Return the trial's value; None where the axis does not apply."""
        spec = getattr(trial, self.home)
        return None if self.unread(trial) else 0 if spec is None else getattr(spec, self.field)

    def read(self, text: str) -> Any:
        """Return the value that a word stands for. Raises SpecError where it is of another type."""
        convert, wanted = _reader(typing.get_type_hints(self.spec)[self.field])
        try:
            return convert(text)
        except (ValueError, KeyError):
            raise SpecError(f"{text!r} is no value of {self.name}; give {wanted}.") from None


def _every(
    home: str, spec: type[Any], prefix: str = "", but: Sequence[str] = (), **renamed: str
) -> list[Axis]:
    return [
        Axis(
            name=renamed.get(item.name, f"{prefix}{item.name.replace('_', '-')}"),
            home=home,
            spec=spec,
            field=item.name,
        )
        for item in fields(spec)
        if item.name not in but
    ]


AXES = {
    axis.name: axis
    for axis in (
        *_every("optim", OptimSpec),
        # --rewards chooses the others.
        *_every("reward", RewardSpec, but=("kind", "pooling", "reference")),
        *_every("loss", LossSpec, kind="loss"),
        *_every("lora", LoraSpec, "lora-"),
        Axis(name="precision", home="model", spec=ModelSpec, field="precision"),
        *_every("train_draw", DrawSpec, max_pairs="train-pairs", seed="draw-seed"),
        *_every("validation", ValidationSpec, "validation-"),
    )
}


def _reader(kind: Any) -> tuple[Callable[[str], Any], str]:
    """Return the function that reads a word as this type, and how a value is written."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {item: item for item in parts}.__getitem__, f"one of {', '.join(parts)}"
    if kind is float:
        return _finite, "a number"
    if origin is None:
        return kind, "a whole number" if kind is int else "a word"
    convert, wanted = _reader(parts[0])
    if origin is not tuple:
        return lambda text: None if text == NONE else convert(text), f"{wanted}, or {NONE}"
    if parts[-1] is Ellipsis:
        # A list of any length is a set: the order of its words makes no other training.
        return (
            lambda text: () if text == NONE else tuple(sorted({*map(convert, text.split("+"))})),
            f"{wanted}; + joins several, {NONE} is none",
        )

    def several(text: str) -> tuple[Any, ...]:
        found = tuple(map(convert, text.split("+")))
        if len(found) != len(parts):
            raise ValueError(text)
        return found

    return several, f"{wanted}; + joins several"


def _finite(text: str) -> float:
    if math.isfinite(value := float(text)):
        return value
    raise ValueError(text)


def plain(value: Any) -> Any:
    """Return a value as JSON and MLflow hold it."""
    return (shown(value) if value else None) if isinstance(value, tuple) else value


def shown(value: Any) -> str:
    """Write a value as the command line takes it."""
    if isinstance(value, tuple | list):
        return "+".join(map(shown, value)) or NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return NONE if value is None else str(value)


def in_a_name(axis: str, value: Any) -> str:
    """Return what a value adds to a reward type's name, `_lr=1e-05`: one word, since it names columns of tables."""
    return "_".join(f"_{axis}={shown(value)}".split())


def settled(trial: Trial, values: Mapping[str, Any]) -> Trial:
    """Return the trial with these values, by axis; values of fields that it lacks are ignored. Raises SpecError."""
    homes: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        homes.setdefault(AXES[name].home, {})[AXES[name].field] = value
    changes: dict[str, Any] = {}
    if trial.reward.type.own_loss:
        homes.pop("loss", None)
    for home, given in homes.items():
        spec = getattr(trial, home)
        if home == "reward":
            given = {field: value for field, value in given.items() if field in spec.type.options}
        if home in _SWITCHES:
            kind: Any = {"lora": LoraSpec, "validation": ValidationSpec}[home]
            given = {**(asdict(spec) if spec else {}), **given}
            changes[home] = kind(**given) if given.get(_SWITCHES[home]) else None
        else:
            changes[home] = replace(spec, **given)
    if "optim" in changes:
        optim = changes["optim"]
        usual = OptimSpec()
        unread = (name for name, by in OptimSpec.READ_BY.items() if optim.optimizer not in by)
        # So that a field which the optimiser does not read tells no trials apart.
        changes["optim"] = replace(optim, **{name: getattr(usual, name) for name in unread})
    if "train_draw" in changes:
        drawn, own = changes["train_draw"], trial.train_set.train_draw
        if "max_pairs" in homes["train_draw"] and own is not None and drawn.max_pairs != own.max_pairs:
            # With another number of pairs than its own, the set is drawn from in the usual way.
            drawn = replace(drawn, **{**_USUAL_DRAW, **homes["train_draw"]})
        changes["train_draw"] = drawn if drawn.max_pairs else replace(drawn, **_USUAL_DRAW)
        shared = {field: value for field, value in homes["train_draw"].items() if field in _OF_BOTH_DRAWS}
        changes["eval_draw"] = replace(trial.eval_draw, **shared)
    return replace(trial, **changes)


def varied(
    trial: Trial, values: Mapping[str, Any], given: Mapping[str, Any] = types.MappingProxyType({})
) -> Trial:
    """Return the trial at this point of axes, which its name tells where it reads them; `given` values stay unnamed."""
    # Both at once, since the point decides which given values are read: --axis optimizer=adamw,sgd --momentum 0.9.
    made = settled(trial, {**given, **values})
    names = dict.fromkeys((*dict(trial.axes), *values))
    own = tuple((name, AXES[name].of(made)) for name in names if not AXES[name].unread(made))
    return replace(made, axes=own)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Values by axis, for the trials with these labels."""

    values: dict[str, Any]
    labels: dict[str, str]

    def fits(self, trial: Trial) -> bool:
        """Whether the trial has its labels."""
        labels = {"model": trial.model.name, "reward": trial.reward.name}
        labels |= {"train-set": trial.train_set.name, "seed": str(trial.seed)}
        return self.labels.items() <= labels.items()


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Points of which each trial takes one; `said` are the user's words.

    Unless it `varies`, it is one value for all trials and stands in no name. A trial that fits none of the `rows` of a
    file is left out of the sweep. An experiment's `own` choice gives way to flags.
    """

    said: str
    points: tuple[Point, ...]
    varies: bool = True
    rows: bool = False
    own: bool = False

    @property
    def names(self) -> set[str]:
        """The axes that it sets."""
        return {name for point in self.points for name in point.values}


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """All choices of a command: a grid is multiplied by them."""

    choices: tuple[Choice, ...] = ()

    def of(self, trial: Trial) -> list[Trial]:
        """Return a grid's trial at every point.

        Points that differ only in values that the trial does not read are one trial. Raises SpecError where two choices
        set one axis, or a value cannot be.
        """
        fitting, given, varying = list[Choice](), dict[str, Any](), list[list[Point]]()
        for choice in self.choices:
            points = [point for point in choice.points if point.fits(trial)]
            if not points and choice.rows:
                return []
            both = [(other, name) for other in fitting for name in sorted(choice.names & other.names)]
            if not points or (both and choice.own):
                continue
            for other, name in both:
                raise SpecError(
                    f"{other.said} and {choice.said} both set {name} of {trial.name}; give all its values at once, "
                    f"or separately for each reward type or model, as in --axis {trial.reward.name}.{name}=…"
                )
            fitting.append(choice)
            varying += [points] if choice.varies else []
            given |= {} if choice.varies else points[0].values
        try:
            made = [
                varied(
                    trial, {name: value for point in points for name, value in point.values.items()}, given
                )
                for points in itertools.product(*varying)
            ]
        except SpecError as error:
            said = [f"{choice.said}: " for choice in fitting if choice.varies]
            raise SpecError(f"{''.join(said)}{error}") from None
        return list(dict.fromkeys(made))

    def require_use(self, trials: Sequence[Trial]) -> None:
        """Refuse a value that no trial reads. Raises SpecError."""
        for choice, point in [(item, point) for item in self.choices for point in item.points]:
            meant = [trial for trial in trials if point.fits(trial)]
            of = "".join(f" with {key}={value}" for key, value in point.labels.items())
            if not meant:
                raise SpecError(f"{choice.said}: the sweep has no trial{of}.")
            for axis in map(AXES.__getitem__, point.values):
                if all(map(axis.unread, meant)):
                    raise SpecError(
                        f"{choice.said}: no trial{of} would use {axis.name}; {axis.unread(meant[0])}."
                    )


NO_AXES = Axes()


def parse_axes(
    options: Any, models: Iterable[str] = (), rewards: Iterable[str] = (), rows: Choice | None = None
) -> Axes:
    """Return the choices of --axis, --zip, --trials (as `rows`) and the flags for single values.

    `models` and `rewards` are the names that may stand before an axis. Raises SpecError.
    """
    labels = {**dict.fromkeys(models, "model"), **dict.fromkeys(rewards, "reward")}
    singles = []
    for axis in AXES.values():
        if (value := getattr(options, axis.parameter, None)) not in (None, ()):
            said = f"--{axis.parameter.replace('_', '-')} {shown(value)}"
            point = Point(values={axis.name: axis.read(shown(value))}, labels={})
            singles.append(Choice(said=said, points=(point,), varies=False))
    zipped = [_choice("--zip", options.zip, labels)] if options.zip else []
    choices = [*([rows] if rows else []), *(_choice("--axis", [text], labels) for text in options.axis)]
    return Axes(choices=(*singles, *choices, *zipped))


def axes_of(values: Mapping[str, Sequence[Any]], given: Axes = NO_AXES) -> Axes:
    """Return those `given` on the command line, and an experiment's own axes; one of one value stands in no name."""
    own = (_choice("--axis", [f"{name}={','.join(map(shown, items))}"], {}) for name, items in values.items())
    own = (replace(choice, varies=len(choice.points) > 1, own=True) for choice in own)
    return Axes(choices=(*given.choices, *own))


def _choice(flag: str, texts: Sequence[str], labels: Mapping[str, str]) -> Choice:
    said = f"{flag} {' '.join(texts)}"
    columns: dict[str, list[str]] = {}
    scopes: set[str] = set()
    for text in texts:
        head, equals, tail = text.partition("=")
        scope, _, name = head.rpartition(".")
        words = columns[name.replace("_", "-")] = [word.strip() for word in tail.split(",")]
        scopes.add(scope)
        if not equals or not all(words):
            raise SpecError(f"{flag} {text}: a value is missing; give NAME=VALUE,VALUE, as in lr=1e-6,1e-5.")
        if scope and scope not in labels:
            raise SpecError(
                f"{flag} {text}: no model and no reward type of this sweep is {scope}; {nearest(scope, labels)}"
            )
    if len(columns) < len(texts) or len({*map(len, columns.values())}) > 1 or len(scopes) > 1:
        raise SpecError(
            f"{said}: give each axis once, as many values of each, and all for one model or reward type, or for all."
        )
    (scope,) = scopes
    label = {labels[scope]: scope} if scope else {}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return Choice(said=said, points=tuple(_point(row, label, said) for row in rows))


def _point(row: Row, labels: dict[str, str], said: str) -> Point:
    values = {}
    for name, word in row.items():
        if name not in AXES:
            raise SpecError(
                f"{said}: no axis is called {name!r}; {nearest(name, AXES)} Models, rewards, sets and seeds have flags of "
                "their own."
            )
        try:
            values[name] = AXES[name].read(word)
        except SpecError as error:
            raise SpecError(f"{said}: {error}") from None
    return Point(values=values, labels=labels)


def read_rows(file: str | None) -> list[Row]:
    """Return the rows of a --trials file, .csv or .yaml, as words by column. Raises SpecError."""
    if file is None:
        return []
    import yaml  # type: ignore[import-untyped]

    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_csv = path.suffix == ".csv"
        loaded: Any = list(csv.DictReader(text.splitlines())) if is_csv else yaml.safe_load(text)
        if not loaded or (is_csv and any(None in (*row, *row.values()) for row in loaded)):
            raise ValueError("it has no rows, or one without as many cells as the first line")
        rows = [
            {str(key).strip().replace("_", "-"): shown(row[key]).strip() for key in row} for row in loaded
        ]
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise SpecError(
            f"--trials {file}: it cannot be read ({error}); give one trial a row, as .csv or a list in .yaml, with "
            "columns such as model, reward, train_set, seed, lr."
        ) from error
    return [{key: word for key, word in row.items() if word} for row in rows]


def column(rows: Sequence[Row], name: str) -> tuple[str, ...]:
    """Return the values of a column, each once."""
    return tuple(dict.fromkeys(row[name] for row in rows if name in row))


def rows_choice(file: str, rows: Sequence[Row], names: Mapping[str, Callable[[str], str]]) -> Choice:
    """Return the rows as points; `names` are functions of a word to the name of its model, reward type, set or seed."""
    points = []
    for number, row in enumerate(rows, 1):
        labels = {key: name_of(row[key]) for key, name_of in names.items() if key in row}
        values = {key: word for key, word in row.items() if key not in names}
        points.append(_point(values, labels, f"--trials {file}, row {number}"))
    return Choice(said=f"--trials {file}", points=tuple(points), rows=True)
