"""Others' code in a Python of its own: the one that --reference-python names."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from emu_cog.errors import CheckpointError


def run_other_python(python: Path, arguments: Sequence[Path | str], *, what: str, needs: str) -> Mapping[str, str]:
    """Run the script and its `arguments` in the interpreter `python`; returns the versions in the last line that it
    prints, JSON. CheckpointError says why `what` can't be run there, and which packages it `needs`."""
    try:
        done = subprocess.run(
            # -I: nothing of this project's environment reaches the other Python
            [python, "-I", *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise CheckpointError(
            f"--reference-python {python} can't be run ({error.strerror}): name the python of an environment with "
            f"{needs}"
        ) from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        raise CheckpointError(
            f"{what} failed in --reference-python {python}, which must have {needs}: "
            f"{errors[-1] if errors else f'exit code {done.returncode}'}"
        )
    versions: Mapping[str, str] = json.loads(done.stdout.splitlines()[-1])
    return versions
