"""What runs where and when: knows Ray and MLflow, knows no tensors. From Python: `from orchestrator import grid, open_sweep`."""

from typing import TYPE_CHECKING, Any

__all__ = ["grid", "open_sweep"]

if TYPE_CHECKING:
    from orchestrator.notebook import grid, open_sweep


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: `import orchestrator` alone costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orchestrator import notebook

    return getattr(notebook, name)
