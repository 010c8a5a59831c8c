"""The light part of published runs: kept, restored elsewhere, and compared there as they were."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from moalign.comparison.compare import CompareRequest, compare
from moalign.core.errors import RequestError
from tests.comparison.conftest import ask

SCRIPT = Path(__file__).resolve().parents[2] / "results" / "published" / "runs.py"
pytestmark = pytest.mark.usefixtures("_toys")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("published_runs", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", tmp_path / "published")
    return module


def test_restored_runs_compare_as_the_record_says(
    script: ModuleType, card: str, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ask(card, results, seeds=2)
    assert first.json_file is not None
    assert script.main(["keep", "toys", str(first.json_file)]) == 0
    kept = sorted((tmp_path / "published" / "toys" / "runs").iterdir())
    assert len(kept) == 4
    assert str(tmp_path) not in (tmp_path / "published" / "toys" / "compare.json").read_text(encoding="utf-8")
    elsewhere = tmp_path / "elsewhere" / "results"
    assert script.main(["restore", "toys", "--results", str(elsewhere)]) == 0
    assert capsys.readouterr().out == "4 runs kept\ntoys: 4 runs restored\n"
    runs = sorted(map(str, elsewhere.glob("runs/*/*/*")))
    again = compare(CompareRequest(runs=runs, results=elsewhere))
    rows, as_before = ([{**row, "runs": len(row["runs"])} for row in told.content["rows"]] for told in (again, first))
    assert rows == as_before
    assert again.content["pairs"] == first.content["pairs"]
    # What is there is left alone; the same content is the same bytes.
    (Path(runs[0]) / "run.json").write_text("mine", encoding="utf-8")
    before = [path.read_bytes() for path in kept]
    assert script.restore(tmp_path / "published" / "toys", elsewhere) == []
    assert (Path(runs[0]) / "run.json").read_text(encoding="utf-8") == "mine"
    script.keep(Path(first.json_file), tmp_path / "published" / "toys")
    assert [path.read_bytes() for path in kept] == before


def test_runs_that_the_record_no_longer_names_go(script: ModuleType, card: str, results: Path, tmp_path: Path) -> None:
    script.keep(Path(str(ask(card, results).json_file)), tmp_path / "kept")
    script.keep(Path(str(ask(card, results, methods=["good"]).json_file)), tmp_path / "kept")
    assert [path.name.split("-")[0] for path in (tmp_path / "kept" / "runs").iterdir()] == ["good"]
    assert len(json.loads((tmp_path / "kept" / "compare.json").read_text(encoding="utf-8"))["rows"]) == 1


def test_what_is_not_there_is_named_and_nothing_is_written(
    script: ModuleType, card: str, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Path(str(ask(card, results).json_file))
    gone = json.loads(record.read_text(encoding="utf-8"))["rows"][0]["runs"][0]["run"]
    (Path(gone) / "run.json").unlink()
    assert script.main(["keep", "toys", str(record)]) == 2
    assert f"it names runs that are not there: {gone}" in capsys.readouterr().err
    assert not (tmp_path / "published").exists()
    assert script.main(["restore", "toys", "--results", str(tmp_path)]) == 2
    assert "toys: no runs were kept of it" in capsys.readouterr().err


def test_the_data_of_a_kept_run_is_that_of_this_checkout(script: ModuleType, tmp_path: Path) -> None:
    """A card's hash covers a relative path whole, of an absolute one its last part alone."""
    there, run = tmp_path / "there", tmp_path / "there" / "results" / "runs" / "toys" / "good" / "id"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"path": f"{there}/recipes/toys/questions.jsonl", "other": "/data/x"}))
    kept = tmp_path / "published" / "toys" / "runs" / "good-id.tar.xz"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(script.pack(run, there))
    (restored,) = script.restore(tmp_path / "published" / "toys", tmp_path / "elsewhere")
    here = script.HERE.parents[1]
    assert json.loads((restored / "run.json").read_text()) == {
        "path": f"{here}/recipes/toys/questions.jsonl",
        "other": "/data/x",
    }


def test_the_scale_goes_with_the_runs_and_another_one_is_refused(
    script: ModuleType, card: str, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(card).read_text(encoding="utf-8")
    start = text.index("normaliser:")
    Path(card).write_text(text[:start] + text[text.index("reference_point:") :], encoding="utf-8")
    first = ask(card, results)
    scale = next(results.glob("tasks/*/normaliser.json"))
    assert script.main(["keep", "toys", str(first.json_file)]) == 0
    elsewhere = tmp_path / "elsewhere"
    assert script.main(["restore", "toys", "--results", str(elsewhere)]) == 0
    other = elsewhere / scale.relative_to(results)
    assert other.read_bytes() == scale.read_bytes()
    runs = sorted(map(str, elsewhere.glob("runs/*/*/*")))
    assert compare(CompareRequest(runs=runs, results=elsewhere)).content["pairs"] == first.content["pairs"]
    fitted = json.loads(other.read_text())
    other.write_text(json.dumps({**fitted, "lo": [value - 0.1 for value in fitted["lo"]]}))
    assert script.restore(tmp_path / "published" / "toys", elsewhere) == []
    assert f"note: {other} is not that of the runs restored" in capsys.readouterr().err
    with pytest.raises(RequestError, match=r"eval.json: judged on another scale than that of .*/tasks/toy-"):
        compare(CompareRequest(runs=runs, results=elsewhere))


@pytest.mark.parametrize("content", ['{"rows": []}', "[1]", '{"task": "t", "card_hash": "h", "rows": []}'])
def test_what_is_no_finished_comparison_is_not_kept(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "a.json").write_text(content)
    assert script.main(["keep", "toys", str(tmp_path / "a.json")]) == 2
    told = capsys.readouterr().err
    assert "no record of a comparison" in told or "none of its runs is finished" in told
    assert not (tmp_path / "published" / "toys").exists()
