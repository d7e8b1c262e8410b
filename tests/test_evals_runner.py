"""Evaluators: found in files, run over contexts, and failing closed."""

import asyncio
import io
import json
import math
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from looplet.cli.evals import EvalOptions, Report, closing, details, eval_command, load_evaluators, run_evals, table
from looplet.errors import ConfigError
from looplet.evals.runner import eval_discover, eval_names, eval_run, eval_run_batch
from looplet.evals.score import EvalResult, eval_mark, is_required, tags_of


@dataclass
class Context:
    """The attributes of an EvalContext, as plain values."""

    steps: list[Any] = field(default_factory=list)
    task: dict[str, Any] = field(default_factory=dict)
    final_output: dict[str, Any] = field(default_factory=dict)
    session_log_text: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)
    stop_reason: str | None = "done"

    @property
    def completed(self):
        return self.stop_reason == "done"


class Judge:
    def generate(self, prompt, **_kwargs):
        return "0.75"


def eval_value(ctx):
    return ctx.final_output["value"]


def eval_completed(ctx):
    return ctx.completed


def eval_judged(ctx, llm):
    return float(llm.generate("how good?"))


def with_value(value):
    return Context(final_output={"value": value})


def line_of(function, offset):
    return function.__code__.co_firstlineno + offset


# --- what a return value means ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "score", "label", "passed"),
    [
        (True, 1.0, "pass", True),
        (False, 0.0, "fail", False),
        (1, 1.0, None, True),
        (0, 0.0, None, False),
        (0.5, 0.5, None, True),
        (0.49, 0.49, None, False),
        (Fraction(3, 4), 0.75, None, True),
        ("pass", 1.0, "pass", True),
        (" Correct ", 1.0, "Correct", True),
        ("yes", 1.0, "yes", True),
        ("fail", 0.0, "fail", False),
        ("INCORRECT", 0.0, "INCORRECT", False),
        ("no", 0.0, "no", False),
        ("medium", None, "medium", False),
        ({"score": 0.0, "f1": 1.0}, 0.0, None, False),
        ({"precision": 0.2, "f1": 0.8}, 0.8, None, True),
        ({"accuracy": True}, 1.0, None, True),
        ({"overall": 0.6}, 0.6, None, True),
        ({"precision": 0.2}, None, None, False),
        ({"score": 1.0, "label": "fail"}, 1.0, "fail", False),
        ({"label": "pass"}, 1.0, "pass", True),
        (EvalResult(score=0.9, label="fine"), 0.9, "fine", True),
        (EvalResult(label="pass"), 1.0, "pass", True),
        (EvalResult(score=1.0, label="error"), 1.0, "error", False),
    ],
)
def test_return_value_becomes_a_verdict(value, score, label, passed):
    result = EvalResult.from_return(value, name="eval_x")
    assert (result.name, result.score, result.label, result.passed) == ("eval_x", score, label, passed)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "returned nothing"),
        ("  ", "an empty string"),
        (1.5, "returned 1.5: a score lies in 0..1"),
        (-0.1, "returned -0.1: a score"),
        (math.nan, "returned nan: a score"),
        (math.inf, "returned inf: a score"),
        (10**400, "a score lies in 0..1"),
        ({"score": "high"}, "'score' is 'high', which is no number"),
        ({"score": None, "f1": 1.0}, "'score' is None, which is no number"),
        ({"f1": 7}, "'f1' is 7: a score"),
        (EvalResult(score=80), "returned 80: a score"),
        ([1.0], "returned a list"),
        (object(), "returned a object"),
        ((step for step in ()), "returned a generator"),
    ],
)
def test_value_that_is_no_verdict_is_an_error_and_never_clipped(value, reason):
    result = EvalResult.from_return(value)
    assert (result.label, result.score, result.passed) == ("error", None, False)
    assert reason in result.explanation
    assert result.error == result.complaint == result.explanation


def test_dict_keeps_every_entry_as_metric_and_takes_over_words():
    result = EvalResult.from_return({"score": 1, "missing": ["a"], "explanation": "all but a"})
    assert result.metrics == {"score": 1, "missing": ["a"], "explanation": "all but a"}
    assert (result.explanation, result.label) == ("all but a", None)


