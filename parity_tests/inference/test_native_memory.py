"""The compiled step touches no memory but its arrays, whatever the shape and the vectors' width."""

import os
import platform
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

SHAPES = Path(__file__).with_name("decode_shapes.c")
# As the machine has them, and those of every x86.
WIDTHS = ["native", *(["x86-64"] if platform.machine() == "x86_64" else [])]
SANITIZERS = "-fsanitize=address,undefined", "-fno-sanitize-recover=all"


def sums(bits: int, width: str, folder: Path) -> list[float]:
    """Compile the step for weights of so many bits; return what it prints for all shapes."""
    compiler, program = shutil.which("gcc"), folder / f"{bits}-{width}"
    if compiler is None:
        pytest.skip("no gcc here")
    kernels = str(files("llama_torch.kernels"))
    flags = ["-O1", f"-march={width}", "-fopenmp", *SANITIZERS, f"-DSTORED={bits}", "-I", kernels]
    command = [compiler, *flags, str(SHAPES), "-o", str(program), "-lm"]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        if any(word in made.stderr for word in ("asan", "ubsan", "-march", "gomp")):
            pytest.skip("gcc has no sanitizers, no OpenMP or no such processor here")
        pytest.fail(made.stderr)
    # What is allocated is left to the end of the program. It must not use what this one preloads.
    settings = {"PATH": os.environ["PATH"], "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program], capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


@pytest.mark.parametrize(("bits", "tolerance"), [(64, 1e-12), (32, 1e-5), (16, 1e-3)])
def test_no_memory_but_its_own_is_touched_and_every_width_gives_the_same(
    bits: int, tolerance: float, tmp_path: Path
) -> None:
    found = [sums(bits, width, tmp_path) for width in WIDTHS]
    for other in found[1:]:
        pairs = zip(found[0], other, strict=True)
        scale = max(map(abs, other))
        assert max(abs(one - two) for one, two in pairs) <= tolerance * scale
