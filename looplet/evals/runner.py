"""Find `eval_*` functions and score runs with them.

An evaluator is a function of a context, `eval_answer(ctx)`, or of a context and a judge, `eval_tone(ctx, llm)`; it may
be async.  A context is any object with the attributes of `EvalContext`.  What an evaluator does wrong becomes a result
that cannot pass; what is wrong with a file of evaluators is a ConfigError.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import sys
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any, Final, TypeAlias, TypedDict

from looplet.backends.direct import for_purpose
from looplet.errors import ConfigError, did_you_mean
from looplet.evals.score import DEFAULT_THRESHOLD, EvalResult, at_least, is_required, tags_of

Evaluator: TypeAlias = Callable[..., Any]

PATTERN: Final = "eval_*.py"
JUDGE: Final = "judge"
"""the purpose by which routers know an evaluator's calls"""
NEEDS_JUDGE: Final = (
    "needs a judge: give eval_run(judge_llm=...) one, leave it out with its tag, or mark it required=False"
)

_SIBLINGS: Final[dict[str, Path]] = {}
"""the modules that eval files imported from their own folder, which another folder's `import helpers` must not get"""


class EvalRow(TypedDict):
    """What one evaluator said about many runs."""

    name: str
    required: bool
    passed: bool
    runs: int
    scores: list[float]
    """of the runs that were scored, in order"""
    avg_score: float | None
    min_score: float | None
    max_score: float | None
    per_run: list[dict[str, Any]]
    """`EvalResult.to_dict()` of every run, with the run's label as `run`"""
    errors: list[str]
    """why runs have no verdict; equal reasons stand here once"""


# --- finding evaluators -----------------------------------------------------------------------------------------------


def eval_discover(path: str | PathLike[str], *, pattern: str = PATTERN, prefix: str = "eval_") -> list[Evaluator]:
    """Return the evaluators defined in a file, or in the files of a folder that match `pattern`, in order.

    The files run as ordinary Python that may import its neighbours.
    Raises ConfigError, with file and line, when the path does not exist or a file cannot be run.
    """
    return [found for file in eval_files(path, pattern) for found in _defined_in(_load(file), prefix)]


def eval_files(path: str | PathLike[str], pattern: str = PATTERN) -> list[Path]:
    """Return the file itself, or the files directly in a folder that match; ConfigError when there is no such path."""
    path = Path(path)
    if path.is_dir():
        return sorted(file for file in path.glob(pattern) if file.is_file())
    if path.is_file():
        return [path]
    raise ConfigError(
        f"no such file or folder: {str(path)!r}; name a file of eval_* functions or a folder of such files"
    )


def _load(file: Path) -> ModuleType:
    """Run a file as a module with a name that no other module has."""
    file = file.resolve()
    name = f"looplet_eval_{hashlib.sha256(bytes(file)).hexdigest()[:12]}_{file.stem}"
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        with _imports_from(file.parent):
            exec(compile(file.read_bytes(), str(file), "exec", dont_inherit=True), module.__dict__)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the author's file; sys.exit() in it must not end the command as a success
        del sys.modules[name]
        raise ConfigError(f"cannot load evals: {_blame(error, str(file))}; none of its evaluators was run") from error
    return module


@contextmanager
def _imports_from(folder: Path) -> Iterator[None]:
    """Let `import` find the modules of a folder first, and those of the current folder last."""
    for name in [name for name, home in _SIBLINGS.items() if home != folder]:
        sys.modules.pop(name, None)
        del _SIBLINGS[name]
    saved, before = list(sys.path), set(sys.modules)
    importlib.invalidate_caches()
    sys.path[:] = [str(folder), *saved, str(Path.cwd())]
    try:
        yield
    finally:
        sys.path[:] = saved
        _SIBLINGS.update({name: folder for name in set(sys.modules) - before if _is_sibling(name, folder, before)})


def _is_sibling(name: str, folder: Path, before: set[str]) -> bool:
    top = name.partition(".")[0]
    file = getattr(sys.modules[name], "__file__", None)
    if top in before or file is None or not Path(file).is_relative_to(folder):
        return False
    return (folder / f"{top}.py").is_file() or (folder / top).is_dir()


def _defined_in(module: ModuleType, prefix: str) -> list[Evaluator]:
    return [
        _named(name, value, module)
        for name, value in list(vars(module).items())
        if name.startswith(prefix) and callable(value) and not inspect.isclass(value) and not _imported(value, module)
    ]