def test_result_is_json_whatever_its_metrics_hold():
    result = EvalResult("eval_x", 1.0, metrics={"loss": math.nan, "kinds": {"b", "a"}, "text": "\ud800"})
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(text)["metrics"]["kinds"] == ["a", "b"]
    text.encode()


def test_pretty_shows_mark_name_score_and_reason():
    assert EvalResult("eval_a", 1.0, "pass").pretty().split() == ["✓", "eval_a", "1.00", "pass"]
    assert EvalResult("eval_a", 0.25).pretty().split() == ["✗", "eval_a", "0.25"]
    broken = EvalResult("eval_a", label="error", explanation="KeyError: 'x'")
    assert broken.pretty().split() == ["!", "eval_a", "-", "error", "KeyError:", "'x'"]


# --- marks ------------------------------------------------------------------------------------------------------------


def test_marks_keep_the_function_and_add_up():
    def eval_x(ctx):
        return True

    marked = eval_mark("fast")(eval_mark("verdict", required=False)(eval_x))
    assert marked is eval_x
    assert (tags_of(eval_x), is_required(eval_x)) == ({"fast", "verdict"}, False)
    assert (tags_of(eval_value), is_required(eval_value)) == (frozenset(), True)


def test_mark_without_parentheses_says_what_to_write():
    with pytest.raises(ConfigError, match=r"write @eval_mark\('verdict'\) or @eval_mark\(\)"):
        eval_mark(lambda ctx: True)


# --- one run ----------------------------------------------------------------------------------------------------------


def test_exception_is_an_error_with_the_line_that_raised():
    def eval_broken(ctx):
        limit = 0
        return 1 / limit

    (result,) = eval_run([eval_broken], Context())
    assert (result.label, result.score, result.passed) == ("error", None, False)
    assert result.explanation.startswith("ZeroDivisionError: division by zero (")
    assert result.explanation.endswith(f"test_evals_runner.py:{line_of(eval_broken, 2)})")


def test_line_is_the_evaluators_own_when_a_library_raised():
    def eval_parses(ctx):
        return json.loads(ctx.session_log_text)

    (result,) = eval_run([eval_parses], Context(session_log_text="{"))
    assert result.explanation.endswith(f"test_evals_runner.py:{line_of(eval_parses, 1)})")


def test_evaluator_of_the_wrong_shape_is_blamed_where_it_is_defined():
    def eval_two(ctx, threshold):
        return True

    (result,) = eval_run([eval_two], Context())
    assert "missing 1 required positional argument: 'threshold'" in result.explanation
    assert f":{line_of(eval_two, 0)})" in result.explanation


@pytest.mark.parametrize("stop", [SystemExit(0), asyncio.CancelledError()])
def test_evaluator_that_exits_does_not_end_the_others(stop):
    def eval_exits(ctx):
        raise stop

    labels = [result.label for result in eval_run([eval_exits, eval_completed], Context())]
    assert labels == ["error", "pass"]


def test_interrupt_from_the_keyboard_is_passed_on():
    def eval_slow(ctx):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        eval_run([eval_slow], Context())


def test_judge_is_given_to_the_parameter_named_llm():
    (result,) = eval_run([eval_judged], Context(), judge_llm=Judge())
    assert result.score == 0.75


def test_missing_judge_skips_and_does_not_pass():
    (result,) = eval_run([eval_judged], Context())
    assert (result.label, result.passed) == ("skipped", False)
    assert "judge_llm=" in result.error


def test_judge_with_a_default_is_not_missed():
    def eval_maybe(ctx, llm=None):
        return llm is None

    assert [eval_run([eval_maybe], Context(), judge_llm=judge)[0].label for judge in (None, Judge())] == [
        "pass",
        "fail",
    ]


def test_first_parameter_is_the_context_whatever_its_name():
    def eval_odd(llm):
        return llm.completed

    assert eval_run([eval_odd], Context())[0].label == "pass"


async def eval_async(ctx):
    await asyncio.sleep(0)
    return ctx.completed


def test_async_evaluator_is_awaited():
    assert eval_run([eval_async], Context())[0].score == 1.0


def test_async_evaluator_is_awaited_inside_a_running_loop():
    async def inside():
        return eval_run([eval_async], Context())

    assert asyncio.run(inside())[0].score == 1.0


def test_async_evaluator_that_raises_is_an_error_with_its_line():
    async def eval_late(ctx):
        await asyncio.sleep(0)
        raise LookupError("gone")

    (result,) = eval_run([eval_late], Context())
    assert result.explanation.startswith("LookupError: gone (")
    assert f":{line_of(eval_late, 2)})" in result.explanation


