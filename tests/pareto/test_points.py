"""The CSV calculator: the documented answer, every faulty table, and what it must not import."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moalign.pareto.points
from moalign.core.errors import RequestError
from moalign.pareto.hypervolume import hypervolume
from moalign.pareto.points import calculate, parse_ref, read_points

TABLE = "helpfulness,harmlessness\n1,3\n2,2\n3,1\n"
CHECKOUT = Path(moalign.pareto.points.__file__).parents[2]


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "points.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_documented_answer(tmp_path: Path) -> None:
    assert calculate(write(tmp_path, TABLE), [0, 0]) == {
        "hypervolume": 6.0,
        "points": 3,
        "front": 3,
        "objectives": ["helpfulness", "harmlessness"],
        "ref": [0.0, 0.0],
    }
    assert calculate(write(tmp_path, TABLE), [1, 1])["hypervolume"] == 1.0


def test_the_answer_is_plain_json(tmp_path: Path) -> None:
    found = calculate(write(tmp_path, TABLE), np.array([0, 0]), preferences=[(0.5, 0.5)])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_front_counts_non_dominated_points(tmp_path: Path) -> None:
    found = calculate(write(tmp_path, TABLE + "1.5,1.5\n3,1\n"), [0, 0])
    assert (found["points"], found["front"], found["hypervolume"]) == (5, 3, 6.0)


def test_minimise_negates_points_and_reference(tmp_path: Path) -> None:
    found = calculate(write(tmp_path, TABLE), [4, 4], minimise=True)
    assert found["hypervolume"] == 6.0
    assert found["front"] == 3
    assert found["ref"] == [4.0, 4.0]
    assert calculate(write(tmp_path, TABLE), [0, 0], minimise=True)["hypervolume"] == 0.0
    assert calculate(write(tmp_path, "a,b\n1,1\n2,2\n"), [3, 3], minimise=True)["front"] == 1


def test_preferences_add_the_expected_utility(tmp_path: Path) -> None:
    path = write(tmp_path, TABLE)
    assert calculate(path, [0, 0], preferences=[(1, 0), (0.5, 0.5)])["expected_utility"] == 2.5
    with pytest.raises(RequestError, match="--prefs 3,7"):
        calculate(path, [0, 0], preferences=[(3, 7)])


def test_the_file_is_read_once_so_that_it_may_be_a_pipe(tmp_path: Path) -> None:
    import os
    import threading

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(TABLE), daemon=True)
    writer.start()
    assert calculate(pipe, [0, 0], preferences=["1,0", "0.5,0.5"])["expected_utility"] == 2.5
    writer.join(timeout=10)


def test_more_objectives_than_can_be_computed_are_refused(tmp_path: Path) -> None:
    names = ",".join(f"o{number}" for number in range(32))
    path = write(tmp_path, f"{names}\n{','.join(['1'] * 32)}\n")
    with pytest.raises(RequestError, match="found 32 objectives; at most 31 are possible"):
        calculate(path, [0] * 32)
    fewer = write(tmp_path, f"{names.rpartition(',')[0]}\n{','.join(['1'] * 31)}\n")
    assert calculate(fewer, [0] * 31)["hypervolume"] == 1.0


def test_points_beyond_the_reference_are_announced(tmp_path: Path) -> None:
    path = write(tmp_path, TABLE)
    heard: list[str] = []
    calculate(path, [0, 0], notify=heard.append)
    assert heard == []
    calculate(path, [1, 0], notify=heard.append)
    calculate(path, [3, 9], minimise=True, notify=heard.append)
    assert "1 of 3 points add nothing: not above --ref 1,0" in heard[0]
    assert "1 of 3 points add nothing: not below --ref 3,9" in heard[1]


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        (None, ["--ref is missing", "helpfulness, harmlessness", "--ref 0,0"]),
        ([0.0], ["--ref 0:", "1 number;", "2 objectives", "helpfulness, harmlessness", "--ref 0,0"]),
        ([0.0, 0.0, 1.0], ["--ref 0,0,1", "3 numbers", "give 2"]),
        ([0.0, float("nan")], ["--ref 0,nan", "finite"]),
    ],
)
def test_a_wrong_reference_names_the_option(tmp_path: Path, ref: list[float] | None, words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        calculate(write(tmp_path, TABLE), ref)
    for word in words:
        assert word in str(caught.value)


def test_parse_ref() -> None:
    assert parse_ref("0, -0.1,1e-3") == (0.0, -0.1, 0.001)
    for text in ("0,x", "", "0,", "0,nan", "inf", "1_0"):
        with pytest.raises(RequestError, match=f"--ref {text}"):
            parse_ref(text)


@pytest.mark.parametrize(
    "text",
    [
        TABLE.replace("\n", "\r\n"),
        "\ufeff" + TABLE,
        TABLE.replace(",", " , "),
        TABLE.rstrip("\n"),
        "\n" + TABLE.replace("2,2\n", "\n2,2\n\n") + "\n\n",
        '"helpfulness","harmlessness"\n"1","3"\n2, "2"\n3e0,+1.0\n',
    ],
    ids=["crlf", "bom", "spaces", "no last newline", "blank lines", "quotes and forms of numbers"],
)
def test_harmless_variants_read_the_same(tmp_path: Path, text: str) -> None:
    names, points = read_points(write(tmp_path, text))
    assert names == ["helpfulness", "harmlessness"]
    assert points.tolist() == [[1, 3], [2, 2], [3, 1]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\nnan,1\n", [":3: row 2, column a", "nan"]),
        ("a,b\n1,inf\n", [":2: row 1, column b", "inf", "infinity"]),
        ("a,b\n1,-Infinity\n", [":2: row 1, column b"]),
        ("a,b\n1,1e999\n", [":2: row 1, column b", "1e999"]),
        ("a,b\n\n1,two\n", [":3: row 1, column b", "'two'"]),
        ("a,b\n1,1_000\n", [":2: row 1, column b", "'1_000'"]),
        ("a,b\n1,\n", [":2: row 1, column b", "empty cell"]),
        ("a,b\n1,2\n3\n", [":3: row 2", "1 value;", "needed: 2", "a, b"]),
        ("a,b\n1,2,3\n", [":2: row 1", "3 values", "needed: 2"]),
        ("a,b\n", ["no rows", "a, b"]),
        ("", ["empty file", "header"]),
        ("\n\n", ["empty file"]),
        ("1,2\n3,4\n", [":1: header", "only numbers", "name the objectives"]),
        ("a,a\n1,2\n", [":1: header", "a more than once"]),
        ("a,\n1,2\n", [":1: header", "column 2 has no name"]),
        ('a,"b\nc"\n1,2\n', [":2: header", "'b\\nc'", "line breaks"]),
        (b"\0\x0b\0", [":1: header", "control characters"]),
        ("a;b\n1;2\n", [":1: header", "commas"]),
        ('a,b\n"1,2\n', ["broken CSV"]),
        (b"a,b\n\xff\xfe,1\n", ["not UTF-8"]),
    ],
)
def test_a_faulty_table_names_file_and_row(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RequestError) as caught:
        calculate(path, [0, 0])
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_all_faulty_rows_are_reported_at_once_but_not_a_thousand(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        read_points(write(tmp_path, "a,b\nx,nan\n1,2\n3\n"))
    assert [problem.rsplit("points.csv:")[1].split(":")[0] for problem in caught.value.problems] == ["2", "2", "4"]
    with pytest.raises(RequestError, match="990 more problems") as caught:
        read_points(write(tmp_path, "a\n" + "x\n" * 1000))
    assert len(caught.value.problems) == 11


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nowhere.csv: no such file"):
        read_points(tmp_path / "nowhere.csv")
    with pytest.raises(RequestError, match="cannot be read"):
        read_points(tmp_path)


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(st.integers(1, 4).flatmap(lambda m: st.lists(st.lists(finite, min_size=m, max_size=m), min_size=1, max_size=6)))
def test_what_the_csv_module_writes_is_read_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]]
) -> None:
    names = [f"objective {i}, raw" for i in range(len(rows[0]))]
    text = io.StringIO()
    csv.writer(text).writerows([names, *rows])
    found, points = read_points(write(tmp_path_factory.mktemp("table"), text.getvalue()))
    assert found == names
    assert points.tolist() == rows


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60) | st.text(alphabet='ab1.,;\n\r"-en \t_\0', max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused_with_the_file_named(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = write(tmp_path_factory.mktemp("table"), content)
    refused = ""
    try:
        names, points = read_points(path)
    except RequestError as error:
        refused = str(error)
    if refused:
        assert all(str(path) in problem for problem in refused.splitlines())
    else:
        assert points.shape[1] == len(names)
        assert np.isfinite(points).all()


def test_the_calculator_is_the_hypervolume(tmp_path: Path) -> None:
    points = np.random.default_rng(0).random((20, 3))
    path = write(tmp_path, "a,b,c\n" + "\n".join(",".join(map(repr, row)) for row in points.tolist()))
    assert calculate(path, [0.1, 0.2, 0.3])["hypervolume"] == hypervolume(points, [0.1, 0.2, 0.3])


def test_importing_the_calculator_stays_light() -> None:
    heavy = ["torch", "transformers", "pandas", "datasets", "scipy", "matplotlib", "pyarrow", "pymoo"]
    code = (
        f"import sys, moalign.pareto.points; print([n for n in {heavy} if n in sys.modules], 'moocore' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
    assert done.stdout.strip() == "[] True"
