"""Every Python example of the documents runs as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)


def examples() -> Iterator[tuple[str, str]]:
    """Answer each fenced Python block with its place."""
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 2
            yield f"{document}:{line}", match[1]


EXAMPLES = dict(examples())


@pytest.mark.parametrize("place", EXAMPLES)
def test_the_example_runs_when_pasted(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(EXAMPLES[place], place, "exec"), {"__name__": "__main__"})


def test_the_readme_has_examples() -> None:
    assert any(place.startswith("README.md") for place in EXAMPLES)


def test_an_example_that_validates_on_inputs_shows_what_they_show() -> None:
    validating = [code for code in EXAMPLES.values() if re.search(r"\bvalidate\([^)]*inputs=", code)]
    assert validating
    assert all("output_sqnr_db" in code for code in validating)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target
