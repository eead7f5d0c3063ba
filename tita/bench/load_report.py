"""The sections of a benchmark report on load, times and conditions, and `figures.csv`."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tita.bench.load_figures import knee
from tita.report import Page, add_legend, new_axes

_TIMES = {
    "response_time": "Response time (end-to-end latency)",
    "time_to_first_token": "Time to first token (TTFT)",
    "time_to_first_answer_token": "Time to first answer token, after reasoning",
    "time_per_output_token": "Inter-token latency (ITL; vLLM: time per output token, TPOT)",
    "longest_gap": "Longest gap between two tokens of a response",
}
_LENGTHS = {"input_tokens": "input", "output_tokens": "output"}
_STATISTICS = ("mean", "low", "high", "std", "p50", "p90", "p95", "p99", "max")
_MS = 1000.0
INTERVALS = "low and high: 95 % interval of the mean; std: standard deviation."
_KNEE = "The largest ratio of throughput to mean response time (knee) is at concurrency"

Row = dict[str, Any]


def load_rows(report: Mapping[str, Any]) -> list[Row]:
    """Throughput of each run and load."""
    rows = []
    for run, load in _loads(report):
        reached = load["concurrency"] or {}
        goodput = load["goodput"] or {}
        row = {
            "run": run["title"],
            "load": load["load"] or None,
            "requests": load["requests"],
            "failed": load["failed"],
            "seconds": load["duration_s"],
            "requests/s": load["requests_per_s"],
            "tokens/s in": load["input_tokens_per_s"],
            "tokens/s out": load["output_tokens_per_s"],
            "in flight, mean": reached.get("mean"),
            "in flight, peak": reached.get("peak"),
        }
        if goodput:
            limits = ", ".join(f"{k} {v * _MS:g} ms" for k, v in goodput["limits_s"].items())
            row["goodput, requests/s"] = goodput["requests_per_s"]
            row["goodput, %"] = goodput["percent"]
            row["limits"] = limits
        rows.append(row)
    return _same_columns(rows)


def time_tables(report: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """(title, rows in milliseconds) of each time that a run has."""
    tables = []
    for name, title in _TIMES.items():
        rows = [
            {
                **_row_head(run, load),
                "requests": load[name]["num"],
                **{key: load[name][key] * _MS for key in _STATISTICS},
            }
            for run, load in _loads(report)
            if load[name] and not _repeats_first_token(load, name)
        ]
        if rows:
            tables.append((f"{title}, ms", _same_columns(rows)))
    return tables


def length_rows(report: Mapping[str, Any]) -> list[Row]:
    """Numbers of tokens per request."""
    return _same_columns(
        [
            {
                **_row_head(run, load),
                "tokens": side,
                **{key: load[name][key] for key in ("mean", "std", "p50", "p95", "p99", "max")},
            }
            for run, load in _loads(report)
            for name, side in _LENGTHS.items()
            if load[name]
        ]
    )


def error_rows(report: Mapping[str, Any]) -> list[Row]:
    """Failed requests by kind, the most frequent first, and answers without any text."""
    rows = [
        {"run": run["title"], "kind": kind, "questions": count}
        for run in report["runs"]
        for kind, count in sorted(run["errors"].items(), key=lambda entry: -entry[1])
    ]
    rows += [
        {"run": run["title"], "kind": "answer without any text (wrong)", "questions": count}
        for run in report["runs"]
        if (count := run["outcomes"].get("empty"))
    ]
    return rows


def server_rows(report: Mapping[str, Any]) -> list[Row]:
    """The server's own figures beside the client's, times in milliseconds."""
    pairs = (
        ("time_to_first_token", "time_to_first_token"),
        ("inter_token_latency", "time_per_output_token"),
        ("e2e_request_latency", "response_time"),
        ("request_queue_time", None), ("request_prefill_time", None),
        ("request_decode_time", None),
    )  # fmt: skip
    rows = []
    for run, load in _loads(report):
        server = load.get("server") or {}
        for name, own in pairs:
            if name in server:
                client = load[own]["mean"] * _MS if own and load[own] else None
                rows.append(
                    {
                        **_row_head(run, load),
                        "figure": f"{name.replace('_', ' ')}, mean ms",
                        "server": server[name]["mean"] * _MS,
                        "client": client,
                    }
                )
        for name, value in server.items():
            if isinstance(value, int):
                total = {"prompt_tokens": "input_tokens", "generation_tokens": "output_tokens"}
                own = total.get(name)
                client = load[own]["mean"] * load[own]["num"] if own and load[own] else None
                title = name.replace("_", " ")
                rows.append(
                    {
                        **_row_head(run, load), "figure": title, "server": float(value),
                        "client": client,
                    }
                )  # fmt: skip
    return _same_columns(rows)


def condition_rows(report: Mapping[str, Any]) -> list[Row]:
    """Endpoint, client and machine of each run and load."""
    rows = []
    for run, load in _loads(report):
        known = load["conditions"]
        if known:
            client, machine = known["client"], known["machine"]
            rows.append(
                {
                    "run": run["title"],
                    "load": load["load"],
                    "started": known["started"][:19].replace("T", " "),
                    "endpoint": known["endpoint"],
                    "client": ", ".join(f"{name} {version}" for name, version in client.items()),
                    "machine": f"{machine['host']}, {machine['cpus']} CPUs, {machine['system']}",
                    "command": known["command"],
                }
            )
    return rows


def add_load(page: Page, report: Mapping[str, Any]) -> None:
    """Add throughput, times, lengths, the plot of a sweep, and the server's figures."""
    page.heading("Load")
    rows = load_rows(report)
    page.table(rows, columns=filled_columns(rows), digits_of={"goodput, %": 1})
    add_sweeps(page, report)
    page.heading("Times")
    page.text(f"In milliseconds. {INTERVALS}")
    for title, rows in time_tables(report):
        page.heading(title, level=3)
        page.table(rows)
    rows = length_rows(report)
    if rows:
        page.heading("Tokens per request")
        page.table(rows, digits=1)
    rows = server_rows(report)
    if rows:
        page.heading("The server's own figures")
        page.table(rows, caption="Differences of its /metrics over the run, warm-up excluded.")


