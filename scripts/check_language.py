"""Check that documentation, docstrings and comments are written in plain English.

Rules: no listed phrase, no sentence above 30 words, no docstring that opens with a question word. The README also has
limits for its typical sentence. Code is exempt. Tables and lists of links are exempt from the rule about sentences.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

PHRASES = re.compile(
    r"\b(what (?:is|was|are|were|it|they|has|have)|of (?:its|their|our|one's) own"
    r"|(?:is|are|was|were) (?:told|said|asked)|told of|in (?:the )?place of"
    r"|beside|whoever|nobody|had again|goes? on|went on|stands?|lies?)\b",
    re.IGNORECASE,
)
OPENING = re.compile(r"\s*(What|Where|Whether|As|The same)\b")
WORD = re.compile(r"\w+(?:[-'.,]\w+)*")
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
NEW_PARAGRAPH = re.compile(r"\s*$|\s*(?:[-*+] |\d+\. |#+ |\||[\w*]+(?:, [\w*]+)*: )")
MAX_WORDS, README_MEDIAN, README_P90 = 30, 14, 25
KINDS = (": phrase: ", ": sentence of ", ": docstring opens with: ")
AREAS = {
    "README": ["README.md"],
    "docs": ["docs/**/*.md", "CONTRIBUTING.md", "CHANGELOG.md"],
    "package": ["cyborg_torchrl/**/*.py"],
    "programs": ["benchmarks/**/*.py", "examples/**/*.py", "scripts/**/*.py"],
}


def markdown_prose(source: str) -> str:
    """Return a page with empty lines where it has code or comments."""
    code = re.compile(r"^ *```.*?^ *```|<!--.*?-->|^:::[^\n]*", re.DOTALL | re.MULTILINE)
    source = code.sub(lambda match: "\n" * match[0].count("\n"), source)
    lines, is_code = source.split("\n"), False
    for number, line in enumerate(lines):
        is_code = line.startswith("    ") and (is_code or not lines[number - 1].strip())
        if is_code:
            lines[number] = ""
    return "\n".join(lines)


def docstrings(source: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line's number and the lines of each docstring, without doctests and equations."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node):
            lines = (ast.get_source_segment(source, node.body[0]) or "").split("\n")
            lines = ["" if re.match(r"\s*(?:>>>|\.\.\. )|\s{4}.* = ", line) else line for line in lines]
            yield node.body[0].lineno, [line.removeprefix('r"""').strip('" ') for line in lines]


def python_prose(source: str) -> str:
    """Return a module with nothing but its docstrings and comments, each on the line where it was."""
    lines = [""] * (source.count("\n") + 2)
    for first, texts in docstrings(source):
        lines[first - 1 : first - 1 + len(texts)] = texts
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(r"# *(?:noqa|type:|pyright:|!)", token.string):
            is_alone = token.line.lstrip().startswith("#")
            lines[token.start[0] - 1] = ("" if is_alone else "- ") + token.string.strip("#: ")
    return "\n".join(lines)


def paragraphs(prose: str) -> Iterator[tuple[int, str]]:
    """Yield each paragraph, list item or table row with the number of its first line."""
    start, held = 1, list[str]()
    for number, line in enumerate([*prose.split("\n"), ""], 1):
        if held and (NEW_PARAGRAPH.match(line) or held[-1].startswith("#")):
            yield start, "\n".join(held)
            held = []
        if line.strip():
            start = start if held else number
            held.append(line)


def sentences(paragraph: str) -> list[str]:
    """Return the sentences of a paragraph: none for a table row or a list of links."""
    link_words = len(WORD.findall(" ".join(LINK.findall(paragraph))))
    text = LINK.sub(r"\1", paragraph).replace("*", "")
    is_link_list = len(LINK.findall(paragraph)) > 2 and 2 * link_words > len(WORD.findall(text))
    if is_link_list or paragraph.lstrip().startswith("|"):
        return []
    return re.split(r"(?<=[.!?:])[\"')]*\s+", text)


def check(name: str, source: str) -> tuple[list[str], int, list[int]]:
    """Check one file. Return its failures, the number of its words and the lengths of its sentences."""
    is_python = name.endswith(".py")
    failures, words, lengths = list[str](), 0, list[int]()
    for line, paragraph in paragraphs(python_prose(source) if is_python else markdown_prose(source)):
        text = LINK.sub(r"\1", re.sub(r"`+[^`]*`+", lambda match: "X" + "\n" * match[0].count("\n"), paragraph))
        words += len(WORD.findall(text))
        for match in PHRASES.finditer(text.replace("\n", " ")):
            number = line + text.count("\n", 0, match.start())
            failures.append(f"{name}:{number}: phrase: {match[0]}")
        for sentence in sentences(paragraph):
            length = len(WORD.findall(re.sub(r"`+[^`]*`+", "X", sentence)))
            lengths.append(length)
            if length > MAX_WORDS:
                failures.append(f"{name}:{line}: sentence of {length} words: {' '.join(sentence.split())[:60]}")
    for line, lines in docstrings(source) if is_python else ():
        if opening := OPENING.match(" ".join(lines)):
            failures.append(f"{name}:{line}: docstring opens with: {opening[1]}")
    return failures, words, [length for length in lengths if length > 2]


def check_readme(lengths: list[int]) -> list[str]:
    """Return a failure if the README's sentences are too long on the whole."""
    median, p90 = statistics.median(lengths), sorted(lengths)[int(0.9 * len(lengths))]
    if median <= README_MEDIAN and p90 <= README_P90:
        return []
    limits = f"limits {README_MEDIAN} and {README_P90}"
    return [f"README.md:1: sentence median is {median:g} words and 90th percentile {p90} ({limits})"]


def main(arguments: list[str] | None = None) -> int:
    """Print failures and totals. Return 1 if there are failures."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python scripts/check_language.py docs/tasks.md cyborg_torchrl/cores",
    )
    parser.add_argument("paths", nargs="*", help="check only files below these paths (default: all)")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the repository")
    args = parser.parse_args(arguments)
    all_failures, totals = list[str](), list[str]()
    for area, patterns in AREAS.items():
        failures, words, lengths = list[str](), 0, list[int]()
        for path in sorted({path for pattern in patterns for path in args.root.glob(pattern)}):
            name = path.relative_to(args.root)
            if args.paths and not any(name.is_relative_to(part) for part in args.paths):
                continue
            file_failures, file_words, file_lengths = check(str(name), path.read_text())
            failures += file_failures
            words += file_words
            lengths += file_lengths
        failures += check_readme(lengths) if area == "README" and lengths else []
        phrases, long, openings = (sum(kind in failure for failure in failures) for kind in KINDS)
        rate = 1e4 * phrases / max(words, 1)
        totals.append(
            f"{area}: {words} words, {phrases} phrases ({rate:.0f} per 10,000), "
            f"{long} long sentences, {openings} docstring openings"
        )
        all_failures += failures
    print("\n".join([*all_failures, *totals]))  # noqa: T201
    return int(bool(all_failures))


if __name__ == "__main__":
    sys.exit(main())
