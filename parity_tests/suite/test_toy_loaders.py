"""Ports that read model directories: green when honest, red with the key that is not read."""

import re

import pytest

from ..conformance.config_keys import KEYS, UNSUPPORTED
from ..support.suite_runs import suite
from . import toy_file_loaders

PORTS = "parity_tests.suite.toy_loaders:"
FILES = "parity_tests.suite.toy_file_loaders:"
# A reader with a bug, the end of a failing test's name, and words of the report.
BUGS = {
    "FixedEpsilon": (
        "key_of_config_json[{}-rms_norm_eps (transformers 5)]",
        "config.json: rms_norm_eps (transformers 5): is not read: the logits are those with 1e-05",
    ),
    "FixedLowFactor": (
        "key_of_config_json[{}-rope_parameters.low_freq_factor (transformers 5)]",
        "rope_parameters.low_freq_factor (transformers 5): is not read: the logits are those",
    ),
    "FixedOriginalContext": (
        "key_of_config_json[{}-rope_scaling.original_max_position_embeddings (transformers 4)]",
        "is not read: the logits are those with 8192",
    ),
    "ScalingUnread": (
        "key_of_config_json[{}-rope_scaling.rope_type llama3 (transformers 4)]",
        "llama3 (transformers 4): is not read: the logits are those with no scaling",
    ),
    "TiedByDefault": (
        "key_of_config_json[{}-tie_word_embeddings left out (transformers 5)]",
        "tie_word_embeddings left out (transformers 5): the logits are those with true",
    ),
    "NewPlaceUnread": (
        "key_of_config_json[{}-rope_parameters.rope_theta (transformers 5)]",
        "rope_parameters.rope_theta (transformers 5): is not read: the logits are those with 10000",
    ),
    "OldTypeUnread": (
        "key_of_config_json[{}-rope_scaling.type (transformers 4)]",
        "rope_scaling.type (transformers 4): is not read",
    ),
    "HeadDimDerived": (
        "key_of_config_json[{}-head_dim (transformers 4)]",
        "config.json: head_dim (transformers 4): from_directory failed: ",
    ),
    "AlwaysTied": (
        "key_of_config_json[{}-tie_word_embeddings false (transformers 4)]",
        "config.json: tie_word_embeddings false (transformers 4): is not read: the logits are th",
    ),
    "NeverTied": (
        "key_of_config_json[{}-tie_word_embeddings (transformers 5)]",
        "config.json: tie_word_embeddings (transformers 5): from_directory failed: KeyError",
    ),
    "KeyHeadsUnread": (
        "key_of_config_json[{}-num_key_value_heads (transformers 5)]",
        "config.json: num_key_value_heads (transformers 5): from_directory failed: ",
    ),
    "HeadsFixed": (
        "key_of_config_json[{}-num_attention_heads (transformers 4)]",
        "config.json: num_attention_heads (transformers 4): is not read: the logits are those wi",
    ),
    "HeadDimRequired": (
        "key_of_config_json[{}-head_dim left out (transformers 5)]",
        "config.json: head_dim left out (transformers 5): from_directory failed: KeyError",
    ),
    "BaseLostWithLinear": (
        "key_of_config_json[{}-rope_scaling.rope_type linear (transformers 4)]",
        "linear (transformers 4): the logits are those with rope_theta 10000",
    ),
    "BaseOfOldPlace": (
        "key_of_config_json[{}-rope_parameters.rope_type llama3 (transformers 5)]",
        "llama3 (transformers 5): the logits are those with rope_theta 10000",
    ),
    "OriginalOfMaximum": (
        "key_of_config_json[{}-rope_scaling.factor (transformers 4)]",
        "the logits are those with original_max_position_embeddings 64, which is max_position_emb",
    ),
    "EveryScalingLinear": (
        "key_of_config_json[{}-rope_scaling.rope_type llama3 (transformers 4)]",
        "llama3 (transformers 4): the logits are those with rope_type linear",
    ),
    "IntegerFactors": (
        "key_of_config_json[{}-rope_parameters.rope_type linear (transformers 5)]",
        "linear (transformers 5): is not read: the logits are those with 2\n",
    ),
    "SquareHeadTransposed": (
        "key_of_config_json[{}-vocab_size and intermediate_size as hidden_size (transformers 5)]",
        "vocab_size and intermediate_size as hidden_size (transformers 5): logits: ",
    ),
    "LayersSortedAsText": (
        "key_of_config_json[{}-num_hidden_layers (transformers 5)]",
        "config.json: num_hidden_layers (transformers 5): logits: ",
    ),
    "HeadDimOfKeyHeads": (
        "key_of_config_json[{}-head_dim left out (transformers 4)]",
        "config.json: head_dim left out (transformers 4): logits: ",
    ),
    "FirstShardAlone": ("directory[{}]", "two shards and an index"),
    "Bfloat16TakenForFloat16": ("directory[{}]", "bfloat16, "),
    "NullRefused": ("directory[{}]", "optional keys null"),
    "PaddingMasked": (
        "key_of_config_json[{}-pad_token_id as eos_token_id (transformers 5)]",
        "config.json: pad_token_id as eos_token_id (transformers 5): logits: ",
    ),
    "PaddingZeroed": (
        "key_of_config_json[{}-pad_token_id as eos_token_id (transformers 4)]",
        "config.json: pad_token_id as eos_token_id (transformers 4): logits: ",
    ),
    "OneEndToken": (
        "key_of_config_json[{}-eos_token_id a list (transformers 5)]",
        "config.json: eos_token_id a list (transformers 5): from_directory failed: TypeError",
    ),
    "BaseMustBeFloat": (
        "key_of_config_json[{}-rope_theta an integer (transformers 5)]",
        "rope_theta an integer (transformers 5): from_directory failed: TypeError: rope_theta: exp",
    ),
    "LaterKeysRequired": (
        "key_of_config_json[{}-keys left out that the first files lack (transformers 4)]",
        "first files lack (transformers 4): from_directory failed: KeyError: 'mlp_bias'",
    ),
    "DtypeOfConfig": (
        "key_of_config_json[{}-dtype unlike the tensors' (transformers 4)]",
        "config.json: dtype unlike the tensors' (transformers 4): logits: ",
    ),
    "HeldInFloat16": (
        "key_of_config_json[{}-bfloat16 numbers above 65504 (transformers 5)]",
        "the weights: bfloat16 numbers above 65504 (transformers 5): ",
    ),
    "StoredFrequencies": (
        "key_of_config_json[{}-rotary_emb.inv_freq stored (transformers 4)]",
        "rotary_emb.inv_freq stored (transformers 4): the logits are those with the stored frequ",
    ),
    "TableOf2048": (
        "key_of_config_json[{}-max_position_embeddings 4096 (transformers 5)]",
        "max_position_embeddings 4096 (transformers 5): the logits are wrong from token 2,048 on",
    ),
    "NothingRefused": (
        "unsupported_key[{}-attention_bias true (transformers 4)]",
        "config.json: attention_bias true (transformers 4): is not read: the logits are those wi",
    ),
    "IntegerFactorsInBfloat16": (
        "key_of_config_json[{}-rope_parameters.factor (transformers 5)]",
        "rope_parameters.factor (transformers 5): is not read: the logits are those with 1\n",
    ),
    "NormsPlusOne": (
        "key_of_config_json[{}-rms_norm_eps (transformers 5)]",
        "; a plain directory fails too, so it need not be this key",
    ),
}
FILE = "parity_tests/conformance/test_directories.py"
HONEST = suite("parity_tests/conformance", f"--backend={PORTS}Reader")
SELECTIVE = suite(FILE, f"--backend={PORTS}Selective", "-k", "key_of")
EPSILON = suite(FILE, f"--backend={PORTS}SmallEpsilonAndHeadDimRequired", "-k", "key_of")
UNNAMED = suite(FILE, f"--backend={PORTS}NormsPlusOne", "-k", "key_of")


