"""Run the numeric tests with the kernels of other processors.

``python -m parity_tests.support.processors`` runs the numeric tests once for each group of settings
that make PyTorch and NumPy choose the kernels of another processor, and prints the results. Exit
code 0: all passed, 1: not. Kernels that need a newer processor than this are listed as not run,
and so are this processor's own, with which every other run computes.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..plugins.processor import PROCESSORS, Processor, describe, features

ROOT = Path(__file__).parent.parent.parent


def run(processor: Processor, arguments: Sequence[str]) -> tuple[bool, str]:
    """Run the numeric tests with a processor's kernels; return whether they passed, and output."""
    command = [sys.executable, "-m", "pytest", "parity_tests", "-q", "-m", "numeric"]
    command += ["--hypothesis-profile", "quick", *arguments]
    given = os.environ | processor.settings
    found = subprocess.run(
        command, cwd=ROOT, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return found.returncode == 0, found.stdout


def main(arguments: Sequence[str]) -> int:
    """Run every processor's tests; pass what follows on the command line to pytest."""
    importlib.import_module("torch")  # for the line that describes this machine
    green = True
    print(describe())
    for processor in PROCESSORS:
        if processor.needs and processor.needs not in features():
            print(f"{processor.name}: not run, this processor has no {processor.needs}", flush=True)
            continue
        if processor.newer not in features():
            print(f"{processor.name}: not run, no {processor.newer} to do without", flush=True)
            continue
        passed, output = run(processor, arguments)
        print(f"{processor.name}: {output.strip().splitlines()[-1]}", flush=True)
        if not passed:
            green = False
            settings = " ".join(f"{key}={value}" for key, value in processor.settings.items())
            print(f"{output}\nrepeat with {settings} pytest parity_tests/ -m numeric", flush=True)
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