def test_evaluator_does_not_see_what_another_one_changed():
    def eval_greedy(ctx):
        ctx.steps.clear()
        ctx.task["seen"] = True
        ctx.stop_reason = "hook"
        return True

    def eval_after(ctx):
        return ctx.steps == [1, 2] and not ctx.task and ctx.completed

    ctx = Context(steps=[1, 2])
    assert [result.label for result in eval_run([eval_greedy, eval_after], ctx)] == ["pass", "pass"]
    assert ctx.steps == [1, 2]


def test_context_may_be_any_object():
    class Bare:
        completed = True

    assert eval_run([eval_completed], Bare())[0].passed


def test_every_result_has_a_duration():
    assert all(result.duration_ms > 0 for result in eval_run([eval_completed, eval_judged], Context()))
    assert eval_run([lambda ctx: EvalResult(score=1.0, duration_ms=7.0)], Context())[0].duration_ms == 7.0


@eval_mark("verdict", "fast")
def eval_tagged(ctx):
    return True


@eval_mark("slow")
def eval_slow(ctx):
    return True


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (None, None, ["eval_tagged", "eval_slow", "eval_completed"]),
        (["verdict"], None, ["eval_tagged"]),
        ("verdict", None, ["eval_tagged"]),
        (["fast", "slow"], None, ["eval_tagged", "eval_slow"]),
        (["fast", "slow"], ["verdict"], ["eval_slow"]),
        (None, ["slow"], ["eval_tagged", "eval_completed"]),
    ],
)
def test_tags_choose_evaluators(include, exclude, names):
    results = eval_run([eval_tagged, eval_slow, eval_completed], Context(), include=include, exclude=exclude)
    assert [result.name for result in results] == names


def test_unknown_tag_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match="no evaluator has the tag 'verdit'; did you mean 'verdict'"):
        eval_run([eval_tagged, eval_slow], Context(), include=["verdit"])
    with pytest.raises(ConfigError, match="'xyz'; tags in use: fast, slow, verdict"):
        eval_run([eval_tagged, eval_slow], Context(), include=["xyz"])


# --- many runs --------------------------------------------------------------------------------------------------------


def test_batch_gives_one_row_per_evaluator():
    (row,) = eval_run_batch([eval_value], [("a/trace.jsonl", with_value(1.0)), with_value(0.4)])
    per_run = row.pop("per_run")
    assert row == {
        "name": "eval_value",
        "required": True,
        "passed": False,
        "runs": 2,
        "scores": [1.0, 0.4],
        "avg_score": 0.7,
        "min_score": 0.4,
        "max_score": 1.0,
        "errors": [],
    }
    assert [(run["run"], run["score"], run["passed"]) for run in per_run] == [
        ("a/trace.jsonl", 1.0, True),
        ("run_1", 0.4, False),
    ]


def test_every_run_must_meet_the_threshold_unless_the_mean_is_asked_for():
    contexts = [with_value(1.0), with_value(0.4)]
    (strict,) = eval_run_batch([eval_value], contexts, threshold=0.6)
    (mean,) = eval_run_batch([eval_value], contexts, threshold=0.6, mean=True)
    assert (strict["passed"], mean["passed"]) == (False, True)


def test_mean_is_not_failed_by_a_rounding_error():
    (row,) = eval_run_batch([eval_value], [with_value(0.7)] * 3, threshold=0.7, mean=True)
    assert row["passed"]


@pytest.mark.parametrize("value", [None, "medium", {"depth": 3}, math.nan])
@pytest.mark.parametrize("mean", [False, True])
def test_one_run_without_a_verdict_fails_the_row_at_any_threshold(value, mean):
    (row,) = eval_run_batch([eval_value], [with_value(1.0), with_value(value)], threshold=0.0, mean=mean)
    assert (row["passed"], row["scores"], row["avg_score"]) == (False, [1.0], 1.0)
    assert len(row["errors"]) == 1
    assert row["errors"][0].endswith("(in run_1)")


def test_equal_errors_are_told_once():
    (row,) = eval_run_batch([eval_value], [Context() for _ in range(3)])
    (error,) = row["errors"]
    assert error.startswith("KeyError: 'value' (")
    assert error.endswith("(in 3 runs, first run_0)")


