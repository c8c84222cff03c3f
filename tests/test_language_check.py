"""scripts/check_language.py finds phrases, long sentences and openings, and nothing in code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_language.py"
_spec = importlib.util.spec_from_file_location("check_language", SCRIPT)
language = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(language)

LONG = " ".join(["word"] * 31) + "."


def failures(source: str, name: str = "page.md") -> list[str]:
    return language.check(name, source)[0]


@pytest.mark.parametrize(
    "phrase",
    [
        "What was",
        "of its own",
        "is told",
        "in the place of",
        "beside",
        "whoever",
        "nobody",
        "had again",
        "goes on",
        "lies",
    ],
)
def test_a_phrase_fails_with_its_file_and_line(phrase: str) -> None:
    assert failures(f"Fine.\n\nIt says {phrase} here.") == [f"page.md:3: phrase: {phrase}"]


def test_a_phrase_is_found_across_a_line_break_and_in_a_table() -> None:
    assert failures("the first\nof its\nown kind") == ["page.md:2: phrase: of its own"]
    assert failures("| a | b |\n|---|---|\n| nobody | 1 |") == ["page.md:3: phrase: nobody"]


@pytest.mark.parametrize(
    "code",
    [
        "```\nnobody goes on\n```",
        "Text:\n\n    nobody goes on\n",
        "Call `nobody`.",
        "[page](beside.md)",
        "<!-- nobody -->",
        "Underlies, understands, besides.",
    ],
)
def test_code_and_link_targets_are_exempt(code: str) -> None:
    assert failures(code) == []


def test_a_long_sentence_fails() -> None:
    assert failures(LONG)[0].startswith("page.md:1: sentence of 31 words")
    assert failures(LONG, "page.md")[0] == failures(f"Short. {LONG}")[0]
    assert failures(" ".join(["word"] * 30) + ".") == []


@pytest.mark.parametrize("text", [f"| {LONG} |", f"```\n{LONG}\n```", " ".join(["[two words](a.md)"] * 20)])
def test_tables_code_and_lists_of_links_may_be_long(text: str) -> None:
    assert failures(text) == []


def test_list_items_and_headings_are_sentences_of_their_own() -> None:
    half = " ".join(["word"] * 20)
    assert failures(f"# {half}\n- {half}\n- {half}\n1. {half}") == []
    assert failures(f"{half}\n{half}") != []


def test_docstrings_and_comments_are_read_and_code_is_not() -> None:
    source = '"""Whether it works.\n\nBeside it.\n"""\nnobody = "goes on"  # whoever\n'
    assert failures(source, "module.py") == [
        "module.py:3: phrase: Beside",
        "module.py:5: phrase: whoever",
        "module.py:1: docstring opens with: Whether",
    ]


@pytest.mark.parametrize("opening", ["What", "Where", "Whether", "As", "The same"])
def test_docstring_openings_fail(opening: str) -> None:
    assert failures(f'def f():\n    """{opening} x."""\n', "module.py") == [
        f"module.py:2: docstring opens with: {opening}"
    ]


def test_equations_and_doctests_may_be_long() -> None:
    assert failures(f'"""Return it.\n\n    y = {LONG}\n\n>>> {LONG}\n"""\n', "module.py") == []


def test_the_program_prints_totals_and_exits_with_1_on_failures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "README.md").write_text("It is plain English.")
    assert language.main(["--root", str(tmp_path)]) == 0
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("Nobody reads this page.")
    assert language.main(["--root", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "docs/page.md:1: phrase: Nobody" in printed
    assert "docs: 4 words, 1 phrases (2500 per 10,000), 0 long sentences, 0 docstring openings" in printed
    assert language.main(["--root", str(tmp_path), "README.md"]) == 0


def test_the_readme_has_limits_for_its_typical_sentence() -> None:
    assert language.check_readme([10] * 9 + [25]) == []
    assert language.check_readme([15] * 10) != []
    assert language.check_readme([10] * 8 + [26] * 2) != []
