"""`ssm-lm plot`: the curves that a picture holds are the numbers of the log."""

import json
import sys
import xml.etree.ElementTree

import pytest

from ssm_lm.cli import main
from ssm_lm.runs import curves
from ssm_lm.runs.curves import MOST_POINTS, draw_contexts, draw_series, names, read_contexts


def log(folder, steps, **scales):
    folder.mkdir()
    entries = [{"step": step, "time": 0.0} | {key: scale * step for key, scale in scales.items()} for step in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.fixture
def axes():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    return figure.subplots()


@pytest.fixture
def drawn(monkeypatch):
    """{title of a panel: {name of a run: (steps, values)}}, as they are drawn."""
    found = {}

    def note(axes, title, series):
        found[title] = series
        draw_series(axes, title, series)

    monkeypatch.setattr(curves, "draw_series", note)
    return found


def test_several_runs_in_one_picture(tmp_path, drawn, capsys):
    log(tmp_path / "one", [1, 2, 3], loss=2.0, learning_rate=0.1, tokens_per_second=7.0)
    log(tmp_path / "two", [2, 4], loss=1.0, grad_norm=3.0)
    picture = tmp_path / "both.svg"
    assert main(["plot", str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(picture)]) == 0
    assert set(drawn) == {"training loss", "learning rate", "gradient norm", "tokens a second"}
    assert drawn["training loss"] == {"one": ([1, 2, 3], [2.0, 4.0, 6.0]), "two": ([2, 4], [2.0, 4.0])}
    assert drawn["gradient norm"] == {"one": ([], []), "two": ([2, 4], [6.0, 12.0])}
    text = picture.read_text()
    xml.etree.ElementTree.fromstring(text)
    assert all(f">{word}<" in text for word in (*drawn, "one", "two"))
    assert f"{picture}: done" in capsys.readouterr().out


def test_one_run_is_drawn_into_its_folder_as_a_png(tmp_path):
    log(tmp_path / "run", [1, 2], loss=2.0)
    assert main(["plot", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_long_log_is_thinned_out(axes):
    steps = list(range(25_000))
    draw_series(axes, "training loss", {"run": (steps, steps)})
    (line,) = axes.get_lines()
    assert MOST_POINTS / 2 < len(line.get_xdata()) <= MOST_POINTS
    assert list(line.get_xdata()) == list(line.get_ydata())


def test_perplexity_against_context(tmp_path, axes):
    def results(split, **found):
        rows = [{"context": None if key == "full" else int(key[1:]), "token_perplexity": v} for key, v in found.items()]
        return json.dumps({"split": split, "contexts": rows})

    (tmp_path / "a.json").write_text(results("validation", full=5.0, n64=7.0))
    (tmp_path / "b.json").write_text(results("validation", n8=9.0))
    (tmp_path / "c.json").write_text(results("test", n8=99.0))
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "bad.json").write_text("{")
    found = read_contexts(tmp_path)
    assert found == [(8, 9.0), (64, 7.0), (None, 5.0)]
    draw_contexts(axes, {"run": found, "none": []})
    windows, carried, empty = axes.get_lines()
    assert len(empty.get_xdata()) == 0
    assert (list(windows.get_xdata()), list(windows.get_ydata())) == ([8, 64], [9.0, 7.0])
    assert set(carried.get_ydata()) == {5.0}


def test_names(tmp_path):
    assert names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert names([tmp_path / "x/a", tmp_path / "y/a"]) == [str(tmp_path / "x/a"), str(tmp_path / "y/a")]


def test_what_cannot_be_drawn_is_one_line(tmp_path, capsys):
    log(tmp_path / "run", [1], loss=1.0)
    (tmp_path / "empty").mkdir()
    run = str(tmp_path / "run")
    for words, expected in (
        ([run, "--output", "curves.pdf"], "ends in .png or .svg"),
        ([run, str(tmp_path / "empty")], "metrics.jsonl: holds no entries"),
        ([str(tmp_path / "nowhere")], "metrics.jsonl: holds no entries"),
        ([run, run], "is given twice"),
        ([run, "--output", str(tmp_path / "no/where.svg")], "cannot be written"),
    ):
        assert main(["plot", *words]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1


def test_without_matplotlib_the_way_out_is_named(tmp_path, monkeypatch, capsys):
    log(tmp_path / "run", [1], loss=1.0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", str(tmp_path / "run")]) == 2
    assert "pip install 'ssm_lm[plot]'" in capsys.readouterr().err