def test_row_without_runs_has_not_passed():
    (row,) = eval_run_batch([eval_value], [])
    assert (row["passed"], row["runs"], row["avg_score"], row["min_score"]) == (False, 0, None, None)


# --- finding evaluators -----------------------------------------------------------------------------------------------


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_folder_gives_the_evaluators_of_matching_files_in_order(tmp_path):
    write(
        tmp_path,
        eval_b="def eval_two(ctx): return True\ndef eval_one(ctx): return True\ndef helper(ctx): return True\n",
        eval_a="eval_limit = 3\nclass eval_Kind: pass\ndef eval_zero(ctx): return True\n",
        other="def eval_hidden(ctx): return True\n",
    )
    assert [found.__name__ for found in eval_discover(tmp_path)] == ["eval_zero", "eval_two", "eval_one"]
    assert [found.__name__ for found in eval_discover(tmp_path / "other.py")] == ["eval_hidden"]
    assert [found.__name__ for found in eval_discover(tmp_path, pattern="o*.py", prefix="help")] == []


def test_imported_evaluators_are_not_found_again(tmp_path):
    write(
        tmp_path,
        shared_checks="def eval_shared(ctx): return True\n",
        eval_a="from looplet.evals.score import eval_mark\n"
        "from shared_checks import eval_shared, eval_shared as eval_x\n"
        "@eval_mark('t')\ndef eval_own(ctx): return eval_shared(ctx)\n",
    )
    (found,) = eval_discover(tmp_path)
    assert (found.__name__, tags_of(found), eval_run([found], Context())[0].passed) == ("eval_own", {"t"}, True)


def test_decorated_evaluators_and_partials_are_found_under_their_own_name(tmp_path):
    write(
        tmp_path,
        deco="def unnamed(function):\n    def inner(ctx):\n        return function(ctx)\n    return inner\n",
        eval_a="from functools import partial\nfrom deco import unnamed\n"
        "@unnamed\ndef eval_plain(ctx): return ctx.completed\n"
        "def check(ctx, wanted): return ctx.final_output['value'] == wanted\n"
        "eval_seven = partial(check, wanted=7)\n",
    )
    results = eval_run(eval_discover(tmp_path), with_value(7))
    assert [(result.name, result.label) for result in results] == [("eval_plain", "pass"), ("eval_seven", "pass")]


def test_sibling_of_the_same_name_comes_from_the_own_folder(tmp_path):
    for name in ("one", "two"):
        write(
            tmp_path / name,
            eval_a="import facts_of_folder\ndef eval_name(ctx): return {'score': 1, 'name': facts_of_folder.NAME}\n",
            facts_of_folder=f"NAME = {name!r}\n",
        )
    found = [eval_discover(tmp_path / name)[0] for name in ("one", "two")]
    assert [result.metrics["name"] for result in eval_run(found, Context())] == ["one", "two"]


def test_discovery_leaves_the_import_path_and_installed_modules_alone(tmp_path):
    write(tmp_path, eval_a="import click\ndef eval_a(ctx): return bool(click.Command)\n", click="1 / 0\n")
    path, click = list(sys.path), sys.modules["click"]
    (found,) = eval_discover(tmp_path)
    assert eval_run([found], Context())[0].passed
    assert (sys.path, sys.modules["click"]) == (path, click)


def test_evaluator_file_named_like_an_installed_module_does_not_replace_it(tmp_path):
    write(tmp_path, json="def eval_a(ctx): return True\n")
    eval_discover(tmp_path / "json.py")
    assert sys.modules["json"] is json


def test_discovery_sees_a_changed_file(tmp_path):
    for value in ("True", "None"):
        write(tmp_path, eval_a=f"def eval_a(ctx): return {value}\n")
        (result,) = eval_run(eval_discover(tmp_path), Context())
        assert result.passed is (value == "True")


def test_file_may_define_dataclasses_and_postponed_annotations(tmp_path):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass, field\n"
        "@dataclass\nclass Wanted:\n    names: list[str] = field(default_factory=list)\n"
        "def eval_a(ctx): return Wanted().names == []\n"
    )
    write(tmp_path, eval_a=text)
    assert eval_run(eval_discover(tmp_path), Context())[0].passed


