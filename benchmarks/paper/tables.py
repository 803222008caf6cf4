"""The tables of the report, in Markdown, from stored results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.paper.cells import NFES, TEACHER, TOY, Cell, dx, gm, meanflow, shortcut
from benchmarks.paper.results import ENDPOINT, FRECHET, Results, shown, significant

COLUMNS = (
    (FRECHET, "Fréchet to teacher"), ("frechet_to_data", "to data"), (ENDPOINT, "endpoint MSE"),
    ("diversity", "diversity"), ("accuracy", "accuracy"),
)  # fmt: skip


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column left-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def teacher_table(results: Results) -> str:
    """Few Euler steps of the teacher, and other noises at full length."""
    found = results.first(TEACHER)
    assert found is not None
    rows = [
        (f"{n} Euler step" + "s" * (n != "1"), row)
        for n, row in sorted(found["measures"].items(), key=lambda item: int(item[0]))
    ]
    rows.append((f"{results.protocol['reference_steps']} Euler steps, other noises", found["other_noises"]))
    titles = ["teacher", *(title for _, title in COLUMNS)]
    return table(titles, ([name, *(significant(row[metric], 3) for metric, _ in COLUMNS)] for name, row in rows))


def student_table(results: Results) -> str:
    """Every student at every number of steps it was measured at, with the job that made each seed."""
    titles = ["student", "NFE", "seeds", *(title for _, title in COLUMNS)]
    rows = []
    for cell in results.students():
        for nfe in cell.sampled_nfes:
            values = [results.values(cell, metric, nfe) for metric, _ in COLUMNS]
            cells = [shown(v).partition(" (")[0] for v in values]
            rows.append([cell.label, str(nfe), _seeds(results, cell), *cells])
    return table(titles, rows)


def _seeds(results: Results, cell: Cell) -> str:
    """ "0 core, 1 full": each seed and the arguments of `python -m benchmarks.paper` that made it."""
    made = sorted((result["settings"]["seed"], result["command"]) for result in results.of(cell))
    return ", ".join(f"{seed} {command.partition('benchmarks.paper ')[2]}" for seed, command in made)


def heads_table(results: Results, metric: str) -> str:
    """Heads against numbers of steps, all with the default settings."""
    heads = [("GM K", gm, size) for size in (1, 4, 8, 32)] + [("DX N", dx, size) for size in (5, 10, 20)]
    rows = []
    for kind, make, size in heads:
        rows.append([f"{kind}={size}", *(shown(results.values(make(size, nfe), metric)) for nfe in NFES)])
    for name, cells in (
        ("shortcut", [shortcut(nfe) for nfe in NFES]), ("MeanFlow", [meanflow()] * len(NFES)),
    ):  # fmt: skip
        rows.append([name, *(shown(results.values(cell, metric, nfe)) for cell, nfe in zip(cells, NFES))])
    teacher = (results.values(TEACHER, metric, nfe) for nfe in NFES)
    rows.append(["teacher, Euler", *(shown(values).partition(" (")[0] for values in teacher)])
    return table(["", *(f"{nfe} NFE" for nfe in NFES)], rows)


def study_table(results: Results, study: str, key: str, cells: Sequence[Cell]) -> str:
    """A setting that was varied at sampling: Fréchet distance and endpoint error of each student."""
    levels = sorted({
        row[key] for cell in cells for result in results.of(cell) for row in result.get("studies", {}).get(study, ())
    })  # fmt: skip
    rows = []
    for level in levels:
        values = [results.studied(cell, study, key, level, m) for cell in cells for m in (FRECHET, ENDPOINT)]
        rows.append([f"{level:g}", *(shown(v).partition(" (")[0] for v in values)])
    counts = [f"{cell.label} (n={len(results.of(cell))})" for cell in cells]
    titles = [f"{count}: {name}" for count in counts for name in ("Fréchet", "endpoint MSE")]
    return table([key.replace("nfe", "NFE"), *titles], rows)


def toy_table(results: Results) -> str:
    """Static policies on one trajectory."""
    found = results.first(TOY)
    fits = found["fits"] if found else {}
    rows = [[n, significant(f["velocity_error"], 3), significant(f["endpoint_mse"], 2)] for n, f in fits.items()]
    return table(["static policy", "velocity error", "endpoint MSE"], rows)


def checkerboard_table(results: Results) -> str:
    """Data, teacher and student on the plane."""
    found = results.first(Cell("checkerboard"))
    points = found["rows"] if found else {}
    rows = []
    for name, row in points.items():
        error = "-" if row[ENDPOINT] is None else significant(row[ENDPOINT], 3)
        rows.append([name, f"{100 * row['inside']:.1f} %", error])
    return table(["points", "in filled squares", "endpoint MSE"], rows)
