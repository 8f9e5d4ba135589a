"""Named models, data sets and profiles.

Profile `paper` is the grid of arXiv 2507.07981 (paper §1, §2); profile `laptop` is built in, needs no download and
runs on two CPU cores. A hub revision that is None here is resolved at first contact and locked (identity.py).
The paper's row filters for hub sets are not applied yet: see CHANGELOG.md.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.spec import KeepEpochs, PlacementRule, Recipe
from trainers.data import persona
from trainers.specs import BUILTIN, MANUAL, PERSONA, DatasetSpec, ModelSpec, OptimSpec
from trainers.tiny import TINY_MODELS

PAPER_OPTIM = OptimSpec()

# Chosen by experiment at laptop size, the same for both reward types; what depends on them is in docs/tiny_world.md.
_TINY_OPTIM = {
    "tiny_world": OptimSpec(lr=5e-5, epochs=12, effective_batch=32),
    "hamiltonian": OptimSpec(lr=1e-3, epochs=80, effective_batch=16),
}
_REWRITES = "github.com/princeton-pli/exrm-vs-imrm at commit 58357b5 (MIT)"
_ULTRAFEEDBACK_REVISION = "3949bf5f8c17c394422ccfab0c31ea9c20bdeb85"


def _hub_model(name: str, source: str, parameters: int, precision: str = "fp32") -> ModelSpec:
    return ModelSpec(
        name=name, source=source, parameters=parameters, precision="bf16" if precision == "bf16" else "fp32"
    )


# Parameter counts with tied embeddings counted once.
PAPER_MODELS = (
    _hub_model("llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
    _hub_model("llama-3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824),
    _hub_model("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, "bf16"),
    _hub_model("gemma-2-2b", "google/gemma-2-2b-it", 2_614_341_888),
    _hub_model("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
    _hub_model("qwen2.5-3b", "Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
)
TINY = tuple(ModelSpec(name=name, source=f"{BUILTIN}{name}") for name in TINY_MODELS)


def _rewrite(language: str) -> DatasetSpec:
    name = f"ultrafeedback_{language}"
    return DatasetSpec(name=name, source=f"{MANUAL}{_REWRITES}", rewriting_of="ultrafeedback")


_REWARD_BENCH: dict[str, Any] = {"source": "allenai/reward-bench", "test_split": "filtered"}
DATASETS = (
    DatasetSpec(
        name="ultrafeedback",
        source="HuggingFaceH4/ultrafeedback_binarized",
        revision=_ULTRAFEEDBACK_REVISION,
        train_split="train_prefs",
        test_split="test_prefs",
    ),
    *(_rewrite(language) for language in ("paraphrase", "french", "spanish")),
    DatasetSpec(name="rewardmath", source="RewardMATH/RewardMATH_pairwise"),
    DatasetSpec(name="rewardbench_math", keep=(("subset", "math-prm"),), **_REWARD_BENCH),
    DatasetSpec(name="rewardbench_code", keep=(("subset", "hep*"),), **_REWARD_BENCH),
    DatasetSpec(name="persona", source=f"{PERSONA}{persona.HUB_ID}"),
    DatasetSpec(
        name="persona_paraphrase",
        source=f"{PERSONA}{persona.HUB_ID}",
        train_split="train_paraphrase",
        test_split="test_paraphrase",
        rewriting_of="persona",
    ),
    DatasetSpec(name="tiny_world", source=f"{BUILTIN}tiny_world"),
    DatasetSpec(
        name="tiny_world_paraphrase", source=f"{BUILTIN}tiny_world_paraphrase", rewriting_of="tiny_world"
    ),
    DatasetSpec(name="hamiltonian", source=f"{BUILTIN}hamiltonian"),
    DatasetSpec(name="hamiltonian_verification", source=f"{BUILTIN}hamiltonian_verification"),
    DatasetSpec(name="hamiltonian_paper", source=f"{BUILTIN}hamiltonian_paper"),
)


def recipe(model: ModelSpec, train_set: DatasetSpec) -> OptimSpec:
    """The paper's hyperparameters; for built-in tiny models those found for the set, or for the tiny world."""
    if not model.source.startswith(BUILTIN):
        return PAPER_OPTIM
    return _TINY_OPTIM.get(train_set.name, _TINY_OPTIM["tiny_world"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What an experiment is made of where the command line does not say otherwise."""

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


def dataset(name: str) -> DatasetSpec:
    """The catalog's data set of that name. Raises KeyError."""
    return {spec.name: spec for spec in DATASETS}[name]


def _datasets(names: Iterable[str]) -> tuple[DatasetSpec, ...]:
    return tuple(dataset(name) for name in names)


PAPER = Profile(
    name="paper",
    models=PAPER_MODELS,
    train_sets=_datasets(["ultrafeedback", "rewardmath"]),
    eval_sets=_datasets(
        [
            "ultrafeedback",
            "ultrafeedback_paraphrase",
            "ultrafeedback_french",
            "ultrafeedback_spanish",
            "rewardbench_math",
            "rewardbench_code",
            "rewardmath",
        ]
    ),
    seeds=(0, 1, 2),
    max_train_pairs=2000,
    max_eval_pairs=200,
)
LAPTOP = Profile(
    name="laptop",
    models=TINY,
    train_sets=_datasets(["tiny_world", "hamiltonian"]),
    eval_sets=_datasets(["tiny_world", "tiny_world_paraphrase", "hamiltonian"]),
    seeds=(0,),
    max_train_pairs=None,
    max_eval_pairs=None,
    # Two cells as gangs, so that a laptop too exercises what a cluster does.
    placements=(
        PlacementRule(
            match=(("model", "gemma2-64"), ("reward", "ex_rm"), ("train", "tiny_world")),
            world_size=2,
            zero_stage=3,
        ),
        PlacementRule(
            match=(("model", "gemma2-64"), ("reward", "im_rm"), ("train", "tiny_world")),
            world_size=2,
            zero_stage=2,
        ),
    ),
)
PROFILES: Profiles = {profile.name: profile for profile in (PAPER, LAPTOP)}
MODELS = {spec.name: spec for spec in (*PAPER_MODELS, *TINY)}
