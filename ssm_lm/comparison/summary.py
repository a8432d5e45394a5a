"""What a contest has found: a row for each contender, as JSON and as a table in markdown."""

from .contest import Contest
from .schedule import LOWER_IS_BETTER, best_run, read_result


def summarize(contest: Contest) -> dict:
    """The JSON object of a contest, as far as its runs are done: contenders, the best first, and all runs."""
    rows, runs = [], []
    for contender in contest.contenders:
        first = contest.first_runs(contender)
        best = best_run(contest, contender)
        tried = [(run, read_result(contest, run)) for run in first]
        repeats = contest.repeats(contender, best[0].rate) if best else []
        tried += [(run, read_result(contest, run)) for run in repeats]
        for run, result in tried:
            runs.append({"contender": contender, "learning_rate": run.rate, "seed": run.seed, "result": result})
        if best:
            rates = contest.rates[contender]
            seeds = [result["value"] for run, result in tried if result and run.rate == best[0].rate]
            kept = ("parameters", "without_embeddings", "measure", "standard_error", "steps", "tokens", "seconds")
            rows.append(
                {"contender": contender, "learning_rate": best[0].rate, "value": sum(seeds) / len(seeds)}
                | {"at_edge": len(rates) > 1 and best[0].rate in (min(rates), max(rates)), "seeds": seeds}
                | {key: best[1][key] for key in (*kept, "tokens_per_second", "protocol", "split")}
                # results of earlier versions have no FLOPs
                | {"flops": best[1].get("flops"), "family": contest.families.get(contender)}
            )
    if rows:
        sign = 1 if LOWER_IS_BETTER[rows[0]["measure"]] else -1
        rows.sort(key=lambda row: sign * row["value"])
    left_out = [name for name in contest.contenders if name not in {row["contender"] for row in rows}]
    return {"file": contest.where, "contenders": rows, "without_results": left_out, "runs": runs}


def markdown(summary: dict) -> str:
    """The tables of a summary: contenders at their best rates; what each rate gave; and what the marks mean."""
    rows, runs = summary["contenders"], summary["runs"]
    if not rows:
        return "no run has a result yet\n"
    first = rows[0]
    lines = [f"{first['split']} {first['measure']}, {first['protocol']}", ""]
    head = ("contender", "parameters", "without embeddings", "best rate", first["measure"], "std. error", "seeds")
    head += ("tokens", "seconds", "tokens/s", "FLOPs")
    lines += [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    for row in rows:
        cells = [row["contender"], _whole(row["parameters"]), _whole(row["without_embeddings"])]
        cells += [f"{row['learning_rate']:g}{' (edge)' if row['at_edge'] else ''}", _measure(row, row["value"])]
        cells += ["-" if row["standard_error"] is None else _measure(row, row["standard_error"])]
        cells += [", ".join(_measure(row, value) for value in row["seeds"])]
        cells += [_whole(row[key]) for key in ("tokens", "seconds", "tokens_per_second")]
        lines.append(_row([*cells, "-" if row["flops"] is None else f"{row['flops']:.3g}"]))
    rates = sorted({run["learning_rate"] for run in runs})
    lines += ["", _row(["learning rate", *(f"{rate:g}" for rate in rates)]), _row(["---", *["---:"] * len(rates)])]
    for row in rows:
        own = {}
        for run in runs:
            if run["contender"] == row["contender"]:
                own.setdefault(run["learning_rate"], run["result"])  # of the first seed
        cells = ["" if rate not in own else _value(row, own[rate]) for rate in rates]
        lines.append(_row([row["contender"], *cells]))
    lines.append("")
    if any(row["at_edge"] for row in rows):
        lines.append("(edge): the best of the rates that were tried is their smallest or largest; try further ones.")
    if any(len(row["seeds"]) > 1 for row in rows):
        lines.append(f"{first['measure'].capitalize()} is the mean over the seeds; its standard error is of the first.")
    if len({row["tokens"] for row in rows}) > 1:
        lines.append("The contenders have NOT seen the same number of tokens.")
    for name in summary["without_results"]:
        lines.append(f"{name}: no run has a result yet.")
    open_runs = sum(run["result"] is None for run in runs)
    if open_runs:
        lines.append(f"{open_runs} runs have no result yet.")
    return "\n".join(lines).rstrip("\n") + "\n"


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _whole(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"


def _measure(row: dict, value: float) -> str:
    return f"{value:.2%}" if row["measure"] == "accuracy" else f"{value:.2f}"


def _value(row: dict, result: dict | None) -> str:
    return "-" if result is None else _measure(row, result["value"])
