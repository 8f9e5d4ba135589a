"""Whether the hub lets us have the models: a licence not accepted, a token missing, said of all of them at once."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestrator.spec.models import HUB_ID
from trainers.errors import ModelError
from trainers.specs import BUILTIN, ModelSpec


def require(models: Iterable[ModelSpec]) -> None:
    """Raises ModelError that names every model to which the hub denies access; nothing happens offline."""
    found = denied(models)
    if found:
        raise ModelError(message(found))


def denied(models: Iterable[ModelSpec]) -> dict[str, str]:
    """Name of each hub model that we may not have → why. What the hub does not answer is not in it."""
    wanted = [model for model in dict.fromkeys(models) if _is_remote(model)]
    if not wanted or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        answers = list(pool.map(_why_denied, [model.source for model in wanted]))
    return {model.name: why for model, why in zip(wanted, answers, strict=True) if why}


def message(found: dict[str, str]) -> str:
    """What the user is told, one line for each model."""
    lines = [f"{name}: {why}" for name, why in sorted(found.items())]
    return "\n".join(
        [
            "these models cannot be had from the hub:",
            *lines,
            "Accept the licences on the models' pages, and set HF_TOKEN; or give local folders with --models NAME=PATH.",
        ]
    )


def _is_remote(model: ModelSpec) -> bool:
    local = model.source.startswith(BUILTIN) or Path(model.source).exists()
    return not local and HUB_ID.fullmatch(model.source) is not None


def _why_denied(source: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().auth_check(source)
    except GatedRepoError:
        return f"{source} is gated, and its licence is not accepted by the account of the token (or there is none)"
    except RepositoryNotFoundError:
        return f"the hub knows no {source}, or not for this token"
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        return f"the token is refused for {source}" if status in (401, 403) else ""
    # Offline, in whatever way: nothing is known, and nothing is refused.
    except Exception:
        return ""
    return ""
