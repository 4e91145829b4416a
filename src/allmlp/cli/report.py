"""`mixer report`."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg

Runs = Annotated[Positional[tuple[str, ...]], arg(metavar="RUN ...")]


def report(
    runs: Runs,
    /,
    *,
    output: Annotated[str, arg(metavar="FOLDER")] = "report",
    overwrite: bool = False,
) -> None:
    """Write the paper's Tables 1, 2 and 3 with your measurements beside them, and the figures.

    Examples of use:
        mixer report runs
        mixer report runs/flowers evaluation.json few_shot.json --output reports/flowers

    Nothing of the paper's is shown as measured here: its rows stand in tables of their own. Yours
    come from run folders and from the files that the verbs evaluate, few-shot, throughput, vtab,
    transfer and study write; each is shown with its data, protocol, command, hardware and date.

    Args:
        runs: run folders, measurement files, and folders that are searched for them.
        output: a folder for report.md, report.html and pictures.
        overwrite: replace the report that is there.
    """
    from collections import Counter

    from allmlp.console import Reporter
    from allmlp.studies.report import report as write_report

    console = Reporter()
    result = write_report(runs, output, overwrite=overwrite)
    kinds = Counter(each.kind for each in result.findings.measured)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    console.say(f"found    {listed}")
    for path, reason in result.findings.left_out:
        console.say(f"left out {path}: {reason}", style="yellow")
    for name in ("report.md", "report.html"):
        console.say(f"written  {result.folder / name}")
    for path in result.pictures:
        console.say(f"picture  {path}")
