"""The tables that the throughput commands print, in Markdown."""

import statistics
from collections.abc import Mapping

from benchmarks.interleave import Measured, ratio_to_ours

_COLUMNS = (
    "contender",
    "median s",
    "fastest–slowest s",
    "pre-pass share s",
    "pairs/s",
    "tokens/s",
    "× ours",
    "peak GB",
    "last value",
)


def print_table(title: str, measured: Mapping[str, Measured], *, pairs: int, prepass_share: float) -> None:
    """One row a contender. A turn runs `pairs` pairs; rates and ratios count the pre-pass at its share.

    Tokens are those of both rows of a pair without padding, so that tokens/s compares contenders. The last value is
    the loss or the mean margin of the last turn: contenders that compute the same agree on it.
    """
    seconds = {name: found.seconds(prepass_share=prepass_share) for name, found in measured.items()}
    print(f"\n{title}\n")
    print("| " + " | ".join(_COLUMNS) + " |")
    print("|---" + "|---:" * (len(_COLUMNS) - 1) + "|")
    for name, found in measured.items():
        alone, whole = found.seconds(), statistics.median(seconds[name])
        tokens = statistics.median(turn["tokens"] for turn in found.turns)
        cells = (
            name,
            f"{statistics.median(alone):.3f}",
            f"{min(alone):.3f}–{max(alone):.3f}",
            f"{found.ready['prepass_seconds'] * prepass_share:.3f}",
            f"{pairs / whole:.3f}",
            f"{tokens / whole:.0f}",
            f"{ratio_to_ours(seconds, name):.2f}",
            f"{max(turn['peak_bytes'] for turn in found.turns) / 1e9:.2f}",
            f"{found.value:.7f}",
        )
        print("| " + " | ".join(cells) + " |", flush=True)