def _imported(value: Any, module: ModuleType) -> bool:
    """Tell whether another module has this very object under its own name.

    `__module__` alone does not tell: a decorator that does not use functools.wraps leaves its own module there.
    """
    home = getattr(value, "__module__", None)
    if home is None or home == module.__name__:
        return False
    return getattr(sys.modules.get(home), getattr(value, "__qualname__", ""), None) is value


def _named(name: str, value: Evaluator, module: ModuleType) -> Evaluator:
    """Return the evaluator under the name that its file gives it, which a decorator or a partial may not know."""
    if getattr(value, "__name__", None) == name and value.__module__ == module.__name__:
        return value

    @functools.wraps(value)
    def evaluator(*args: Any, **kwargs: Any) -> Any:
        return value(*args, **kwargs)

    evaluator.__name__ = name
    evaluator.__module__ = module.__name__
    return evaluator


# --- running them -----------------------------------------------------------------------------------------------------


def eval_run(
    evaluators: Iterable[Evaluator],
    ctx: Any,
    *,
    judge_llm: Any = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
) -> list[EvalResult]:
    """Score one run: a result for every evaluator with a tag in `include` (all if None) and none in `exclude`.

    An evaluator that raises gives the label `error`, one whose judge is missing `skipped`; neither passes.
    Each evaluator gets its own copy of the context, so that none sees what another one changed.
    Raises ConfigError for an `include` tag that no evaluator has.
    """
    chosen = _select(evaluators, include, exclude)
    return [_evaluate(name, evaluator, ctx, judge_llm) for name, evaluator in chosen]


def eval_run_batch(
    evaluators: Iterable[Evaluator],
    contexts: Iterable[Any],
    *,
    judge_llm: Any = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    threshold: float = DEFAULT_THRESHOLD,
    mean: bool = False,
) -> list[EvalRow]:
    """Score many runs: one row for each evaluator.

    `contexts` holds contexts, or `(label, context)` pairs; a context without a label is called `run_<index>`.
    A row has passed when every run has a score of at least `threshold`, or, with `mean`, every run a score and their
    average that much.
    """
    runs = [_labelled(index, item) for index, item in enumerate(contexts)]
    rows = []
    for name, evaluator in _select(evaluators, include, exclude):
        results = [(label, _evaluate(name, evaluator, ctx, judge_llm)) for label, ctx in runs]
        rows.append(_row(name, is_required(evaluator), results, threshold, mean))
    return rows


def eval_names(evaluators: Sequence[Evaluator]) -> list[str]:
    """Return a name for each evaluator; those that share one become `file::name`, or longer as far as it takes."""
    plain = [str(getattr(evaluator, "__name__", type(evaluator).__name__)) for evaluator in evaluators]
    files = [_file_of(evaluator) for evaluator in evaluators]
    names = plain
    for heads in ([Path(file).name for file in files], [shown(file) for file in files]):
        count = Counter(names)
        names = [
            f"{head}::{short}" if head and count[name] > 1 else name
            for name, head, short in zip(names, heads, plain, strict=True)
        ]
    count = Counter(names)
    return [f"{name}#{names[:i].count(name) + 1}" if count[name] > 1 else name for i, name in enumerate(names)]


def _select(
    evaluators: Iterable[Evaluator], include: Iterable[str] | None, exclude: Iterable[str] | None
) -> list[tuple[str, Evaluator]]:
    evaluators = list(evaluators)
    wanted, unwanted = _tag_set(include), _tag_set(exclude)
    known = frozenset[str]().union(*map(tags_of, evaluators))
    for tag in sorted(wanted - known):
        hint = did_you_mean(tag, known) or f"; tags in use: {', '.join(sorted(known)) or 'none'}"
        raise ConfigError(f"no evaluator has the tag {tag!r}{hint}")
    return [
        (name, evaluator)
        for name, evaluator in zip(eval_names(evaluators), evaluators, strict=True)
        if (not wanted or tags_of(evaluator) & wanted) and not tags_of(evaluator) & unwanted
    ]


def _tag_set(tags: Iterable[str] | None) -> frozenset[str]:
    return frozenset([tags] if isinstance(tags, str) else tags or ())


def _evaluate(name: str, evaluator: Evaluator, ctx: Any, judge_llm: Any) -> EvalResult:
    started = time.perf_counter()
    try:
        result = _call(name, evaluator, ctx, judge_llm)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - the author's code; sys.exit(0) in it is no pass
        where = _blame(error, _file_of(evaluator), _first_line(evaluator))
        result = EvalResult(name, label="error", explanation=where)
    return dataclasses.replace(result, duration_ms=result.duration_ms or (time.perf_counter() - started) * 1000)


