"""The pages are right: code runs, links have targets, names exist, drawings are current.

A ``python`` block runs in an empty folder; after ``<!-- run in: run -->`` in one with a small
model in runs/1; after ``<!-- not run: REASON -->`` it is only compiled.
"""

import importlib
import re
from pathlib import Path

import pytest

from llama_torch.model.config import ModelConfig

from ..backends.torch_model import write_model
from ..support import diagram, import_table
from ..support.documents import (
    ROOT,
    Block,
    anchors,
    blocks,
    links,
    pages,
    prose,
    spans,
)
from ..support.import_table import PACKAGES, sources
from ..support.tokenizers import byte_level

TEXTS = pages()
BLOCKS = [block for page, text in TEXTS.items() for block in blocks(page, text)]
LANGUAGES = {"", "sh", "python", "py", "mermaid", "yaml"}
SOURCES = sources(ROOT)


# Code


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "runs/1").mkdir(parents=True)
    config = ModelConfig(
        dim=8, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=64, vocab_size=2200
    )
    write_model(folder / "runs/1", config)
    byte_level(folder / "runs/1")  # GPT-2's takes seconds to read
    return folder


def run_code(block: Block) -> None:
    """Run a block of Python in this process; an error names its page and line."""
    code = compile("\n" * (block.line - 1) + block.text, str(ROOT / block.page), "exec")
    if block.note[0] != "not run":
        exec(code, {"__name__": "block"})


PYTHON = [block for block in BLOCKS if block.language == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_code_runs(
    block: Block, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert block.note in [("", ""), ("run in", "run")] or block.note[0] == "not run"
    monkeypatch.chdir(run_folder if block.note == ("run in", "run") else tmp_path)
    run_code(block)


def test_code_that_is_wrong_would_be_seen() -> None:
    text = "```python\nfrom llama_torch import lod\n```\n"
    [block] = blocks("page.md", text)
    with pytest.raises(ImportError, match="lod"):
        run_code(block)
    [block] = blocks("page.md", "<!-- not run: needs a GPU -->\n" + text)
    assert block.note == ("not run", "needs a GPU")
    run_code(block)
    [block] = blocks("page.md", "<!-- not run: needs a GPU -->\n```python\nx = = 1\n```\n")
    with pytest.raises(SyntaxError):
        run_code(block)


def test_every_block_has_a_language_that_is_checked() -> None:
    assert {block.language for block in BLOCKS} <= LANGUAGES
    assert len(PYTHON) >= 3


# Links and names


def broken_links(page: str, text: str) -> list[str]:
    """Return the link targets of a page that do not exist."""
    wrong = []
    for link in links(text):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        there = TEXTS.get(str(target.resolve().relative_to(ROOT)), "") if path else text
        if not target.exists() or (anchor and anchor not in anchors(there)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    assert not broken_links(page, TEXTS[page])


def test_a_broken_link_would_be_seen() -> None:
    text = "# One\n\n[a](#one) [b](#two) [c](docs/nothing.md) ![e](x.png)"
    text += " [d](docs/compare.md#nothing) [f](https://example.org) [g](docs/compare.md#flags)"
    wrong = ["#two", "docs/nothing.md", "x.png", "docs/compare.md#nothing"]
    assert broken_links("README.md", text) == wrong


def test_the_drawings_are_the_import_tables() -> None:
    text = diagram.PAGE.read_text(encoding="utf-8")
    assert diagram.redrawn(text) == text, "run python -m parity_tests.support.diagram"


def test_another_drawing_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    text = diagram.PAGE.read_text(encoding="utf-8")
    monkeypatch.setitem(import_table.ALLOWED, "llama_torch.model", ("llama_torch.data",))
    assert "model --> data" in diagram.redrawn(text)
    with pytest.raises(ValueError, match="no block is marked"):
        diagram.redrawn(text.replace("drawn: inside", "drawn"))


def unknown_names(text: str) -> list[str]:
    """Return the paths and dotted names of the project in a page's text that do not exist."""
    wrong = []
    for span in spans(text):
        is_path = re.fullmatch(r"(?:\w+/)*\w+\.(?:py|md|sh|hpp|cpp)|(?:\w+/)+", span)
        if is_path and span.split("/")[0] in (*PACKAGES, "docs", "findings"):
            wrong += [] if (ROOT / span).exists() else [span]
        if re.fullmatch(r"\w+(\.\w+)+", span) and span.split(".")[0] in PACKAGES:
            wrong += [] if is_name(span) else [span]
    return wrong


def misplaced(page: str, text: str) -> list[str]:
    """Return each "`name` in [`file`](path)" of a page whose file does not define the name."""
    wrong = []
    for name, path in re.findall(r"`(\w+)`\s+in\s+\[`[^`]+`\]\(([^)]+\.py)\)", prose(text)):
        code = ((ROOT / page).parent / path).read_text(encoding="utf-8")
        if not re.search(rf"\b(def|class) {name}\b|^{name}\b", code, re.MULTILINE):
            wrong.append(f"{name} in {path}")
    return wrong


@pytest.mark.parametrize("page", TEXTS)
def test_files_define_what_the_text_says(page: str) -> None:
    assert not misplaced(page, TEXTS[page])


def test_a_name_in_the_wrong_file_would_be_seen() -> None:
    path = "[`model`](reference_np/model.py)"
    text = f"`forward` in {path}, `backward` in\n{path}"
    assert misplaced("README.md", text) == ["backward in reference_np/model.py"]


def is_name(dotted: str) -> bool:
    """Return whether a dotted name is a module of the project or an attribute of one."""
    module, _, name = dotted.rpartition(".")
    if dotted in SOURCES or not module:
        return dotted in SOURCES
    return module in SOURCES and hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("page", TEXTS)
def test_names_in_the_text_exist(page: str) -> None:
    if page == "CHANGELOG.md":  # tells of names that were
        return
    assert not unknown_names(TEXTS[page])


def test_an_unknown_name_would_be_seen() -> None:
    text = "`tools/compare.py` `tools/nothing.py` `llama_torch.load` `llama_torch.lod` `docs/x.md`"
    assert unknown_names(text) == ["tools/nothing.py", "llama_torch.lod", "docs/x.md"]