def add_conditions(page: Page, report: Mapping[str, Any]) -> None:
    """Add the conditions of the runs, if they are recorded."""
    rows = condition_rows(report)
    if rows:
        page.heading("Conditions")
        page.table(rows)


def add_sweeps(page: Page, report: Mapping[str, Any]) -> None:
    """Plot latency by throughput for each model that was measured at several loads."""
    for name, points in sweeps(report).items():
        axes = new_axes(
            title=f"{name}: throughput against latency",
            xlabel="requests per second",
            ylabel="response time, ms",
        )
        throughput = [point["requests_per_s"] for point in points]
        for key in ("p50", "p95"):
            axes.plot(throughput, [point[key] for point in points], "o-", label=key)
        for point in points:
            axes.annotate(
                str(point["concurrency"]), (point["requests_per_s"], point["p50"]),
                textcoords="offset points", xytext=(0, -12), ha="center", fontsize="small",
            )  # fmt: skip
        best = _best(points)
        axes.axvline(best["requests_per_s"], linestyle=":", color="gray", label="knee")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        add_legend(axes)
        page.figure(
            axes,
            caption=f"Numbers are concurrencies. {_KNEE} {best['concurrency']}.",
        )


def sweep_captions(report: Mapping[str, Any]) -> list[str]:
    """The knee of each sweep in words."""
    return [
        f"{name}: {_KNEE} {_best(points)['concurrency']}."
        for name, points in sweeps(report).items()
    ]


def _best(points: Sequence[Row]) -> Row:
    return points[knee([(point["requests_per_s"], point["mean"]) for point in points])]


def sweeps(report: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Points of each model that was measured at several concurrencies, by concurrency."""
    found: dict[tuple[Any, ...], dict[int, Row]] = {}
    for run, load in _loads(report):
        shape = load["conditions"].get("load", {}) if load["conditions"] else {}
        times = load["response_time"]
        if "rate" in shape or "concurrency" not in shape or not (times and load["requests_per_s"]):
            continue
        key = tuple(
            run[name] for name in ("model_name", "weight", "questions_sha256", "max_new_tokens")
        )
        found.setdefault(key, {})[shape["concurrency"]] = {
            "concurrency": shape["concurrency"],
            "requests_per_s": load["requests_per_s"],
            **{name: times[name] * _MS for name in ("mean", "p50", "p95")},
        }
    named = {}
    for (model, weight, *_), points in found.items():
        if len(points) > 1:
            title = str(model) if weight is None else f"{model} w={weight:g}"
            named[title] = [points[number] for number in sorted(points)]
    return named


def figures_csv(report: Mapping[str, Any]) -> str:
    """All figures of a report, one per line; times in seconds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("run", "file", "load", "figure", "statistic", "value"))
    for run in report["runs"]:
        head = (run["title"], run["file"])
        totals = {
            name: run[name]
            for name in ("num_questions", "num_answered", "success_rate", "outcomes", "errors")
        }
        totals["cost"] = run["cost"] and run["cost"]["amount"]
        for name, statistic, value in _flatten(totals):
            writer.writerow((*head, "", name, statistic, value))
        for load in run["loads"]:
            figures = {k: v for k, v in load.items() if k not in ("load", "conditions", "errors")}
            for name, statistic, value in _flatten(figures):
                writer.writerow((*head, load["load"], name, statistic, value))
        for score in run["scores"]:
            suite = f"{run['suite'] or 'questions'}, {score['metric']}"
            for _, statistic, value in _flatten({suite: score["values"]}):
                writer.writerow((*head, "", suite, statistic, value))
    return text.getvalue()


def _flatten(figures: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            for _, statistic, inner in _flatten(value):
                yield name, statistic, inner
        elif value is not None:
            yield name, name, value


def _loads(report: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    for run in report["runs"]:
        for load in run["loads"]:
            yield run, load


def _row_head(run: Mapping[str, Any], load: Mapping[str, Any]) -> Row:
    return {"run": run["title"], **({"load": load["load"]} if len(run["loads"]) > 1 else {})}


def _repeats_first_token(load: Mapping[str, Any], name: str) -> bool:
    """Without reasoning the first answer token is the first token."""
    return name == "time_to_first_answer_token" and load[name] == load["time_to_first_token"]


def _same_columns(rows: Sequence[Row]) -> list[Row]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def filled_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns with at least one value."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if any(row.get(name) not in (None, "") for row in rows)]
