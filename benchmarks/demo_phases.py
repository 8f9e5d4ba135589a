"""Where the time of a sweep's stages went: seconds summed over trials.

python benchmarks/demo_phases.py --storage rmsweep-store
"""

import json
from collections import defaultdict
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table


def main(storage: Path = Path("rmsweep-store")) -> None:
    """Print the table."""
    console = Console()
    seconds_of: dict[str, list[float]] = defaultdict(list)
    set_up: list[float] = []
    peaks: list[tuple[float, float]] = []
    for file in (storage / "artifacts").glob("*/*/manifest.json"):
        manifest = json.loads(file.read_text())
        seconds_of[manifest["stage"]].append(manifest["seconds"])
        if manifest["stage"] != "train":
            continue
        perf = manifest["info"]["perf"]
        set_up.append(perf["set_up_s"])
        if manifest["info"].get("local_mode"):
            peaks.append((manifest["started"], perf["peak_mem_gb"]))
    stages = Table(title="stages in the store", title_justify="left")
    for column in ("stage", "count", "sum s", "median s"):
        stages.add_column(column, justify="left" if column == "stage" else "right")
    for stage, values in sorted(seconds_of.items(), key=lambda item: -sum(item[1])):
        stages.add_row(
            stage, str(len(values)), f"{sum(values):.1f}", f"{sorted(values)[len(values) // 2]:.1f}"
        )
    stages.add_row(
        "(set-up within train)",
        str(len(set_up)),
        f"{sum(set_up):.1f}",
        f"{sorted(set_up)[len(set_up) // 2]:.1f}",
    )
    console.print(stages)
    in_order = [peak for _, peak in sorted(peaks)]
    if in_order:
        console.print(
            f"peak memory of trainings in reused processes, GB: first {in_order[0]:.2f}, last {in_order[-1]:.2f}, "
            f"largest {max(in_order):.2f}, of {len(in_order)}",
            soft_wrap=True,
        )


if __name__ == "__main__":
    tyro.cli(main)
