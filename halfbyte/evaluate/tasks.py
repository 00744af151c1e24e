"""Tasks: both models on the same items of lm-eval's tasks, as tasks.json."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate import bootstrap
from halfbyte.evaluate.pair import LABELS, SIDES, Pair
from halfbyte.evaluate.paired import Compared, average, compare_items
from halfbyte.files import make_directory, write_json
from halfbyte.types import Progress, Quiet

TASKS = "tasks.json"
DEFAULT = "default"
DEFAULT_TASKS = ("lambada_openai", "arc_easy", "piqa", "winogrande", "hellaswag")
"""What `default` means where no data directory is given: light tasks of lm-eval's, whose data the hub gives."""
LOCAL = Path(__file__).with_name("tasks_jsonl")
"""Tasks that read JSONL files of the user's."""
CONTEXT = 4096
"""Tokens of prompt and answer that a task may take on a served model, unless the model has fewer; lm-eval cuts longer
prompts at their beginning."""


def evaluate_tasks(
    pair: Pair,
    tasks: Sequence[str | Path] = (DEFAULT,),
    *,
    data: Path | str | None = None,
    limit: int | None = None,
    chat: bool = False,
    batch: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask both models the same items and compare in pairs; the content of tasks.json.

    tasks   names of lm-eval's, YAML files or directories of them, the bundled tasks (`local_tasks`), or "default"
    data    where the bundled tasks find their JSONL files (there, or in its directory tasks/)
    limit   items a task; chat: through the chat template; batch: items at a time
    Raises UsageError for an unknown task, HalfbyteError where its data cannot be had or it fails.
    """
    started = time.monotonic()
    rows = compare_tasks(pair, tasks, data=data, limit=limit, chat=chat, batch=batch, seed=seed, progress=progress)
    return tasks_result(pair, rows, time.monotonic() - started)


def compare_tasks(
    pair: Pair,
    tasks: Sequence[str | Path],
    *,
    data: Path | str | None = None,
    limit: int | None = None,
    chat: bool = False,
    batch: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Compared]:
    """The rows of `evaluate_tasks`, to be put together with others in one result."""
    from halfbyte.evaluate.harness import ask, load_tasks

    progress = progress or Quiet()
    progress.start("loading tasks", 1)
    loaded = load_tasks(_specs(tasks, None if data is None else Path(data)))
    limited = min(CONTEXT, pair.context() or CONTEXT)
    context = None if pair.serving is None else limited
    found: dict[str, list[Any]] = {name: [] for name in loaded}
    for side in SIDES:
        with pair.open(side, limited, progress) as subject:
            progress.start(f"tasks, {LABELS[side]}", len(loaded))
            for name, task in loaded.items():
                options: dict[str, Any] = {"limit": limit, "chat": chat, "batch": batch}
                found[name].append(ask(subject, name, task, tokenizer=pair.tokenizer, context=context, **options))
                progress.advance(note=name)
    return [_compared(name, first, second, pair.tokenizer, seed) for name, (first, second) in found.items()]


def task_words(text: str) -> list[str]:
    """Names and files of tasks from the words of a user, which commas separate."""
    return [word.strip() for word in text.split(",") if word.strip()]


def with_named(tasks: Sequence[str], names: Sequence[str], data: Path | None = None) -> list[str]:
    """`tasks` as for `evaluate_tasks`, and those of `names` that they do not hold."""
    from halfbyte.evaluate.harness import task_names

    held = task_names(_specs(tasks, data)) if names else []
    return [*tasks, *(name for name in dict.fromkeys(names) if name not in held)]


def refuse_tasks(tasks: Sequence[str], names: Sequence[str], data: Path | None = None) -> None:
    """Raises UsageError for an unknown task, one without data, and for one of `names` that stands for several."""
    from halfbyte.evaluate.harness import refuse_unknown

    refuse_unknown(_specs(tasks, data), names)


def tasks_result(pair: Pair, rows: Sequence[Compared], seconds: float) -> dict[str, Any]:
    """The content of tasks.json."""
    return {
        **pair.header("tasks"),
        "confidence": bootstrap.CONFIDENCE,
        "tasks": [compared.row for compared in rows],
        "average": average(rows),
        "seconds": round(seconds, 3),
    }


def write_tasks(directory: Path | str, result: dict[str, Any]) -> Path:
    """Write tasks.json (whole or not at all) into `directory`; returns its path."""
    path = Path(directory) / TASKS
    make_directory(path.parent)
    write_json(path, result)
    return path


def local_tasks() -> dict[str, dict[str, Any]]:
    """The bundled tasks by name: lm-eval configs, with the pattern of their data's file name in `x_files`."""
    configs = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(LOCAL.glob("*.yaml"))]
    return {config["task"]: config for config in configs}


def _specs(tasks: Sequence[str | Path], data: Path | None) -> list[Any]:
    """What lm-eval loads for the user's words."""
    bundled = local_tasks()
    wanted: list[str | Path] = []
    for task in tasks:
        if task != DEFAULT:
            wanted.append(task)
        elif data is None:
            wanted += DEFAULT_TASKS
        else:
            wanted += [name for name, config in bundled.items() if _data_file(config, data)]
    if not wanted:
        names = ", ".join(config["x_files"] for config in bundled.values())
        raise UsageError(f"{data} holds no data of a bundled task ({names}): name another --data, or a --task")
    return [_with_data(bundled[str(task)], data) if str(task) in bundled else task for task in dict.fromkeys(wanted)]


def _with_data(config: dict[str, Any], data: Path | None) -> dict[str, Any]:
    if data is None:
        raise UsageError(f"the task {config['task']} reads {config['x_files']}: name its directory with --data")
    file = _data_file(config, data)
    if file is None:
        raise UsageError(f"{data} has no {config['x_files']} for the task {config['task']}")
    rest = {key: value for key, value in config.items() if key != "x_files"}
    return {**rest, "dataset_kwargs": {"data_files": {"test": str(file)}}}


def _data_file(config: dict[str, Any], data: Path) -> Path | None:
    places = (data, data / "tasks")
    return next((file for place in places for file in sorted(place.glob(config["x_files"]))), None)


def _compared(name: str, baseline: Any, model: Any, tokenizer: Any, seed: int) -> Compared:
    """A row for the leading metric; the others' figures in `others`."""
    if baseline.documents != model.documents:
        raise HalfbyteError(f"the task {name} asked the models different items: it draws them anew each time")
    lengths = None
    if baseline.answers is not None:
        lengths = tokens_of(baseline.answers, tokenizer), tokens_of(model.answers, tokenizer)
    compared = [
        compare_items(
            name,
            first.name,
            first.items,
            second.items,
            statistic=first.statistic,
            higher_is_better=first.higher_is_better,
            lengths=lengths,
            seed=seed,
        )
        for first, second in zip(baseline.metrics, model.metrics)
    ]
    return with_others(compared)


def with_others(compared: Sequence[Compared]) -> Compared:
    """The first of a task's metrics as its row, the figures of the others in `others`."""
    kept = ("metric", "higher_is_better", "baseline", "model", "difference", "recovery", "flips")
    compared[0].row["others"] = [{key: other.row[key] for key in kept} for other in compared[1:]]
    return compared[0]


def tokens_of(answers: Sequence[str], tokenizer: Any) -> list[int]:
    """How many tokens each answer has."""
    return [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]
