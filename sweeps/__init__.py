"""One file per experiment; each declares a Sweep and is a command. `rmsweep NAME …` runs the file of that name."""

import ast
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the experiment that the first word names, as `python sweeps/NAME.py` would; without one, list them all."""
    from trainers.command import for_any_reader, write_any_text
    from trainers.errors import nearest

    write_any_text()
    files = {file.stem: file for file in sorted(Path(__file__).parent.glob("[!_]*.py"))}
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        with for_any_reader():
            print("usage: rmsweep EXPERIMENT [run | plan | status | report | ui | retry | sync | gc] …\n")
            width = max(map(len, files))
            for known, file in files.items():
                said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
                print(f"  {known:{width}}  {said.splitlines()[0]}")
            print("\nrmsweep EXPERIMENT --help tells its flags.")
        return
    chosen = files.get(name.replace("-", "_"))
    if chosen is None:
        print(f"error: no experiment is called {name}; {nearest(name, files)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [str(chosen), *words]
    runpy.run_path(str(chosen), run_name="__main__")
