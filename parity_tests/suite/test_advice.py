"""The commands that close a red run: those that show the bug, and none where compare shows none."""

from types import SimpleNamespace

import pytest

from ..plugins.advice import comparison_commands, failed_checks

SPEC, HALF = f"{__name__}:Whole", f"{__name__}:Half"


class Whole:
    """A backend that computes in three precisions."""

    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")

    def logits(self) -> None: ...


class Half(Whole):
    """A backend that computes in bfloat16 alone."""

    dtypes = ("bfloat16",)


@pytest.mark.parametrize(
    ("spec", "failed", "flags"),
    [
        (SPEC, ["test_logits"], "--dtype float64"),
        (SPEC, ["test_logits_in[float32]"], ""),
        (SPEC, ["test_logits_in[bfloat16]", "test_directory"], "--dtype bfloat16"),
        (SPEC, ["test_logits_in[bfloat16]", "test_trace"], "--dtype float64"),
        (SPEC, ["test_loss_and_grads"], "--dtype float64 --grads"),
        (SPEC, ["test_logits", "test_training[1]"], "--dtype float64 --grads"),
        (SPEC, ["test_long_decoding"], "--tokens 300 --dtype float64"),
        (SPEC, ["test_long_logits", "test_logits"], "--dtype float64"),
        (HALF, ["test_logits", "test_training[1]"], ""),
    ],
)
def test_the_command_does_what_the_failed_checks_do(
    spec: str, failed: list[str], flags: str
) -> None:
    command = comparison_commands(spec, failed)[-1]
    expected = f"python -m llama_parity.compare tiny-llama --against {spec} {flags}"
    assert command == expected.rstrip()


@pytest.mark.parametrize(
    "failed",
    [
        [],
        ["test_directory"],
        ["test_key_of_config_json[rope_theta]", "test_unsupported_key[x]"],
        ["test_reused_cache", "test_packing"],
    ],
)
def test_no_command_where_compare_would_pass(failed: list[str]) -> None:
    assert comparison_commands(SPEC, failed) == []


def test_wrong_numbers_alone_count() -> None:
    """Not a check that passes where a failure was expected, nor one that writes to an array."""

    def report(check: str, **failure: str) -> SimpleNamespace:
        found = {"id": check, "backend": "mine"}
        return SimpleNamespace(check=found | ({"failure": failure} if failure else {}))

    reports = [
        report("test_logits", message="logits: 3 times its tolerance"),
        report("test_trace"),
        report("test_padding", message="decode changes the arrays that it is given (c): copy them"),
        SimpleNamespace(),  # of a test that is not of the conformance suite
    ]
    assert failed_checks(reports) == {"mine": ["test_logits"]}
    assert failed_checks(reports[1:]) == {}
