"""Pushes trained models to the hub: the folder that transformers loads with its card, private unless told otherwise.

The token is HF_TOKEN or that of `hf auth login`; it is stored nowhere else.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from trainers.errors import SpecError, TrialFailed
from trainers.pairs.templates import first_line


def open_repository(name: str, *, public: bool) -> None:
    """Create a repository unless it exists. Raises SpecError if it takes no push, or is public and should not be."""
    from huggingface_hub import HfApi

    if name.count("/") != 1:
        raise SpecError(f"{name!r} is no name on the hub; give ORG/NAME.")
    with _said(SpecError, f"the hub does not open {name} for the token of HF_TOKEN or hf auth login"):
        HfApi().create_repo(name, private=not public, exist_ok=True)
        shown = not HfApi().model_info(name).private
    if shown and not public:
        raise SpecError(f"{name} is public on the hub; give another name, or say public, too.")


def require_base_on_hub(base: str) -> None:
    """Raise SpecError if an adapter's base model is a local folder, which others do not have."""
    if Path(base).expanduser().exists():
        raise SpecError(
            f"an adapter is of no use on the hub without its base, the folder {base}; push it merged."
        )


def push(folder: Path, name: str) -> str:
    """Push a model's folder to an existing repository, and return its address. Raises TrialFailed."""
    from huggingface_hub import HfApi

    with _said(TrialFailed, f"{folder} is sound, but could not be pushed to {name}"):
        return str(
            HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="by rmsweep").repo_url
        )


@contextlib.contextmanager
def _said(kind: type[SpecError] | type[TrialFailed], what: str) -> Iterator[None]:
    try:
        yield
    # Errors of its HTTP library come through, too.
    except Exception as error:
        parts = [
            first_line(part).rstrip(".") for part in (error, error.__cause__) if isinstance(part, Exception)
        ]
        raise kind(f"{what}: {': '.join(dict.fromkeys(parts))}") from None