def port(name: str) -> str:
    """Return the module and the name of a reader."""
    return f"{FILES if hasattr(toy_file_loaders, name) else PORTS}{name}"


RED = suite(
    *(f"{FILE}::test_{test.format(port(name))}" for name, (test, _) in BUGS.items()),
    *(f"--backend={port(name)}" for name in BUGS),
    *("--hypothesis-profile", "unshrunk"),
)
NOT_A_FUNCTION = suite(
    f"{FILE}::test_directory[{FILES}NotAFunction]", f"--backend={FILES}NotAFunction"
)
RAISES = suite(FILE, f"--backend={FILES}Raises", "-k", "every")
UNREFUSED = suite(FILE, f"--backend={FILES}NothingRefused", "-k", "unsupported")
HIDDEN = suite(FILE, f"--backend={FILES}NothingRefusedAndSmallEpsilon", "-k", "unsupported")
ASSERTS = suite(FILE, f"--backend={FILES}RefusesByAssertion", "-k", "unsupported")
IN_BFLOAT16 = "parity_tests.suite.toy_transformers:TransformersInBfloat16"
SUPPORTED = suite(FILE, f"--backend={IN_BFLOAT16}", "-k", "key")


def test_an_honest_reader_is_green_without_mapped_weights() -> None:
    done = HONEST.done()
    assert done.returncode == 0, done.stdout
    found = re.search(r"Reader: (\d+) compared, (\d+) not covered", done.stdout)
    assert found is not None
    assert int(found[1]) >= 40 + len(KEYS)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_red_and_named(name: str) -> None:
    test, words = BUGS[name]
    output = RED.done().stdout
    report = re.search(
        rf"_ test_{re.escape(test.format(port(name)))} _+\n(.*?)\n[_=]", output, re.DOTALL
    )
    assert report is not None, output
    assert words in report[1]
    assert len(report[1].splitlines()) <= 12


