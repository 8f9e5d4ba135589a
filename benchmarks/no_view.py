"""What stands in the place of MLflow's writer where it is not what is measured; it has a benchmark of its own."""


class NoView:
    """A view that shows nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def shows(self, key: str) -> bool:
        """No trial has a run."""
        return False

    def started(self, key: str) -> None:
        """Nothing to note."""

    def ended(self, key: str, *, failed: bool) -> None:
        """Nothing to note."""

    def close(self, *_: object, **__: object) -> None:
        """Nothing is open."""
