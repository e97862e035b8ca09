"""Many runs on one page: sweeps, the front, and the page that a browser of this machine sees."""

import http.client
import json
import math
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import duramen
from duramen.problem import Problem
from duramen.report.overview import Line, _size, find_runs, front, overview, summarise
from duramen.report.serve import serve
from duramen.sweeps import DRAWN, Grid, Study, axes
from test_story import write_recipe

OVER = ["magnitude.sparsity=[0.3, 0.6]", "calibration.length=[32, 100000]"]


@pytest.fixture(scope="module")
def swept(llama, texts, tmp_path_factory):
    place = tmp_path_factory.mktemp("swept")
    measured = {"method": "evaluate", "text": [str(texts[1])], "length": 32, "windows": 4, "latency": False, "new_tokens": 4}
    steps = [{"method": "magnitude", "sparsity": 0.5}, measured]
    recipe = write_recipe(place / "recipe.yaml", texts, steps=steps, evaluate=False)
    lines = duramen.sweep(recipe, str(llama), place / "out", over=OVER)
    return place, recipe, lines


def test_every_combination_runs_and_one_that_cannot_is_told(swept):
    place, _, lines = swept
    assert [line.name for line in lines] == [
        f"sparsity={sparsity}, length={length}" for sparsity in (0.3, 0.6) for length in (32, 100000)
    ]
    assert [bool(line.wrong) for line in lines] == [False, True, False, True]
    assert [line.size for line in lines if not line.wrong] == pytest.approx([0.7, 0.4], abs=0.01)
    page = (place / "out" / "index.html").read_text()
    assert page.count("<tr tabindex") == 4
    assert "4 of 4 combinations" in page
    assert "<svg" in page


def test_what_is_cut_is_counted_once():
    cut = {"shape": {"parameters": {"before": 100, "after": 80}}, "layers": [{"layer": "a", "size": 50, "removed": 10}]}
    rounded = {"layers": [{"layer": "a", "size": 40, "removed": 0, "bits": 4.0}]}
    assert _size([cut]) == pytest.approx(0.8)
    assert _size([cut, rounded]) == pytest.approx(0.8 / 4)
    assert math.isnan(_size([{"layers": []}]))


def test_the_same_line_again_goes_on(swept, llama):
    place, recipe, lines = swept
    kept = {file: file.stat().st_mtime_ns for file in place.rglob("results.json")}
    assert [line.name for line in duramen.sweep(recipe, str(llama), place / "out", over=OVER)] == [line.name for line in lines]
    assert kept == {file: file.stat().st_mtime_ns for file in place.rglob("results.json")}
    with pytest.raises(Problem, match="holds another run"):
        duramen.sweep(recipe, str(llama), place / "out", over=OVER[:1])


@pytest.mark.parametrize(
    ("over", "words"),
    [
        (["magnitude.sparsity=0.5"], "has no values"),
        (["magnitude.sparsity"], "has no values"),
        (["magnitude.sparsity=[]"], "has no values"),
        (["magnitude.sparsity=[0.1"], "is no value"),
        ([], "Nothing is varied"),
        ([f"a.b={list(range(15))}"] * 2, "225 combinations are too many"),
    ],
)
def test_sweeps_that_cannot_be(over, words):
    with pytest.raises(Problem, match=words):
        Grid(axes(over))