def test_file_may_import_from_the_current_folder(tmp_path, monkeypatch):
    write(tmp_path, agent_in_current_folder="ANSWER = 7\n")
    text = "from agent_in_current_folder import ANSWER\ndef eval_a(ctx): return ANSWER == 7\n"
    folder = write(tmp_path / "evals", eval_a=text)
    monkeypatch.chdir(tmp_path)
    assert eval_run(eval_discover(folder), Context())[0].passed


def test_file_runs_with_its_own_future_imports_only(tmp_path):
    write(tmp_path, eval_a="def one(x: int): ...\ndef eval_a(ctx): return one.__annotations__ == {'x': int}\n")
    assert eval_run(eval_discover(tmp_path), Context())[0].passed


def test_error_in_a_found_file_names_its_line(tmp_path):
    write(tmp_path, eval_a="def eval_a(ctx):\n    wanted = []\n    return wanted[0]\n")
    (result,) = eval_run(eval_discover(tmp_path), Context())
    assert result.explanation == f"IndexError: list index out of range ({(tmp_path / 'eval_a.py').resolve()}:3)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nimport no_such_module_here\n", r"ModuleNotFoundError: No module named .* \(.*eval_a\.py:2\)"),
        ("x = 1\n\ndef eval_a(ctx:\n", r"SyntaxError: .* \(.*eval_a\.py:3\)"),
        ("import sys\nsys.exit(0)\n", r"SystemExit: 0 \(.*eval_a\.py:2\)"),
        ("from looplet.evals.score import eval_mark\n@eval_mark\ndef eval_a(ctx): ...\n", r"eval_a\.py:2\)"),
        ("import broken_sibling\n", r"ZeroDivisionError: .* \(.*eval_a\.py:1\)"),
    ],
)
def test_file_that_cannot_be_loaded_is_an_error_with_its_line(tmp_path, text, message):
    write(tmp_path, eval_a=text, broken_sibling="1 / 0\n")
    modules = set(sys.modules)
    with pytest.raises(ConfigError, match=message):
        eval_discover(tmp_path)
    assert set(sys.modules) <= modules


def test_missing_path_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file or folder: .*evals"):
        eval_discover(tmp_path / "evals")


def test_evaluators_of_one_name_are_told_apart(tmp_path):
    text = "def eval_a(ctx): return True\n"
    one = write(tmp_path / "one", eval_x=text, eval_y=text)
    two = write(tmp_path / "two", eval_x=text, eval_z="def eval_b(ctx): return True\n")
    assert [result.name for result in eval_run(eval_discover(one), Context())] == [
        "eval_x.py::eval_a",
        "eval_y.py::eval_a",
    ]
    assert eval_names(eval_discover(one) + eval_discover(two)) == [
        f"{(one / 'eval_x.py').resolve()}::eval_a",
        "eval_y.py::eval_a",
        f"{(two / 'eval_x.py').resolve()}::eval_a",
        "eval_b",
    ]
    assert eval_names([eval_value, eval_value])[1].endswith("test_evals_runner.py::eval_value#2")
    assert eval_names([partial(eval_value)]) == ["partial"]


# --- the report of the command ----------------------------------------------------------------------------------------


def report_on(evaluators, *values, problems=(), **options) -> Report:
    contexts = [(f"run_{index}/trace.jsonl", with_value(value)) for index, value in enumerate(values)]
    return run_evals(contexts, problems, evaluators, EvalOptions(**options))


def test_report_passes_when_every_run_does():
    report = report_on([eval_value, eval_completed], 0.9, 0.8, threshold=0.7)
    assert (report.passed, report.runs, report.problems) == (True, 2, [])
    assert closing(report) == ["  overall: 0.93 (2 evals, 2 runs)", "  threshold: 0.70 → PASS"]


def test_report_fails_for_one_low_run_and_names_it():
    report = report_on([eval_value], 0.9, 0.5, threshold=0.7)
    assert closing(report) == ["  overall: 0.70 (1 eval, 2 runs)", "  threshold: 0.70 → FAIL"]
    assert details(report.rows[0], report.options, verbose=False) == ["      run_1/trace.jsonl: 0.5"]
    assert len(details(report.rows[0], report.options, verbose=True)) == 2


def test_mean_compares_averages():
    report = report_on([eval_value], 0.9, 0.5, threshold=0.7, mean=True)
    assert report.passed
    assert closing(report)[1] == "  threshold: 0.70 (mean) → PASS"


