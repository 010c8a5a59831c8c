"""Pairs for reward models: groups by column or by file, splits by prompt, content hash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moalign.config.card import SourceSpec, SplitSpec
from moalign.core.errors import RequestError
from moalign.reward_models import pairs
from moalign.reward_models.pairs import PairSet


def write(path: Path, *rows: dict[str, str]) -> SourceSpec:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceSpec(path=str(path))


def row(prompt: str, **more: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": f"{prompt} good", "rejected": f"{prompt} bad", **more}


def test_a_file_is_a_data_set_named_by_the_user_or_by_itself(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.jsonl", row("a"), row("b"))
    sets = pairs.read([(None, mine), ("other", write(tmp_path / "x.jsonl", row("c")))])
    assert [(pair_set.name, len(pair_set)) for pair_set in sets] == [("mine", 2), ("other", 1)]
    assert sets[0].chosen == ["a good", "b good"]
    assert sets[0].chance == []


def test_a_column_group_says_who_labelled(tmp_path: Path) -> None:
    mixed = write(tmp_path / "m.jsonl", row("a", group="ann"), row("b", group="bob"), row("c", group="ann"))
    sets = pairs.read([("ignored", mixed)])
    assert [(pair_set.name, pair_set.prompts) for pair_set in sets] == [("ann", ["a", "c"]), ("bob", ["b"])]


def test_dialogues_are_taken_apart(tmp_path: Path) -> None:
    start = "\n\nHuman: hi\n\nAssistant:"
    source = write(tmp_path / "d.jsonl", {"chosen": f"{start} yes 🙂", "rejected": f"{start}"})
    (pair_set,) = pairs.read([(None, source)])
    assert (pair_set.prompts, pair_set.chosen, pair_set.rejected) == ([start], [" yes 🙂"], [""])


def test_equal_texts_are_refused_with_their_line(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", row("a"), {"prompt": "b", "chosen": "same", "rejected": "same"})
    with pytest.raises(RequestError, match=r"d\.jsonl:2: chosen and rejected are the same text"):
        pairs.read([(None, source)])


def test_a_prompt_is_in_one_split_whatever_its_pair() -> None:
    pair_set = PairSet("x")
    for number in range(60):
        for reply in range(3):
            pair_set.add(f"prompt {number}", f"c{reply}", f"r{reply}", chance=0.5)
    parts = pair_set.split(SplitSpec(train=0.5, calibration=0.2, eval=0.3))
    assert sum(map(len, parts.values())) == 180
    homes = [set(part.prompts) for part in parts.values()]
    assert not homes[0] & homes[1] and not homes[0] & homes[2] and not homes[1] & homes[2]
    assert all(len(part.chance) == len(part) for part in parts.values())
    again = pair_set.pick(range(179, -1, -1)).split(SplitSpec(train=0.5, calibration=0.2, eval=0.3))
    assert {name: set(part.prompts) for name, part in again.items()} == {n: set(p.prompts) for n, p in parts.items()}


def test_the_hash_sees_every_text_and_where_it_stands() -> None:
    def hashed(*texts: str, name: str = "x") -> str:
        pair_set = PairSet(name)
        pair_set.add(*texts)
        return pairs.content_hash([pair_set])

    first = hashed("p", "c", "r")
    assert first == hashed("p", "c", "r")
    assert len({first, hashed("p", "r", "c"), hashed("pc", "", "r"), hashed("p", "c", "r", name="y")}) == 4


def test_no_pairs_at_all(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(RequestError, match="no records in it"):
        pairs.read([(None, SourceSpec(path=str(tmp_path / "e.csv")))])
    with pytest.raises(RequestError, match="hold no pairs"):
        pairs.read([])


def test_two_files_of_one_name_need_names(tmp_path: Path) -> None:
    for folder in ("helpful", "harmless"):
        (tmp_path / folder).mkdir()
    sources = [write(tmp_path / folder / "train.jsonl", row("a")) for folder in ("helpful", "harmless")]
    with pytest.raises(RequestError, match="would both be named train; give names: NAME=FILE"):
        pairs.read([(None, source) for source in sources])
    assert [one.name for one in pairs.read([("safe", sources[1]), (None, sources[0])])] == ["safe", "train"]
    assert [len(one) for one in pairs.read([("all", source) for source in sources])] == [2]
    versions = [write(tmp_path / f"hh.v{number}.jsonl", row("a")) for number in (1, 2)]
    assert [one.name for one in pairs.read([(None, source) for source in versions])] == ["hh.v1", "hh.v2"]
