"""The data sets that are known by name; importing this imports nothing heavy.

A revision that is None is resolved at the first fetch and remembered with the rows (paper §2 names one only).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from trainers.data import persona
from trainers.specs import BUILTIN, FETCHED, PERSONA, DatasetSpec, DrawSpec

ULTRAFEEDBACK_REVISION = "3949bf5f8c17c394422ccfab0c31ea9c20bdeb85"
REWRITES_COMMIT = "58357b566814ea51d4e54bae8ace751889a22c14"
# Of the draws of a part of prepared pairs (paper §1).
SUBSET_SEED = 517
REWRITES_VARIABLE = "RMSWEEP_REWRITES_URL"
_REWRITES_URL = f"https://raw.githubusercontent.com/princeton-pli/exrm-vs-imrm/{REWRITES_COMMIT}"
_REWRITTEN_FROM = (
    "gpt-4.1_ultrafeedback_seed_982_ntrain_2000_ntest_200_no_translate_prompts_2025_04_19-17_01_44"
)

# Folder of each rewriting in that repository.
REWRITES: Mapping[str, str] = MappingProxyType(
    {
        "ultrafeedback_paraphrase": f"data_files/rewritten/rewrite_{_REWRITTEN_FROM}_2025_04_19-19_21_58",
        "ultrafeedback_french": f"data_files/rewritten/translate_french_{_REWRITTEN_FROM}_2025_04_19-19_37_54",
        "ultrafeedback_spanish": f"data_files/rewritten/translate_spanish_{_REWRITTEN_FROM}_2025_04_19-19_38_08",
    }
)


def rewrites_url(name: str, split: str) -> str:
    """Address of a split of a rewriting; $RMSWEEP_REWRITES_URL is the base of a mirror."""
    base = (os.environ.get(REWRITES_VARIABLE) or _REWRITES_URL).rstrip("/")
    return f"{base}/{REWRITES[name]}/{split}/data-00000-of-00001.arrow"


def _rewriting(name: str) -> DatasetSpec:
    return DatasetSpec(
        name=name, source=f"{FETCHED}{name}", revision=REWRITES_COMMIT, rewriting_of="ultrafeedback"
    )


DATASETS = (
    DatasetSpec(
        name="ultrafeedback",
        source="HuggingFaceH4/ultrafeedback_binarized",
        revision=ULTRAFEEDBACK_REVISION,
        selection="ultrafeedback",
    ),
    *(_rewriting(name) for name in REWRITES),
    # 2000 pairs were prepared and 1000 of them trained on.
    DatasetSpec(
        name="rewardmath",
        source="RewardMATH/RewardMATH_pairwise",
        selection="rewardmath",
        train_draw=DrawSpec(max_pairs=1000, seed=SUBSET_SEED, permutation="torch"),
    ),
    DatasetSpec(name="rewardbench_math", source="allenai/reward-bench", selection="rewardbench_math"),
    DatasetSpec(name="rewardbench_code", source="allenai/reward-bench", selection="rewardbench_code"),
    DatasetSpec(name="rewardbench2", source="allenai/reward-bench-2", selection="rewardbench2"),
    DatasetSpec(name="persona", source=f"{PERSONA}{persona.HUB_ID}"),
    DatasetSpec(
        name="persona_paraphrase",
        source=f"{PERSONA}{persona.HUB_ID}",
        train_split="train_paraphrase",
        test_split="test_paraphrase",
        rewriting_of="persona",
    ),
    DatasetSpec(name="hamiltonian_paper", source=f"{BUILTIN}hamiltonian_paper"),
    DatasetSpec(name="tiny_world", source=f"{BUILTIN}tiny_world"),
    DatasetSpec(
        name="tiny_world_paraphrase", source=f"{BUILTIN}tiny_world_paraphrase", rewriting_of="tiny_world"
    ),
    DatasetSpec(name="tiny_world_candidates", source=f"{BUILTIN}tiny_world_candidates"),
    DatasetSpec(name="hamiltonian", source=f"{BUILTIN}hamiltonian"),
    DatasetSpec(name="hamiltonian_verification", source=f"{BUILTIN}hamiltonian_verification"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a named set before it is fetched: pairs of each split (None: not known), and a sentence."""

    train: int | None
    test: int | None
    about: str


_REWRITTEN = "the responses of UltraFeedback's pairs rewritten by gpt-4.1-2025-04-14"
FACTS: Mapping[str, Facts] = MappingProxyType(
    {
        "ultrafeedback": Facts(train=2000, test=200, about="the paper's filters and draw, seed 982"),
        "ultrafeedback_paraphrase": Facts(train=200, test=200, about=_REWRITTEN),
        "ultrafeedback_french": Facts(train=200, test=200, about=_REWRITTEN),
        "ultrafeedback_spanish": Facts(train=200, test=200, about=_REWRITTEN),
        "rewardmath": Facts(
            train=2000, test=200, about="split by pair as in the paper: its test leaks; 1000 are trained on"
        ),
        "rewardbench_math": Facts(train=34, test=200, about="subset math-prm"),
        "rewardbench_code": Facts(train=84, test=200, about="subsets hep-*"),
        "rewardbench2": Facts(train=0, test=None, about="one correct against each incorrect, without Ties"),
        "persona": Facts(train=80, test=40, about="agreeableness, seed 875"),
        "persona_paraphrase": Facts(train=320, test=160, about="persona in other words, four pairings each"),
        "hamiltonian_paper": Facts(train=1000, test=200, about="10 vertices, p = 0.2, seed 982"),
        "tiny_world": Facts(train=80, test=40, about="built in"),
        "tiny_world_paraphrase": Facts(train=80, test=40, about="built in"),
        "tiny_world_candidates": Facts(train=480, test=240, about="built in, 12 responses a prompt"),
        "hamiltonian": Facts(train=32, test=32, about="built in, 5 vertices"),
        "hamiltonian_verification": Facts(train=1000, test=200, about="built in, 5 vertices"),
    }
)


def named_set(name: str) -> DatasetSpec | None:
    """The set of that name, if there is one."""
    return next((spec for spec in DATASETS if spec.name == name), None)
