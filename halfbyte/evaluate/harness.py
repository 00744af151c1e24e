"""lm-eval: its tasks, by name or from a directory, asked of a loaded or a served model. The one file that touches it.

What is wanted are the items: each document's own value of each metric, so that two models are compared in pairs.
"""

from __future__ import annotations

import difflib
import functools
import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.paired import MEAN, PERPLEXITY, Statistic
from halfbyte.evaluate.subject import Loaded, Served, Subject

SEED = 1234
"""lm-eval's own default, so that few-shot examples are those of other people's runs."""
WEIGHTED_PERPLEXITY = Statistic(of_means=lambda means: np.exp(-means[:, 0] / means[:, 1]))
BITS_PER_BYTE = Statistic(of_means=lambda means: -means[:, 0] / means[:, 1] / math.log(2))


@dataclass(frozen=True)
class Metric:
    """One metric of one task: every item's value in the documents' order, and how they become a figure."""

    name: str
    items: list[Any]
    statistic: Statistic
    higher_is_better: bool


@dataclass(frozen=True)
class Answered:
    """A task's result: metrics (the leading one first), the documents' hashes, the generated answers or None."""

    metrics: list[Metric]
    documents: list[str]
    answers: list[str] | None


def load_tasks(specs: Sequence[str | Path | dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's tasks by name. A spec is a name of lm-eval's, a YAML file, a directory of them, or a whole config.

    Files that a local YAML names as data are looked for beside it.
    Raises UsageError for an unknown name, HalfbyteError where lm-eval is missing or a task's data cannot be had.
    """
    _lm_eval()
    wanted = _wanted(specs)
    with _silent():
        manager = _manager(wanted)
        loaded: dict[str, Any] = {}
        for spec in wanted:
            try:
                loaded |= manager.load([spec])["tasks"]
            except Exception as error:  # datasets, fsspec, the hub's client and a task's own code raise their own
                raise HalfbyteError(f"the task {_name(spec)} cannot be loaded: {_reason(error)}") from error
    for task in loaded.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return loaded


def task_names(specs: Sequence[str | Path | dict[str, Any]]) -> list[str]:
    """What specs are called: an own task by its `task`, one of lm-eval's, or a group of them, as it was written.

    Raises as `load_tasks`, but knows nothing of data, and not whether lm-eval has such a task.
    """
    _lm_eval()
    return [_name(spec) for spec in _wanted(specs)]


def refuse_unknown(specs: Sequence[str | Path | dict[str, Any]], single: Sequence[str] = ()) -> None:
    """Raises UsageError for a name that lm-eval does not know, and for one of `single` that means several tasks."""
    _lm_eval()
    wanted = _wanted(specs)
    with _silent():
        manager = _manager(wanted)
    own = {_name(spec) for spec in wanted if not isinstance(spec, str)}
    several = {*manager.all_groups, *manager.all_tags} - own
    for name in single:
        if name in several:
            raise UsageError(f"{name!r} stands for several tasks of lm-eval's: name one of them")


def _wanted(specs: Sequence[str | Path | dict[str, Any]]) -> list[Any]:
    """Names of lm-eval's and configs of own tasks."""
    return [part for spec in specs for part in _local(spec)]


def _name(spec: str | dict[str, Any]) -> str:
    return spec if isinstance(spec, str) else str(spec["task"])


def _manager(wanted: Sequence[Any]) -> Any:
    """lm-eval's index of tasks, which has every name of `wanted`."""
    manager = _index(any(isinstance(spec, str) for spec in wanted))
    for spec in wanted:
        if isinstance(spec, str) and spec not in manager.task_index:
            close = difflib.get_close_matches(spec, manager.all_tasks, n=1)
            hint = f": did you mean {close[0]!r}?" if close else ": see `lm-eval ls tasks`"
            raise UsageError(f"lm-eval knows no task {spec!r}{hint}")
    return manager


@functools.cache
def _index(defaults: bool) -> Any:
    """lm-eval's manager of tasks; with its own ones it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def ask(
    subject: Subject,
    name: str,
    task: Any,
    *,
    tokenizer: Any,
    context: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    batch: int = 8,
) -> Answered:
    """The first `limit` documents of one task, asked of one model.

    context   tokens that prompt and answer may take; None: what the model's config says
    chat      prompts go through the tokenizer's chat template
    Raises HalfbyteError in one line for whatever goes wrong below.
    """
    _lm_eval()
    from lm_eval.evaluator import evaluate

    random.seed(0)
    np.random.seed(SEED)
    with _silent():
        try:
            found = evaluate(
                lm=_language_model(subject, tokenizer, context, batch),
                task_dict={"tasks": {name: task}},
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
        except HalfbyteError:
            raise
        except Exception as error:  # a task is a program: it may raise anything
            raise HalfbyteError(f"the task {name} failed: {_reason(error)}") from error
    assert found is not None
    return _answered(task, found["samples"][name])


def _answered(task: Any, samples: list[dict[str, Any]]) -> Answered:
    by_filter: dict[str, list[dict[str, Any]]] = {}
    for sample in sorted(samples, key=lambda s: s["doc_id"]):
        by_filter.setdefault(sample["filter"], []).append(sample)
    metrics = []
    for name, aggregate in task.aggregation().items():
        for filtered, rows in by_filter.items():
            if name in rows[0]:
                label = name if filtered == "none" else f"{name},{filtered}"
                better = bool(task.higher_is_better().get(name, True))
                metrics.append(Metric(label, [row[name] for row in rows], _statistic(aggregate), better))
    if not metrics:
        raise HalfbyteError(f"the task {task.task_name} gives no metric for its items: halfbyte cannot compare it")
    first = next(iter(by_filter.values()))
    generated = task.OUTPUT_TYPE == "generate_until"
    metrics.sort(key=lambda m: not (m.higher_is_better and m.statistic is MEAN))
    answers = [str(row["resps"][0][0]) for row in first] if generated else None
    return Answered(metrics, [row["doc_hash"] for row in first], answers)


def _statistic(aggregate: Any) -> Statistic:
    from lm_eval.api import metrics

    known = {
        metrics.mean: MEAN,
        metrics.perplexity: PERPLEXITY,
        metrics.weighted_perplexity: WEIGHTED_PERPLEXITY,
        metrics.bits_per_byte: BITS_PER_BYTE,
    }
    return known.get(aggregate) or Statistic(of_items=aggregate)


def _language_model(subject: Subject, tokenizer: Any, context: int | None, batch: int) -> Any:
    if isinstance(subject, Loaded):
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=subject.model, tokenizer=tokenizer, batch_size=batch, max_length=context)
    assert isinstance(subject, Served)
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{subject.url}/v1/completions",
        model=subject.client.model,
        tokenizer=tokenizer.name_or_path,
        tokenizer_backend="huggingface",
        max_length=context,
        num_concurrent=batch,
        timeout=3600,
        header={"Content-Type": "application/json"},  # else it would send the user's OPENAI_API_KEY
    )


def _local(spec: str | Path | dict[str, Any]) -> list[Any]:
    """A directory or YAML file as task configs, with their data files found; anything else as it is."""
    if isinstance(spec, dict):
        return [spec]
    path = Path(spec)
    if path.is_dir():
        files = sorted(path.glob("*.yaml"))
        if not files:
            raise UsageError(f"{path} holds no task: put lm-eval's YAML files there")
    elif path.suffix in (".yaml", ".yml"):
        files = [path]
    else:
        return [str(spec)]
    return [config for file in files if "task" in (config := _read_yaml(file))]


def _read_yaml(file: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config = load_yaml(file)
    except Exception as error:  # YAML, or Python that a `!function` names
        raise UsageError(f"{file} is no task of lm-eval: {_reason(error)}") from error
    kwargs = config.get("dataset_kwargs") or {}
    if "data_files" in kwargs:
        config["dataset_kwargs"] = {**kwargs, "data_files": _beside(kwargs["data_files"], file.parent)}
    return config


def _beside(files: Any, directory: Path) -> Any:
    if isinstance(files, dict):
        return {split: _beside(value, directory) for split, value in files.items()}
    if isinstance(files, list):
        return [_beside(value, directory) for value in files]
    return str(directory / files) if (directory / files).exists() else files


@contextmanager
def _silent() -> Iterator[None]:
    """Without the bars and the advice of lm-eval and what it uses: progress is told by our own means."""
    import tqdm

    logger = logging.getLogger("lm_eval")
    level, original = logger.level, tqdm.tqdm.__init__

    def disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "disable": True})

    logger.setLevel(logging.CRITICAL)
    tqdm.tqdm.__init__ = disabled  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.tqdm.__init__ = original  # type: ignore[method-assign]
        logger.setLevel(level)


def _lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise HalfbyteError("tasks need lm-eval: pip install 'lm-eval[api,hf]'") from None


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