def test_a_combination_that_is_no_recipe_is_refused_before_any_runs(llama, texts, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", texts, steps=[{"method": "magnitude", "sparsity": 0.5}], evaluate=False)
    with pytest.raises(Problem, match="sparsity"):
        duramen.sweep(recipe, str(llama), tmp_path / "out", over=["magnitude.sparsity=[0.5, 1.5]"])
    assert not (tmp_path / "out").exists()


def test_values_are_those_that_are_written():
    values = ["a.b=2:4", "a.b=null", "a.b=true", "a.b=[1, 2]"]
    assert axes(["a.b=[2:4, null, true, [1, 2]]"]) == [values]
    assert list(Grid([values, ["c.d=1"]])) == [[value, "c.d=1"] for value in values]


def told(value):
    """A run whose size falls along the first axis, and whose loss is least at a place of the second."""
    first, second = (int(each.partition("=")[2]) for each in value)
    return Line("", "", size=1 - first / 20, quality=1 + first / 20 + abs(second - 13))


def test_a_study_comes_nearer_to_the_front_than_chance():
    varied = axes([f"a.b={list(range(20))}", f"c.d={list(range(20))}"])
    study, seen = Study(varied, 40), []
    for each in study:
        seen.append(told(each))
        study.tell(each, seen[-1])
    assert len(seen) == len(study.told) == 40
    near = [line.quality - 1 - (1 - line.size) < 1.5 for line in seen]
    assert sum(near[DRAWN:]) >= 2 * 32 * 3 / 20  # three of twenty places are as near


def test_a_study_asks_the_same_again_and_goes_on_where_runs_fail():
    varied = axes(["a.b=[0, 1, 2]", "c.d=[0, 1, 2]"])
    asked = []
    for _ in range(2):
        study = Study(varied, 6)
        asked.append([])
        for each in study:
            asked[-1].append(each)
            study.tell(each, Line("", "", wrong="no") if each[0] == "a.b=1" else told(each))
    assert asked[0] == asked[1]
    assert len({tuple(each) for each in asked[0]}) == 6


def test_a_study_runs_so_many_and_without_optuna_none(swept, llama, monkeypatch):
    place, recipe, _ = swept
    over = ["magnitude.sparsity=[0.2, 0.4, 0.6]", "calibration.length=[16, 32]"]
    lines = duramen.sweep(recipe, str(llama), place / "study", over=over, trials=2)
    assert len(lines) == 2
    assert (
        "2 of 2 combinations of magnitude.sparsity, calibration.length, chosen from 6 by a study"
        in (place / "study" / "index.html").read_text()
    )
    again = duramen.sweep(recipe, str(llama), place / "study", over=over, trials=3)
    assert again[:2] == lines
    assert len(again) == 3
    monkeypatch.setattr("duramen.problem.find_spec", lambda name: None)
    with pytest.raises(Problem, match="optuna"):
        duramen.sweep(recipe, str(llama), place / "none", over=over, trials=2)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_nothing_beats_the_front(points):
    lines = [Line(str(number), "", size=size, quality=quality) for number, (size, quality) in enumerate(points)]
    found = {(line.size, line.quality) for line in front(lines)}
    beaten = {one for one in points if any(two != one and two[0] <= one[0] and two[1] <= one[1] for two in points)}
    assert found == set(points) - beaten


@pytest.fixture
def looked(swept):
    place, _, _ = swept
    broken = place / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "results.json").write_text("{")
    (place / "secret.txt").write_text("secret")
    server = serve(place / "out", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def look(path, **headers):
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace"), dict(answer.getheaders())

    yield look
    server.shutdown()
    server.server_close()


def test_the_page_lists_what_is_there(looked, swept):
    status, page, headers = looked("/")
    assert status == 200
    assert page.count("<tr tabindex") == 2
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    name = next(iter((swept[0] / "out" / "points").glob("*0.3*32*"))).name
    status, report, _ = looked(f"/points/{name}/report.html")
    assert status == 200
    assert "Before and after" in report


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "//etc/passwd",
        "/.duramen/fingerprint.json",
        "/nothing.html",
        "/points",
    ],
)
def test_nothing_else_is_given_out(path, looked):
    status, text, _ = looked(path)
    assert status == 404
    assert "secret" not in text


def test_weights_are_not_given_out(looked, swept):
    file = next((swept[0] / "out" / "points").rglob("*.safetensors"))
    assert looked("/" + file.relative_to(swept[0] / "out").as_posix())[0] == 404


def test_a_page_elsewhere_cannot_look(looked):
    assert looked("/", Host="evil.example:80")[0] == 403


def test_a_link_that_leads_out_is_not_followed(looked, swept):
    link = swept[0] / "out" / "link.json"
    link.symlink_to("/etc/hostname")
    try:
        assert looked("/link.json")[0] == 404
    finally:
        link.unlink()


def test_a_damaged_run_is_listed_with_what_is_wrong(swept):
    place = swept[0]
    (place / "broken").mkdir(exist_ok=True)
    (place / "broken" / "results.json").write_text("[1]")
    assert place / "broken" in find_runs(place)
    assert "an object was expected" in summarise(place / "broken", "broken").wrong


def test_a_folder_that_is_not_there():
    with pytest.raises(Problem, match="There is no folder"):
        serve(Path("/nowhere/at/all"), 0)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_the_filter_sorting_and_keys_work_in_a_browser(tmp_path):
    lines = [
        Line(name, name, "m", "rtn", size, 1, quality, math.nan, "t")
        for name, size, quality in (("one", 0.5, 9.0), ("two", 0.25, 11.0), ("odd", 0.75, 8.0))
    ]
    script = """<script>
    const said = [], seen = () => rows.filter(row => !row.hidden).map(row => row.cells[0].textContent.trim().split(" ")[0]).join(",");
    field.value = "o"; field.dispatchEvent(new Event("input")); said.push(seen());
    field.value = "tw"; field.dispatchEvent(new Event("input")); said.push(seen());
    field.value = ""; field.dispatchEvent(new Event("input")); document.querySelector("[data-column='3']").click(); said.push(seen());
    document.querySelector("[data-column='3']").click(); said.push(seen());
    for (const key of ["j", "j", "k"]) document.dispatchEvent(new KeyboardEvent("keydown", {key}));
    said.push(document.activeElement.cells[0].textContent.trim().split(" ")[0]);
    document.title = JSON.stringify(said);
    </script>"""
    (tmp_path / "page.html").write_text(overview("runs", lines).replace("</body>", f"{script}</body>"))
    line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{tmp_path / 'page.html'}"]
    page = subprocess.run(line, capture_output=True, text=True, check=True, timeout=100).stdout
    said = json.loads(page.split("<title>")[1].split("</title>")[0])
    assert said == ["one,two,odd", "two", "two,one,odd", "odd,one,two", "odd"]
