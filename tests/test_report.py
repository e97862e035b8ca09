"""The report and the model card: self-contained, complete, and honest in its words."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from duramen.export.card import write_card
from duramen.report.charts import range_chart
from duramen.report.page import latency_charts, measured_rows, verdict, write_report


def figure(value, low, high):
    return {"value": value, "low": low, "high": high, "samples": 8}


def layer(block, role, error):
    return {"layer": f"m.{block}.{role}", "role": role, "block": block, "removed": 50, "size": 100, "relative_error": error}


@pytest.fixture
def results():
    task = {"acc": figure(0.6, 0.5, 0.7), "acc_norm": figure(0.6, 0.5, 0.7)}
    spread = {"median": 1.0, "low": 0.9, "high": 1.1}
    speed = {"prefill_seconds": spread, "decode_tokens_per_second": spread}
    return {
        "schema": "duramen-results/1", "command": "duramen run r.yaml m <out>", "recipe": "r", "model": "m & m", "peak_memory_bytes": 2**30,
        "machine": {"processor": "P", "threads": 2, "capability": "C", "accelerator": "none"}, "versions": {"torch": "2"},
        "calibration": {"text": ["squad"], "tokens": 1000},
        "steps": [{
            "id": "multiweight", "method": "multiweight", "settings": {"id": "multiweight", "method": "multiweight", "sparsity": 0.5},
            "reopened": {"how": "plain transformers, whole", "largest_difference": 0.0, "largest_logit": 20.0},
            "layers": [layer(0, "q", 0.01), layer(0, "up", 0.2), layer(1, "q", 0.0)], "skipped": ["m.1.up"], "copied_unchanged": ["m.embed"],
        }],
        "evaluations": [{
            "perplexity": {"boolq": {
                "length": 64, "stride": 64, "windows": 8, "before": figure(20, 19, 21), "after": figure(25, 24, 26),
                "ratio": figure(1.25, 1.2, 1.3), "kl": figure(0.3, 0.2, 0.4), "agreement": figure(0.7, 0.6, 0.8),
            }},
            "tasks": {"piqa": {"documents": 100, "before": task, "after": task, "difference": figure(-0.01, -0.05, 0.03)}},
            "generations": {"<prompt>": {"before": "a < b", "after": "b & c"}},
            "latency": {"before": speed, "after": speed},
            "bytes_on_disk": {"before": 2**20, "after": 2**20}, "bytes_in_memory": {},
        }],
    }  # fmt: skip


def test_the_page_is_self_contained_and_escaped(results, tmp_path):
    page = write_report(tmp_path, results).read_text()
    assert "<script" not in page
    assert not re.search(r"(src|href)=|url\(|@import", page), "nothing may be fetched"
    for escaped in ("m &amp; m", "&lt;prompt&gt;", "a &lt; b", "r.yaml m &lt;out&gt;"):
        assert escaped in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert "Left alone on request: m.1.up" in page
    body = page[page.index("<h1>") : page.rindex("</body>")]
    ElementTree.fromstring(f"<body>{body}</body>")


def test_the_verdict_carries_its_interval(results):
    assert verdict(results) == (
        "50.0% of the 0.0 million weights in 3 layers are gone; "
        "perplexity on boolq went from 20.00 to 25.00 (×1.25, 95 % interval 1.20 to 1.30)."
    )
    assert verdict({"steps": [], "evaluations": []}) == "Nothing was changed or measured."


def test_a_difference_inside_its_interval_is_no_change(results):
    rows = {row["what"]: row for row in measured_rows(results["evaluations"][0])}
    assert rows["Accuracy, piqa"]["change"] == "no measurable change"
    results["evaluations"][0]["tasks"]["piqa"]["difference"] = figure(-0.1, -0.15, -0.05)
    rows = {row["what"]: row for row in measured_rows(results["evaluations"][0])}
    assert rows["Accuracy, piqa"]["change"] == "-0.100 (-0.150 to -0.050)"
    assert rows["Perplexity, boolq"]["basis"] == "8 windows of 64 tokens, stride 64"


def test_overlapping_speeds_are_no_change(results):
    latency = results["evaluations"][0]["latency"]
    assert {chart["word"] for chart in latency_charts(latency)} == {"The ranges overlap: no measurable change."}
    latency["after"] = {key: {"median": 2.0, "low": 1.9, "high": 2.1} for key in latency["before"]}
    assert latency_charts(latency)[0]["word"] == "The medians differ by a factor of 2.00."


def test_bars_are_in_proportion():
    chart = ElementTree.fromstring(
        range_chart({"before": {"median": 1.0, "low": 1, "high": 1}, "after": {"median": 2.0, "low": 2, "high": 2}})
    )
    widths = [float(rect.get("width")) for rect in chart.iter("rect")]
    assert widths[1] == pytest.approx(2 * widths[0])


def test_the_card_names_its_source_and_its_limits(results, tmp_path):
    card = write_card(tmp_path, results).read_text()
    assert card.startswith("---\nlibrary_name: transformers\nbase_model: m & m\n")
    assert "100 of 300" not in card
    assert "150 of 300 weights removed in 3 layers" in card
    assert "the file is not smaller" in card