def _call(name: str, evaluator: Evaluator, ctx: Any, judge_llm: Any) -> EvalResult:
    parameters = list(inspect.signature(evaluator).parameters.values())
    judge = next((p for p in parameters[1:] if p.name == "llm"), None)
    if judge is None:
        value = evaluator(_own_copy(ctx))
    elif judge_llm is not None:
        value = evaluator(_own_copy(ctx), llm=for_purpose(judge_llm, JUDGE))
    elif judge.default is inspect.Parameter.empty:
        return EvalResult(name, label="skipped", explanation=NEEDS_JUDGE)
    else:
        value = evaluator(_own_copy(ctx))
    return EvalResult.from_return(_wait(value) if inspect.isawaitable(value) else value, name=name)


def _own_copy(ctx: Any) -> Any:
    """Return a context whose lists and dicts are the evaluator's own; one that is no dataclass is shared."""
    if not dataclasses.is_dataclass(ctx) or isinstance(ctx, type):
        return ctx
    values = {field.name: getattr(ctx, field.name) for field in dataclasses.fields(ctx) if field.init}
    copies = {name: value.copy() for name, value in values.items() if isinstance(value, list | dict | set)}
    return dataclasses.replace(ctx, **copies)


def _wait(value: Awaitable[Any]) -> Any:
    """Run an async evaluator to its end, in a thread of its own where an event loop is already running."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor
    from contextvars import copy_context

    async def result() -> Any:
        return await value

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(result())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(copy_context().run, asyncio.run, result()).result()


# --- telling about it -------------------------------------------------------------------------------------------------


def shown(file: str) -> str:
    """Return a path as people want to read it: relative when it lies in the current folder."""
    path, here = Path(file), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else file


def _labelled(index: int, item: Any) -> tuple[str, Any]:
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        return item
    return f"run_{index}", item


def _row(name: str, required: bool, results: list[tuple[str, EvalResult]], threshold: float, mean: bool) -> EvalRow:
    errors = _each_once([(label, result.complaint) for label, result in results if result.complaint is not None])
    scores = [result.score for _, result in results if result.complaint is None and result.score is not None]
    average = fmean(scores) if scores else None
    if mean:
        enough = average is not None and at_least(average, threshold)
    else:
        enough = bool(results) and all(result.meets(threshold) for _, result in results)
    return {
        "name": name,
        "required": required,
        "passed": enough and not errors,
        "runs": len(results),
        "scores": scores,
        "avg_score": average,
        "min_score": min(scores, default=None),
        "max_score": max(scores, default=None),
        "per_run": [{"run": label, **result.to_dict(), "passed": result.meets(threshold)} for label, result in results],
        "errors": errors,
    }


def _each_once(complaints: list[tuple[str, str]]) -> list[str]:
    """Return `reason (in run_1)`, or `reason (in 7 runs, first run_1)`: one line for each reason."""
    labels: dict[str, list[str]] = {}
    for label, reason in complaints:
        labels.setdefault(reason, []).append(label)
    return [
        f"{reason} (in {runs[0]})" if len(runs) == 1 else f"{reason} (in {len(runs)} runs, first {runs[0]})"
        for reason, runs in labels.items()
    ]


def _file_of(evaluator: Evaluator) -> str:
    """Return the path of the file that offers the evaluator, or an empty string."""
    module = sys.modules.get(getattr(evaluator, "__module__", None) or "")
    code = getattr(inspect.unwrap(evaluator), "__code__", None)
    return str(getattr(module, "__file__", None) or getattr(code, "co_filename", ""))


def _first_line(evaluator: Evaluator) -> int:
    code = getattr(inspect.unwrap(evaluator), "__code__", None)
    return code.co_firstlineno if code and code.co_filename == _file_of(evaluator) else 0


def _blame(error: BaseException, file: str, line: int = 0) -> str:
    """Return `ZeroDivisionError: division by zero (eval_x.py:12)`: the last line of `file` that was running."""
    lines = [number for frame, number in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno or 0)
    line = lines[-1] if lines else line
    text = error.msg if isinstance(error, SyntaxError) and error.filename == file else str(error)
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{what} ({shown(file)}:{line})" if line else f"{what} ({shown(file)})"
