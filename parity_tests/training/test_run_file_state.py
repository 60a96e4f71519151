"""run.json with one value changed: refused in one line, or the run is the same."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_torch import export
from llama_torch.config import TrainConfig
from llama_torch.training import run_dir
from llama_torch.training.held_out import load_held_out
from llama_torch.training.run_file import check_resume_config, read_run

from ..support import state_files
from ..support.trainer_runs import refused


@pytest.fixture(scope="module")
def run(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("changed") / "run"
    shutil.copytree(whole, out)
    content = state_files.read(out / "run.json")
    content["lengths"] = [{"until_step": 2, "steps": 4}]
    state_files.write(out / "run.json", content)
    return out


@pytest.fixture(scope="module")
def content(run: Path) -> dict[str, Any]:
    return state_files.read(run / "run.json")


def resume(out: Path, key: str) -> TrainConfig:
    """Return the config with which the run is gone on with."""
    config = run_dir.resolve_config(["--resume", "--out", str(out)])
    check_resume_config(config, key)
    return config


def test_every_change_is_refused_before_a_flag_is_read(run: Path, content: dict[str, Any]) -> None:
    """By its checksum, whatever it changes."""
    expected = read_run(run)
    mutations = state_files.mutations(content, renew=False)

    def same(found: Any) -> bool:
        return bool(found == expected)

    assert state_files.failures(mutations, run / "run.json", lambda: read_run(run), same) == []
    state_files.write(run / "run.json", content)


@given(data=st.data())
def test_a_change_whose_checksum_was_renewed(
    run: Path, content: dict[str, Any], data: st.DataObject
) -> None:
    """Made elsewhere: no setting that determines the losses, nor the text, is another's."""
    place = data.draw(st.sampled_from(list(state_files.places(content))), label="place")
    change = data.draw(st.sampled_from(state_files.changes(content, place)), label="change")
    expected = content["identity"]
    mutation = state_files.mutate(content, place, change)

    def same(found: TrainConfig) -> bool:
        return found.identity() == expected

    def use() -> TrainConfig:
        return resume(run, content["data_key"])

    assert state_files.failures([mutation], run / "run.json", use, same, named="--resume") == []
    state_files.write(run / "run.json", content)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("model", "norm_eps", 1e-3), ("model", "rope_theta", 500.0), ("data", "val_fraction", 0.2)],
)
@pytest.mark.parametrize("table", ["settings", "identity"])
def test_settings_that_contradict_the_identity(
    run: Path,
    content: dict[str, Any],
    table: str,
    section: str,
    key: str,
    value: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An export would write another model's config; an evaluation read what was trained on."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    sections = content[table] | {section: content[table][section] | {key: value}}
    state_files.write(out / "run.json", content | {table: sections})
    message = f"{out}/run.json: {key} is "
    assert message in refused(["--resume", "--out", str(out)], capsys)
    assert export.main([str(out), "--to", str(tmp_path / "to")]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(run_dir.InputError, match=f"{key} is .* in its identity; put it back"):
        load_held_out(out)