def test_a_near_epsilon_is_told_from_the_usual_one() -> None:
    output = EPSILON.done().stdout
    usual = (
        "every key as in the first Llama (transformers 5): the logits are those with rms_norm_eps 1"
    )
    assert f"config.json: {usual}e-06" in output
    assert "rms_norm_eps (transformers 5): is not read: the logits are those with 1e-06" in output
    # An error that is raised for this key alone is of this key.
    raised = "head_dim left out (transformers 5): from_directory failed: KeyError: 'head_dim'\n"
    assert raised in output


def test_a_fault_of_every_directory_is_one_line_for_each_other_key() -> None:
    reports = re.findall(
        r"^_ test_key_of_config_json\[\S+-(.*?)\] _+\n(.*?)(?=\n[_=])",
        EPSILON.done().stdout,
        re.DOTALL | re.MULTILINE,
    )
    others = [
        (key, report)
        for key, report in reports
        if report.startswith(
            f"config.json: {key}: is right; the logits are those with rms_norm_eps"
        )
    ]
    assert len(others) > 30
    assert all(len(report.splitlines()) == 1 for _, report in others)
    plain = dict(reports)["every key as in the first Llama (transformers 5)"]
    assert "\nerror      " in plain
    assert "\nconfig     " in plain


def test_a_fault_of_every_directory_without_a_name_is_one_line_for_each_key() -> None:
    output = UNNAMED.done().stdout
    short = re.findall(
        r"^config.json: .*; a plain directory fails too, so .*(?=\n[_=])", output, re.M
    )
    assert len(short) > 30
    assert output.count("\nerror      ") == 2  # of the plain ones alone


def test_a_report_of_a_key_has_no_example_of_the_test_before() -> None:
    name = "NormsPlusOne"  # which runs after tests that draw
    test = re.escape(f"test_{BUGS[name][0].format(port(name))}")
    reports = re.findall(rf"^_ {test} _+$(.*?)^[_=]", RED.done().stdout, re.DOTALL | re.MULTILINE)
    assert len(reports) == 1
    assert "drawn" not in reports[0]


def test_a_failure_of_one_key_is_of_that_key_alone() -> None:
    assert RED.done().stdout.count("a plain directory fails too") == 1


def test_a_result_that_is_no_function_is_told_in_one_line_without_a_search() -> None:
    done = NOT_A_FUNCTION.done()
    sentence = "from_directory returned ndarray: return a function from tokens [B, T] to logits"
    assert re.search(rf"^{re.escape(sentence)}", done.stdout, re.MULTILINE)
    assert "Traceback" not in done.stdout
    compared = re.search(r"directory +(\d+) compared", done.stdout)
    assert compared is None or int(compared[1]) == 0


def test_a_key_on_which_a_reader_fails_names_the_line_that_raised() -> None:
    line = re.compile(r"^at         \S+toy_file_loaders.py:\d+ in from_directory: raise", re.M)
    assert len(line.findall(RAISES.done().stdout)) == 2  # the plain directories


def test_a_refused_key_is_not_covered() -> None:
    done = SELECTIVE.done()
    assert done.returncode == 0, done.stdout
    assert "grouped queries" in done.stdout


def test_a_directory_of_another_architecture_is_no_plain_llama() -> None:
    """A reader that computes what the file says is green; the honest one above refuses."""
    for run in (UNREFUSED, HIDDEN):
        output = run.done().stdout
        for key in UNSUPPORTED:
            assert f"config.json: {key}: is not read: the logits are those without it" in output
    assert ASSERTS.done().returncode == 0, ASSERTS.done().stdout
    done = SUPPORTED.done()
    assert done.returncode == 0, done.stdout
