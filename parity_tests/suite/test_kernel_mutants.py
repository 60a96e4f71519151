"""Every fault of gpu_faults changes one place of the code; kernel_mutants.py runs them on a GPU."""

import ast

import pytest

from ..gpu_faults import FAULTS, Fault
from ..gpu_faults.kernel_mutants import PACKAGE, mutated


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_changes_one_place_and_leaves_a_program(fault: Fault) -> None:
    before = (PACKAGE / fault.file).read_text()
    assert before.count(fault.old) == 1
    assert ast.dump(ast.parse(mutated(fault, before))) != ast.dump(ast.parse(before))


def test_every_fault_has_a_name_of_its_own() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
