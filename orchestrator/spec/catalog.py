"""Named models and profiles; the named data sets are in trainers/data/known.py.

Profile `paper` is the grid of arXiv 2507.07981 (paper §1, §2); profile `laptop` needs no download and runs on two CPU
cores. The hub is asked once for a revision that is None here, which is then locked (models.py).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.spec.trials import KeepEpochs, PlacementRule, Recipe
from trainers.data.known import DATASETS
from trainers.models.architecture import Architecture, count_parameters
from trainers.models.tiny import TINY_MODELS
from trainers.specs import BUILTIN, DatasetSpec, ModelSpec, OptimSpec, Precision

# Chosen by experiment at laptop size, the same for both reward types; docs/tiny_world.md tells their effect.
TINY_OPTIM = OptimSpec(lr=5e-5, epochs=12, effective_batch=32)


def _shapes(family: str, *numbers: int) -> Architecture:
    names = ("layers", "hidden", "intermediate", "heads", "key_heads", "head_width", "vocabulary")
    found: dict[str, Any] = dict(zip(names, numbers, strict=True))
    tied = family != "gpt_neox" and (family, found["layers"]) != ("llama", 32)
    shapes = Architecture(family=family, parameters=0, tied=tied, **found)
    return dataclasses.replace(shapes, parameters=count_parameters(shapes))


# From the models' own config.json, so that planning works offline and for gated models. The 8B and Pythia are untied.
ARCHITECTURES = {
    "meta-llama/Llama-3.2-1B-Instruct": _shapes("llama", 16, 2048, 8192, 32, 8, 64, 128_256),
    "meta-llama/Llama-3.2-1B": _shapes("llama", 16, 2048, 8192, 32, 8, 64, 128_256),
    "EleutherAI/pythia-1b": _shapes("gpt_neox", 16, 2048, 8192, 8, 8, 256, 50_304),
    "meta-llama/Llama-3.2-3B-Instruct": _shapes("llama", 28, 3072, 8192, 24, 8, 128, 128_256),
    "meta-llama/Llama-3.1-8B-Instruct": _shapes("llama", 32, 4096, 14_336, 32, 8, 128, 128_256),
    "google/gemma-2-2b-it": _shapes("gemma2", 26, 2304, 9216, 8, 4, 256, 256_000),
    "Qwen/Qwen2.5-1.5B-Instruct": _shapes("qwen2", 28, 1536, 8960, 12, 2, 128, 151_936),
    "Qwen/Qwen2.5-3B-Instruct": _shapes("qwen2", 36, 2048, 11_008, 16, 2, 128, 151_936),
}


def _hub_model(name: str, source: str, precision: Precision = "fp32") -> ModelSpec:
    return ModelSpec(
        name=name, source=source, parameters=ARCHITECTURES[source].parameters, precision=precision
    )


PAPER_MODELS = (
    _hub_model("llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct"),
    _hub_model("llama-3.2-3b", "meta-llama/Llama-3.2-3B-Instruct"),
    _hub_model("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", "bf16"),
    _hub_model("gemma-2-2b", "google/gemma-2-2b-it"),
    _hub_model("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct"),
    _hub_model("qwen2.5-3b", "Qwen/Qwen2.5-3B-Instruct"),
)
PYTHIA_1B = _hub_model("pythia-1b", "EleutherAI/pythia-1b")
LLAMA_1B_BASE = _hub_model("llama-3.2-1b-base", "meta-llama/Llama-3.2-1B")
TINY = tuple(ModelSpec(name=name, source=f"{BUILTIN}{name}") for name in TINY_MODELS)


def recipe_of(usual: OptimSpec, tiny: OptimSpec = TINY_OPTIM) -> Recipe:
    """Return the hyperparameters of every model on every set: `tiny` ones for built-in models."""
    return lambda model, _: tiny if model.source.startswith(BUILTIN) else usual


recipe = recipe_of(OptimSpec())


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """An experiment's defaults, which flags override."""

    name: str
    models: tuple[ModelSpec, ...]
    train_sets: tuple[DatasetSpec, ...]
    eval_sets: tuple[DatasetSpec, ...]
    seeds: tuple[int, ...]
    max_train_pairs: int | None
    max_eval_pairs: int | None
    placements: tuple[PlacementRule, ...] = ()
    rewards: tuple[str, ...] = ("ex_rm", "im_rm")
    recipe: Recipe = recipe
    keep_epochs: KeepEpochs = ()


Profiles = Mapping[str, Profile]


# The data set of a name.
dataset = {spec.name: spec for spec in DATASETS}.__getitem__

PAPER = Profile(
    name="paper",
    models=PAPER_MODELS,
    train_sets=(dataset("ultrafeedback"), dataset("rewardmath")),
    eval_sets=(
        *(dataset(f"ultrafeedback{of}") for of in ("", "_paraphrase", "_french", "_spanish")),
        *map(dataset, ("rewardbench_math", "rewardbench_code", "rewardmath")),
    ),
    seeds=(0, 1, 2),
    max_train_pairs=2000,
    max_eval_pairs=200,
)
LAPTOP = Profile(
    name="laptop",
    models=TINY,
    train_sets=(dataset("tiny_world"), dataset("tiny_requests")),
    eval_sets=tuple(map(dataset, ("tiny_world", "tiny_world_paraphrase", "tiny_requests"))),
    seeds=(0,),
    max_train_pairs=None,
    max_eval_pairs=None,
    # Two cells run on several processes, as on a cluster.
    placements=tuple(
        PlacementRule(
            match=(("model", "gemma2-64"), ("reward", reward), ("train", "tiny_world")),
            world_size=2,
            zero_stage=stage,
        )
        for reward, stage in (("ex_rm", 3), ("im_rm", 2))
    ),
)
PROFILES: Profiles = {profile.name: profile for profile in (PAPER, LAPTOP)}
MODELS = {spec.name: spec for spec in (*PAPER_MODELS, PYTHIA_1B, LLAMA_1B_BASE, *TINY)}
# The laptop profile of experiments on training, which need no second model.
ONE_MODEL = dataclasses.replace(
    LAPTOP,
    models=(MODELS["llama-64"],),
    train_sets=(dataset("tiny_world"),),
    eval_sets=(dataset("tiny_world"), dataset("tiny_world_paraphrase")),
    placements=(),
)


def architecture(model: ModelSpec) -> Architecture | None:
    """Return the architecture of a model of the catalog, by its source; None for any other model."""
    if not model.source.startswith(BUILTIN):
        return ARCHITECTURES.get(model.source)
    return TINY_MODELS[model.source.removeprefix(BUILTIN)].numbers
