"""One HTML page with the reports of a check and the plot of their gradient horizons."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from html import escape
from pathlib import Path

from cyborg_torchrl.checks.findings import Finding
from cyborg_torchrl.checks.plot import plot_horizon
from cyborg_torchrl.checks.report import Report, number_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #e3e7ec; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.verdict { white-space: nowrap; font-weight: 600; }
.passed { color: #18794e; } .failed { color: #c62a2f; } .consequence { color: #a35200; }
.info { color: #0b68cb; } .not_applicable { color: #6b7683; }
p.summary { font-size: 1.05rem; } svg { max-width: 46rem; height: auto; } .cure { font-weight: 600; }
"""


def write_page(reports: Mapping[str, Report], path: Path | str) -> None:
    """Write a page with all findings, failures first. It needs no other files.

    Args:
        reports: reports by the name of their policy.
        path: the file to write.

    Raises:
        ImportError: if matplotlib, which draws the plot, is not installed.
        OSError: if the file cannot be written.
    """
    curves = {name: report.horizon for name, report in reports.items() if report.horizon is not None}
    picture = ""
    if curves:
        with tempfile.TemporaryDirectory() as folder:
            plot_horizon(curves, Path(folder) / "horizon.svg")
            text = (Path(folder) / "horizon.svg").read_text()
        picture = f"<h2>Gradient horizon</h2>\n{text[text.index('<svg') :]}"
    failed = [name for name, report in reports.items() if not report.has_passed]
    verdict = f"Failed: {escape(', '.join(failed))}" if failed else "All policies passed."
    sections = "\n".join(_section(name, report) for name, report in reports.items())
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>Check of recurrent policies</title>"
        f"<style>{STYLE}</style></head><body><h1>Check of recurrent policies</h1>\n"
        f"<p class='summary {'failed' if failed else 'passed'}'>{verdict}</p>\n{sections}\n{picture}</body></html>\n"
    )
    Path(path).write_text(page)


def _section(name: str, report: Report) -> str:
    order = {"failed": 0, "consequence": 1}
    findings = sorted(report.findings, key=lambda finding: order.get(finding.verdict, 2))
    rows = "\n".join(_row(finding) for finding in findings)
    size = f"{report.policy}, {report.num_envs} environments, {report.steps} steps, seed {report.seed}"
    head = "<tr><th>finding</th><th>value</th><th>limit</th><th>verdict</th><th>what it means</th></tr>"
    drift = ""
    if report.drift is not None:
        pairs = zip(report.drift.updates, report.drift.states, strict=True)
        points = ", ".join(f"{number_text(distance)} after {update}" for update, distance in pairs)
        drift = f"<p>Relative distance of stored states from fresh ones, by number of updates: {points}.</p>"
    return f"<h2>{escape(name)}</h2>\n<p>{escape(size)}</p>\n<table>{head}\n{rows}</table>\n{drift}"


def _row(finding: Finding) -> str:
    verdict = finding.verdict.replace("_", " ")
    cure = f" <span class='cure'>{escape(finding.cure)}</span>" if finding.cure else ""
    return (
        f"<tr><td>{escape(finding.name)}</td><td class='number'>{number_text(finding.value)}</td>"
        f"<td class='number'>{number_text(finding.limit)}</td>"
        f"<td class='verdict {finding.verdict}'>{verdict}</td><td>{escape(finding.explanation)}{cure}</td></tr>"
    )
