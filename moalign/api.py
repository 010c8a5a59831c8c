"""moalign from Python: what the commands do, as functions that return typed objects.

``import moalign`` brings these functions without loading anything heavy. The command line calls the same functions, so
that a run that one of them made is found by the other, and a wrong value raises :class:`moalign.RequestError` with the
message that the command would print. Values are given as Python has them: a preference is a sequence of weights, one
per objective, non-negative and summing to 1; settings are a mapping of dotted keys or of mappings, as ``--set`` takes
them (``{"steps": 100, "task": {"grid": 5}}``). Results are kept in a folder, ``results`` unless named.

The examples share one run, which the first of them trains in seconds and all others find:

>>> import moalign
>>> pool = {"prompts": 24, "per_prompt": 2, "calibration_per_prompt": 2}
>>> card = {"task": {"grid": 3, "evaluation": {"prompts": 8, "samples": 1, "bootstrap": 100}, "pool": pool}}
>>> tiny = {"steps": 2, "batch": 4, **card}
>>> run = moalign.train("mo-odpo", settings=tiny)
>>> run.status
'done'
>>> moalign.train("mo-odpo", prefs=(3, 7))
Traceback (most recent call last):
moalign.core.errors.RequestError: --prefs 3,7: the weights sum to 10, not 1; did you mean --prefs 0.3,0.7?
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moalign.core import processes
from moalign.core.errors import RequestError
from moalign.core.progress import Progress, silent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from moalign.comparison.result import CompareResult
    from moalign.evaluation.curve import Curve
    from moalign.evaluation.result import EvalResult
    from moalign.evaluation.score import Scores
    from moalign.experiment.arguments import Settings, Vector
    from moalign.experiment.generate import Answer
    from moalign.experiment.handle import Best, RunHandle
    from moalign.experiment.train import Plan

__all__ = ["best", "compare", "curve", "evaluate", "evaluate_all", "generate", "hypervolume", "load", "score"]
__all__ += ["score_file", "train"]


def train(
    method: str,
    task: str | Path | None = None,
    *,
    prefs: Vector | Iterable[Vector] | None = None,
    grid: int | None = None,
    seed: int | None = None,
    settings: Settings | None = None,
    recipe: str | Path | None = None,
    results: str | Path = "results",
    evaluate: bool = True,
    progress: Progress = silent,
    planned: Callable[[Plan], None] | None = None,
    **more_settings: Any,
) -> RunHandle:
    """Train a method on a task, or find the run that the same call made; what was interrupted is resumed.

    Args:
        method: its name, as ``moalign ls methods`` lists it.
        task: a task's name, a card file or its folder; None: the recipe's own, without ``recipe`` the ``sandbox``.
        prefs: what to train for, or on where one policy has them all; None: the recipe's, else the task's distribution.
        grid: the same, as the size of an even grid.
        seed: of training; None: the recipe's, which is 0 unless it says otherwise.
        settings: changes of the recipe, and with keys that begin with ``task`` of the task card; or as arguments.
        recipe: a recipe file; None: the one that moalign has for this task and method, if any.
        evaluate: whether to evaluate the run, too, where that was not done (of several processes the first does).
        progress, planned: called as ``progress(what, done, total)``, and with the checked plan before any work begins.

    Raises RequestError for every problem of the request, before anything is written, and where another process trains
    the run; WorkError when training failed: the next call goes on from the last checkpoint.

    >>> run = moalign.train("mo-odpo", "sandbox", seed=0, settings=tiny)
    >>> run.reused, run.record.cost.tokens_trained > 0
    (True, True)
    """
    from moalign.evaluation import evaluate as evaluation
    from moalign.experiment import arguments
    from moalign.experiment import train as workflow
    from moalign.experiment.handle import RunHandle

    request = workflow.TrainRequest(
        method,
        task=None if task is None else str(task),
        recipe=_path(recipe),
        prefs=arguments.vector_texts(prefs),
        grid=grid,
        overrides=(*arguments.setting_texts(settings), *arguments.setting_texts(more_settings)),
        seed=seed,
        results=Path(results),
    )
    with processes.joined():
        plan = workflow.plan(request, progress)
        if planned is not None:
            planned(plan)
        run, reused = workflow.train(plan, progress)
        evaluate = evaluate and processes.is_writer()
    handle = RunHandle(run.path, run.record, Path(results), reused)
    if evaluate and handle.evaluation is None:  # with the plan's task, which has the base loaded already
        evaluation.evaluate(plan.method, plan.context(run), None, progress)
    return handle


def load(run: str | Path | None = None, *, results: str | Path = "results") -> RunHandle:
    """Return a run that is there already; nothing is loaded but its record.

    Args:
        run: its folder, its identifier or the beginning of it, ``method/id`` or ``task/method/id``; None: the run that
            finished last.
        results: where it is looked for, unless ``run`` is a folder.

    Raises:
        RequestError: no run fits or several do (they are named), or its record is damaged.

    >>> run = moalign.load()
    >>> run.record.method, run.objectives
    ('mo-odpo', ('helpfulness', 'harmlessness'))
    >>> len(run.policy((0.3, 0.7)).respond(["how do i fix the roof today ?"]))
    1
    >>> frame = run.to_frame()  # 8 prompts at each of 3 preferences
    >>> len(frame), list(frame.columns)
    (24, ['prompt', 'preference', 'response', 'finished', 'helpfulness', 'harmlessness'])
    """
    from moalign.experiment.handle import RunHandle

    return RunHandle.find(None if run is None else str(run), Path(results))


def evaluate(
    run: RunHandle | str | Path | None = None,
    *,
    prefs: Vector | Iterable[Vector] | None = None,
    grid: int | None = None,
    samples: int | None = None,
    reference_point: Vector | None = None,
    results: str | Path = "results",
    progress: Progress = silent,
) -> EvalResult:
    """Evaluate a finished run, or read back what was evaluated before.

    Args:
        run: a run, or what :func:`load` finds it by; None: the run that finished last.
        prefs: the preferences to answer for; None: the task's grid, or those trained on where only those are served.
        grid: the same, as the size of an even grid.
        samples: answers to each evaluation prompt at each preference; None: the task card's.
        reference_point: of the hypervolume, in normalised units, ``[objectives]``; None: the task card's.

    Raises:
        RequestError: no such run, one that is not finished, or preferences that it cannot serve.

    >>> result = moalign.evaluate(reference_point=(0, 0))
    >>> [point.preference for point in result.points]
    [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    >>> low, high = result.hypervolume_interval
    >>> 0 < low <= result.hypervolume <= high
    True
    """
    return evaluate_all(
        [run],
        prefs=prefs,
        grid=grid,
        samples=samples,
        reference_point=reference_point,
        results=results,
        progress=progress,
    )[0]


def evaluate_all(
    runs: Iterable[RunHandle | str | Path | None],
    *,
    prefs: Vector | Iterable[Vector] | None = None,
    grid: int | None = None,
    samples: int | None = None,
    reference_point: Vector | None = None,
    results: str | Path = "results",
    progress: Progress = silent,
) -> list[EvalResult]:
    """Evaluate several runs, each once, in order; every value is checked against every run before the first answer.

    Arguments and errors are those of :func:`evaluate`.

    >>> [result.method for result in moalign.evaluate_all([moalign.load()])]
    ['mo-odpo']
    """
    from moalign.experiment import arguments
    from moalign.experiment.evaluate_runs import evaluate_runs

    vectors = arguments.vector_texts(prefs)
    arguments.refuse_both(vectors, grid)
    corner = None if reference_point is None else arguments.vector_text(reference_point)
    handles = [_handle(run, results) for run in runs]
    return evaluate_runs(handles, vectors, grid, corner, samples, progress)


def curve(
    run: RunHandle | str | Path | None = None,
    *,
    prefs: Vector | Iterable[Vector] | None = None,
    grid: int | None = None,
    samples: int | None = None,
    results: str | Path = "results",
    progress: Progress = silent,
) -> Curve:
    """Judge the snapshots of a run, one trained with the setting ``snapshots``: true and believed reward, KL to base.

    Arguments and errors are those of :func:`evaluate`; a run without snapshots is a RequestError, too.

    >>> whole = moalign.curve(moalign.train("mo-odpo", settings={**tiny, "snapshots": 2}))
    >>> [(row.part, row.step, row.share) for row in whole.rows], whole.best["inner_product"].lost >= 0
    ([('online', 1, 0.5), ('online', 2, 1.0)], True)
    """
    from moalign.evaluation import curve as workflow
    from moalign.experiment import arguments

    vectors = arguments.vector_texts(prefs)
    arguments.refuse_both(vectors, grid)
    method, context = _handle(run, results).open(progress)
    requested = arguments.requested(vectors, grid, context.task.card.objective_words)
    return workflow.curve(method, context, requested, progress, samples)


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _handle(run: RunHandle | str | Path | None, results: str | Path) -> RunHandle:
    return load(run, results=results) if run is None or isinstance(run, str | Path) else run


def generate(
    run: RunHandle | str | Path,
    prefs: Vector | Iterable[Vector],
    prompts: str | Sequence[str] | None = None,
    *,
    temperature: float | None = None,
    seed: int | None = None,
    results: str | Path = "results",
    progress: Progress = silent,
) -> list[Answer]:
    """Answer prompts with a finished run at one preference or several, and score the answers.

    Returns ``[preferences x prompts]`` answers in one list: all prompts at the first preference, then at the next.
    At every preference a prompt draws from the same random numbers. Each answer has ``prompt``, ``preference``,
    ``response``, its scores by objective, ``raw`` (larger is better) and ``normalised``, and ``cut_tokens``: how many
    tokens the prompt lost at its beginning, where it is longer than the card's ``generation.max_prompt_tokens``.

    Args:
        run: a run, or what :func:`load` finds it by.
        prefs: one preference or several.
        prompts: bare prompts, or one; None: the first evaluation prompts of the task.
        temperature: of sampling; None: the task card's. 0 is greedy.
        seed: of sampling; None: the evaluation's, which gives its first answers again.

    Raises:
        RequestError: an empty prompt, a wrong preference, or one that the run cannot serve.

    >>> for answer in moalign.generate(moalign.load(), [(1, 0), (0, 1)], "how do i fix the roof today ?"):
    ...     print(answer.preference, sorted(answer.raw))
    (1.0, 0.0) ['harmlessness', 'helpfulness']
    (0.0, 1.0) ['harmlessness', 'helpfulness']
    """
    from moalign.experiment import arguments
    from moalign.experiment import generate as workflow

    method, context = _handle(run, results).opened(progress)
    requested = arguments.required(arguments.vector_texts(prefs), context.task.card.objective_words)
    return workflow.generate(method, context, requested, prompts, temperature, seed, progress)


def score(
    task: str | Path,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    settings: Settings | None = None,
    normalised: bool = False,
    results: str | Path = "results",
    progress: Progress = silent,
) -> NDArray[np.float64]:
    """Score responses with a task's objectives; float64 ``[n, m]``, larger is better (NaN: a judge left it out).

    Args:
        task: a task's name, a card file or its folder.
        prompts: ``[n]``, the prompt of each response.
        responses: ``[n]``.
        settings: changes of the task card; every key begins with ``task``.
        normalised: in the task's normalised units (see ``moalign show TASK``) instead of the scorers' own. The first
            time that takes answers of the base model.
        results: where normalisers and scores are kept.

    Raises:
        RequestError: a problem of the card, or not one prompt for each response.
        WorkError: a scorer failed.

    >>> moalign.score("sandbox", ["how do i fix the roof today ?"] * 2, ["you could ask .", "hello"]).shape
    (2, 2)
    """
    from moalign.config.load import load_card
    from moalign.experiment import arguments
    from moalign.tasks.load import make_task

    arguments.refuse_unequal(prompts, responses)
    scoring = make_task(load_card(task, arguments.setting_texts(settings)), Path(results), progress)
    raw = scoring.panel.score(list(prompts), list(responses), lambda d, n: progress("scoring", d, n), gaps=True)
    return scoring.normaliser.unit(raw) if normalised else raw


def score_file(
    task: str | Path,
    source: str | Path,
    out: str | Path | None = None,
    *,
    settings: Settings | None = None,
    results: str | Path = "results",
    progress: Progress = silent,
) -> Scores:
    """Score a file of responses, however large: a summary, and the scores as a table beside it or in memory.

    Args:
        task: a task's name, a card file or its folder.
        source: JSONL, CSV or Parquet with the columns ``prompt`` and ``response``.
        out: Parquet file for raw and normalised scores; None: they are kept in the result's ``scored``.
        settings: changes of the task card; every key begins with ``task``.
        results: where normalisers and scores are kept.

    Raises:
        RequestError: a problem of the card, the file (with its line) or the output file.
        WorkError: a scorer failed.

    >>> _ = Path("answers.jsonl").write_text('{"prompt": "hello ?", "response": "hello"}')
    >>> moalign.score_file("sandbox", "answers.jsonl", settings=card).rows
    1
    """
    from moalign.evaluation import score as workflow
    from moalign.experiment import arguments

    overrides = arguments.setting_texts(settings)
    return workflow.score(str(task), Path(source), _path(out), overrides, Path(results), progress)


def compare(
    task_or_runs: str | Path | RunHandle | Iterable[RunHandle | str | Path] | None = None,
    methods: str | Sequence[str] | None = None,
    seeds: int = 1,
    *,
    suite: str = "full",
    task: str | None = None,
    grid: int | None = None,
    samples: int | None = None,
    jobs: int | None = None,
    executor: str = "local",
    settings: Settings | None = None,
    results: str | Path = "results",
    figure: str | Path | None = None,
    markdown: str | Path | None = None,
    html: str | Path | None = None,
    progress: Progress = silent,
) -> CompareResult:
    """Compare methods under equal conditions: train and evaluate what is missing, then say which wins and how surely.

    Args:
        task_or_runs: a task's name or card file (None: ``sandbox``), or else finished, evaluated runs.
        methods, suite: the methods' names; None: those of the card's suite, ``full`` or, where it has one, ``quick``.
        seeds: training seeds for each method: its recipe's and those that follow it.
        task, grid, samples: the task that named runs must be of; the others as in :func:`evaluate`.
        jobs: runs trained at a time; None: one, of tiny models one for each CPU.
        executor: ``local``, or ``ray`` for tasks of a ray cluster.
        settings: for every method that has them; ``{"mo-odpo.steps": 100}`` for one method.
        figure, markdown, html: where to write these, else in the comparison's folder (the page only when named).

    Raises RequestError for every problem of the request at once, before anything is trained. A run that fails does not
    raise: it is in the result's ``failed``, and its ``traces`` say why.

    >>> compared = moalign.compare([moalign.load()])
    >>> [(entry.rank, entry.method) for entry in compared.entries], compared.winner
    ([(1, 'mo-odpo')], None)
    """
    from moalign.comparison import compare as workflow
    from moalign.experiment import arguments

    if isinstance(task_or_runs, str | Path):
        task, task_or_runs = str(task_or_runs), None
    runs = task_or_runs if isinstance(task_or_runs, Iterable) else [task_or_runs] if task_or_runs else []
    request = workflow.CompareRequest(
        runs=tuple(str(getattr(run, "path", run)) for run in runs),
        task=task,
        methods=(methods,) if isinstance(methods, str) else tuple(methods or ()),
        suite=suite,
        seeds=seeds,
        grid=grid,
        samples=samples,
        jobs=jobs,
        executor=executor,
        overrides=arguments.setting_texts(settings),
        results=Path(results),
        figure=_path(figure),
        markdown=_path(markdown),
        html=_path(html),
    )
    return workflow.compare(request, progress)


def best(
    comparison: CompareResult | str | Path,
    prefs: Vector | Iterable[Vector],
    *,
    results: str | Path = "results",
) -> Best:
    """Return the best-ranked trained run of a comparison that answers for the preferences, with its rank.

    Of a method with several seeds it is the first that finished; a method that trains nothing is passed over.

    Args:
        comparison: what :func:`compare` returned, or its folder or ``compare.json``.
        prefs: one preference or several.
        results: where runs are looked for that are not where the comparison says.

    Raises:
        RequestError: no comparison, or none of its runs can answer (why not, one by one).

    >>> chosen = moalign.best(moalign.compare([moalign.load()]), (0.5, 0.5))
    >>> chosen.rank, chosen.run.record.method
    (1, 'mo-odpo')
    """
    from moalign.comparison.result import CompareResult
    from moalign.evaluation.evaluate import preferences_for
    from moalign.experiment import arguments
    from moalign.experiment.handle import Best, RunHandle
    from moalign.methods import registry

    place = comparison.files["json"] if isinstance(comparison, CompareResult) else Path(comparison)
    file = place / "compare.json" if place.is_dir() else place
    result = comparison if isinstance(comparison, CompareResult) else CompareResult.load(file)
    requested = arguments.required(arguments.vector_texts(prefs), result.objectives)
    folders = file.resolve().parents  # runs lie where the record says, else in the results folder that it lies in
    home = folders[2] if folders[1].name == "compare" else Path(results)
    refused = []
    for entry in result.entries:
        finished = next((run for run in entry.runs if run.status == "done"), None)
        if entry.rank is None or finished is None:
            continue
        run = RunHandle.find(finished.run if Path(finished.run).is_dir() else finished.run_id, home)
        if not registry.get(entry.method).capabilities.trains:
            refused.append(f"{entry.label} trains nothing")
            continue
        method, context = run.open()
        try:
            preferences_for(method, context, requested)
        except RequestError as error:
            refused.append(str(error))
        else:
            return Best(run, entry.rank, len(result.entries))
    raise RequestError(f"{file}: no run can be asked: {'; '.join(refused) or 'none is finished'}")


def hypervolume(points: ArrayLike, ref: ArrayLike, minimise: bool = False) -> float:
    """Return the volume of the union of the boxes between the points and the reference point.

    A point that is not strictly better than the reference point in every objective adds nothing.

    Args:
        points: ``[n, m]``, larger is better.
        ref: the reference point, ``[m]``.
        minimise: smaller is better, in points and reference point.

    Raises:
        RequestError: NaN, infinity, wrong shapes, or a volume beyond the range of a float.

    >>> moalign.hypervolume([[1, 3], [2, 2], [3, 1]], [0, 0])
    6.0
    >>> moalign.hypervolume([[1, 3], [2, 2]], [4, 4], minimise=True)
    5.0
    """
    import numpy as np

    from moalign.pareto.hypervolume import hypervolume as volume

    if minimise:
        points, ref = -np.asarray(points, dtype=float), -np.asarray(ref, dtype=float)
    return volume(points, ref)