@eval_mark("hint", required=False)
def eval_optional(ctx):
    return ctx.final_output["value"]


def test_evaluator_that_is_not_required_decides_nothing():
    assert report_on([eval_completed, eval_optional], 0.1).passed
    assert report_on([eval_completed, eval_optional], None).passed


@pytest.mark.parametrize(
    ("evaluators", "values", "options", "problem"),
    [
        ([eval_value], [], {}, "no run found"),
        ([], [1.0], {}, "no evaluator found"),
        ([eval_value], [None], {}, "eval_value: returned nothing"),
        ([eval_value], ["medium"], {}, "eval_value: label 'medium' without a score"),
        ([eval_value], [{"depth": 1}], {}, "eval_value: metrics ['depth'] without a score"),
        ([eval_judged, eval_completed], [1.0], {}, "eval_judged: needs a judge"),
        ([eval_optional], [1.0], {}, "every evaluator is marked required=False"),
        ([eval_tagged], [1.0], {"exclude": ["fast"]}, "no evaluator is left"),
    ],
)
def test_report_fails_closed_and_says_why(evaluators, values, options, problem):
    report = report_on(evaluators, *values, threshold=0.0, **options)
    assert not report.passed
    (found,) = report.problems
    assert found.startswith(problem)
    assert closing(report)[1] == "  threshold: 0.00 → FAIL"


def test_report_without_rows_has_not_passed():
    report = Report(EvalOptions(), 0, [], [])
    assert (report.passed, report.overall) == (False, None)
    assert closing(report) == ["  overall: no scores (0 evals, 0 runs)", "  threshold: 0.50 → FAIL"]


def test_problem_of_loading_fails_what_would_pass_and_the_rest_is_scored():
    report = report_on([eval_value], 1.0, problems=["bad.jsonl:3: not JSON"])
    assert (report.passed, report.rows[0]["passed"], report.problems) == (False, True, ["bad.jsonl:3: not JSON"])


def test_report_is_one_json_document():
    document = json.loads(json.dumps(report_on([eval_value], 1.0, None).to_dict(), allow_nan=False))
    assert sorted(document) == ["evals", "mean", "overall", "passed", "problems", "runs", "threshold"]
    assert (document["passed"], document["runs"], document["threshold"], document["overall"]) == (False, 2, 0.5, 1.0)
    assert [run["label"] for run in document["evals"][0]["per_run"]] == [None, "error"]


def test_table_shows_names_and_scores_as_they_are():
    report = report_on([eval_value], 0.25)
    report.rows[0]["name"] = "eval_x.py::eval_[bold]"
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=100).print(table(report.rows))
    assert "eval_x.py::eval_[bold]" in out.getvalue()
    assert "0.25" in out.getvalue()


def test_text_of_a_run_cannot_control_the_terminal():
    report = report_on([eval_value], {"score": 0.0, "explanation": "a\x1b[2Jb\nc"})
    assert details(report.rows[0], report.options, verbose=True) == ["      run_0/trace.jsonl: 0  a [2Jb c"]


# --- the command itself -----------------------------------------------------------------------------------------------


def test_each_file_is_loaded_once_and_broken_ones_are_problems(tmp_path):
    write(tmp_path, eval_a="def eval_a(ctx): return True\n", eval_b="1 / 0\n", eval_c="x = 1\n")
    evaluators, problems = load_evaluators([tmp_path, tmp_path / "eval_a.py"])
    assert [found.__name__ for found in evaluators] == ["eval_a"]
    assert len(problems) == 2
    assert "ZeroDivisionError" in problems[0]
    assert "no evaluator in" in problems[1]


def test_folder_without_evaluators_is_a_problem(tmp_path):
    evaluators, (problem,) = load_evaluators([tmp_path])
    assert evaluators == []
    assert "no eval_*.py in" in problem


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["missing"],
        [".", "--threshold", "1.5"],
        [".", "--threshold", "nan"],
        [".", "--threshold", "much"],
        [".", "--evals", "missing.py"],
        [".", "--nonsense"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    result = CliRunner().invoke(eval_command, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: " in result.stderr


def test_help_teaches_with_an_example_file():
    result = CliRunner().invoke(eval_command, ["--help"])
    assert result.exit_code == 0
    assert '    def eval_has_answer(ctx):\n        return "answer" in ctx.final_output' in result.output
