"""Where the time of a sweep's stages went: seconds summed over trials.

python benchmarks/demo_phases.py --storage rmsweep-store
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path

import tyro


def main(storage: Path = Path("rmsweep-store")) -> None:
    """Print the table."""
    seconds: dict[str, list[float]] = defaultdict(list)
    peaks: list[tuple[float, float]] = []
    for file in (storage / "artifacts").glob("*/*/manifest.json"):
        manifest = json.loads(file.read_text())
        info = manifest["info"]
        seconds[manifest["stage"]].append(manifest["seconds"])
        if manifest["stage"] == "train":
            seconds["(set-up within train)"].append(info["perf"]["set_up_s"])
            if info.get("local_mode"):
                peaks.append((manifest["started"], info["perf"]["peak_mem_gb"]))
    print(f"\n{'stages in the store':24}{'count':>8}{'sum s':>10}{'median s':>10}")
    for stage, values in sorted(seconds.items(), key=lambda item: -sum(item[1])):
        print(f"{stage:24}{len(values):8}{sum(values):10.1f}{statistics.median(values):10.1f}")
    in_order = [peak for _, peak in sorted(peaks)]
    if in_order:
        print(
            f"peak memory of trainings in reused processes, GB: first {in_order[0]:.2f}, last {in_order[-1]:.2f}, "
            f"largest {max(in_order):.2f}, of {len(in_order)}"
        )


if __name__ == "__main__":
    tyro.cli(main)
