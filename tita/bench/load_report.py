"""The sections of a benchmark report on load, times and conditions, and `figures.csv`."""

import csv
import io
import json
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
_SWEEP_TIMES = {
    "response_time": "response time",
    "time_to_first_token": "time to first token",
    "time_per_output_token": "inter-token latency",
}
_LENGTHS = {"input_tokens": "input", "output_tokens": "output"}
_STATISTICS = ("mean", "low", "high", "std", "p50", "p90", "p95", "p99", "max")
_MS = 1000.0
_SERVER_TIMES: Mapping[str, tuple[str, str | None]] = {
    "time_to_first_token": ("TTFT", "time_to_first_token"),
    "inter_token_latency": ("ITL", "time_per_output_token"),
    "e2e_request_latency": ("response", "response_time"),
    "request_queue_time": ("queue", None),
    "request_prefill_time": ("prefill", None),
    "request_decode_time": ("decode", None),
}
"""Titles of the server's times, and the client's times of the same meaning."""
SERVER_TIMES = "The server's own times, mean ms"
SERVER_COUNTS = "The server's own counts"
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
        {
            "run": run["title"],
            "kind": kind,
            "questions": count,
            "such as": run["error_messages"][kind],
        }
        for run in report["runs"]
        for kind, count in sorted(run["errors"].items(), key=lambda entry: -entry[1])
    ]
    rows += [
        {"run": run["title"], "kind": "answer without any text (wrong)", "questions": count}
        for run in report["runs"]
        if (count := run["outcomes"].get("empty"))
    ]
    return rows


def server_time_rows(report: Mapping[str, Any]) -> list[Row]:
    """The server's own mean times beside the client's, in milliseconds."""
    rows = []
    for run, load in _loads(report):
        server = load.get("server") or {}
        row = _row_head(run, load)
        for name, (title, own) in _SERVER_TIMES.items():
            if name in server:
                row[title] = server[name]["mean"] * _MS
            if name in server and own and load[own]:
                row[f"{title}, client"] = load[own]["mean"] * _MS
        if row.keys() - {"run", "load"}:
            rows.append(row)
    return _same_columns(rows)


def server_count_rows(report: Mapping[str, Any]) -> list[Row]:
    """What the server counted, beside the client's tokens."""
    rows = []
    for run, load in _loads(report):
        server = load.get("server") or {}
        row = _row_head(run, load)
        for name, value in server.items():
            if not isinstance(value, int):
                continue
            title = name.replace("_", " ")
            row[title] = value
            own = {"prompt_tokens": "input_tokens", "generation_tokens": "output_tokens"}.get(name)
            if own and load[own]:
                row[f"{title}, client"] = round(load[own]["mean"] * load[own]["num"])
        if row.keys() - {"run", "load"}:
            rows.append(row)
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
    times, counts = server_time_rows(report), server_count_rows(report)
    if times or counts:
        page.heading("The server's own figures")
        page.text("Differences of its /metrics over the run, warm-up excluded.")
    for title, rows in ((SERVER_TIMES, times), (SERVER_COUNTS, counts)):
        if rows:
            page.heading(title, level=3)
            page.table(rows)


def add_conditions(page: Page, report: Mapping[str, Any]) -> None:
    """Add the conditions of the runs, if they are recorded."""
    rows = condition_rows(report)
    if rows:
        page.heading("Conditions")
        page.table(rows)


def add_sweeps(page: Page, report: Mapping[str, Any]) -> None:
    """Plot times by throughput for each model that was measured at several loads."""
    for name, points in sweeps(report).items():
        best = _best(points)
        for time, title in _SWEEP_TIMES.items():
            known = [point for point in points if point[time]]
            if len(known) < 2:
                continue
            axes = new_axes(
                title=f"{name}: throughput against latency",
                xlabel="requests per second",
                ylabel=f"{title}, ms",
            )
            throughput = [point["requests_per_s"] for point in known]
            for key in ("p50", "p95"):
                axes.plot(throughput, [p[time][key] * _MS for p in known], "o-", label=key)
            for point in known:
                axes.annotate(
                    str(point["concurrency"]),
                    (point["requests_per_s"], point[time]["p50"] * _MS),
                    textcoords="offset points", xytext=(0, -12), ha="center", fontsize="small",
                )  # fmt: skip
            axes.axvline(best["requests_per_s"], linestyle=":", color="gray", label="knee")
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            add_legend(axes)
            page.figure(axes, caption=f"Numbers are concurrencies. {_KNEE} {best['concurrency']}.")


def sweep_captions(report: Mapping[str, Any]) -> list[str]:
    """The knee of each sweep in words."""
    return [
        f"{name}: {_KNEE} {_best(points)['concurrency']}."
        for name, points in sweeps(report).items()
    ]


def _best(points: Sequence[Row]) -> Row:
    times = [point["response_time"]["mean"] for point in points]
    return points[knee([(p["requests_per_s"], t) for p, t in zip(points, times, strict=True)])]


def sweeps(report: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Points of each model that was measured at several concurrencies, by concurrency."""
    found: dict[tuple[str, ...], dict[int, Row]] = {}
    names: dict[tuple[str, ...], str] = {}
    for run, load in _loads(report):
        shape = load["conditions"].get("load", {}) if load["conditions"] else {}
        times = load["response_time"]
        if "rate" in shape or "concurrency" not in shape or not (times and load["requests_per_s"]):
            continue
        # Runs with other options, such as a fixed length, are points of another curve.
        key = tuple(
            json.dumps(run.get(name), sort_keys=True)
            for name in (
                "model_name", "weight", "weights", "questions_sha256", "max_new_tokens", "request",
            )
        )  # fmt: skip
        found.setdefault(key, {})[shape["concurrency"]] = {
            "concurrency": shape["concurrency"],
            "requests_per_s": load["requests_per_s"],
            **{time: load[time] for time in _SWEEP_TIMES},
        }
        names[key] = run["name"]
    named: dict[str, list[Row]] = {}
    for key, points in found.items():
        if len(points) > 1:
            request = "" if key[-1] == "null" else f", {key[-1]}"
            title = names[key] if names[key] not in named else f"{names[key]}{request}"
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
    # The load is known of some rows only, and stands beside the run.
    first = ("run", "load") if any("load" in row for row in rows) else ()
    names = list(dict.fromkeys([*first, *(name for row in rows for name in row)]))
    return [{name: row.get(name) for name in names} for row in rows]


def filled_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns with at least one value."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if any(row.get(name) not in (None, "") for row in rows)]
