"""The report: self-contained HTML with the run's numbers, pictures and tables in it, well formed and described."""

import html.parser
import json
import re

import numpy as np
import pytest

from vjepa import charts
from vjepa.report import Figure, Table, read_metrics, write_report

VOID = {"meta", "img", "link", "br", "line", "circle"}


class Document(html.parser.HTMLParser):
    """Collects tags and attributes, and checks that elements close in the order they opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def run_dir(tmp_path):
    lines = [
        {
            "step": step,
            "loss": 0.8 - step / 1000,
            "target_std": 0.6,
            "grad_norm_encoder": 1.5,
            "grad_norm_predictor": 0.5,
            "data_wait_s": 0.4,
            "compute_s": 2.0,
            "my_monitor": float(step),
            "bad_files": 1,
        }
        for step in range(10, 110, 10)
    ]
    lines.insert(5, {"step": 50, "event": "collapse", "value": 7.0, "message": "Collapse: target_std fell <far>."})
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text('{"train": {"lr": 0.000625}}')
    (folder / "bad_files.jsonl").write_text('{"path": "a.mp4"}\n{"path": "b.mp4"}\n')
    return folder


@pytest.fixture
def document(run_dir, tmp_path):
    picture = np.zeros((4, 6, 3), dtype=np.uint8)
    path = write_report(
        tmp_path / "out" / "report.html",
        run_dir,
        [Figure("Masks over frames", picture, "Clear: context.", alt="rows of masked frames")],
        [
            Table(
                "Probe",
                ["features", "accuracy", "spread"],
                [["pretrained", 71.25, "± 1.5"], ["random", 40.0, "± 2"]],
                best=0,
            )
        ],
        summary="A <small> run",
        highlights={"chance": "12.5 %"},
        facts={"Duration": "7:31"},
    )
    text = path.read_text(encoding="utf-8")
    return text, Document(text)


def test_nothing_is_loaded_from_anywhere(document):
    text, parsed = document
    assert "http://" not in text and "https://" not in text
    assert not re.search(r"@import|url\(", text)
    assert not parsed.all("script") and not parsed.all("link") and not parsed.all("iframe")
    sources = [attributes["src"] for attributes in parsed.all("img")]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)


def test_it_is_well_formed_and_described(document):
    _, parsed = document
    assert parsed.open == []
    assert [attributes["lang"] for attributes in parsed.all("html")] == ["en"]
    assert len(parsed.all("h1")) == 1 and len(parsed.all("h2")) >= 4
    assert [attributes["alt"] for attributes in parsed.all("img")] == ["rows of masked frames"]
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in parsed.all("svg"))
    assert {attributes["name"] for attributes in parsed.all("meta") if "name" in attributes} == {"viewport"}


def test_the_numbers_are_in_it(document):
    text, parsed = document
    for expected in (
        "pretrained",
        "71.25",
        "± 1.5",
        "12.5 %",
        "7:31",
        "0.000625",
        "A <small> run",
        "Masks over frames",
    ):
        assert expected in parsed.text
    assert "Collapse: target_std fell <far>." in parsed.text
    labels = {
        attributes["aria-label"].partition(" over")[0]: attributes["aria-label"] for attributes in parsed.all("svg")
    }
    assert "loss: first 0.79, last 0.7, min 0.7, max 0.79" in labels["Loss"]
    assert "encoder: first 1.5" in labels["Gradient norm"] and "predictor: first 0.5" in labels["Gradient norm"]
    assert "computing: first 0.2" in labels["Time of a step"], "sums over 10 steps are shown per step"
    assert "last 100" in labels["My monitor"], "a number the report does not know still gets a chart"
    assert "Value" not in labels, "numbers of an alarm are no curve"
    assert re.search(r"Bad files skipped</dt><dd>2<", text)


def test_light_and_dark_and_narrow(document):
    text, _ = document
    assert text.count("prefers-color-scheme: dark") >= 2
    assert "max-width: 560px" in text and "overflow-x: auto" in text


def test_an_interrupted_line_is_left_out_and_a_broken_one_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="expected JSON on line 2, got 'nonsense'"):
        read_metrics(path)


def test_a_run_without_metrics_still_reports(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    text = write_report(tmp_path / "report.html", tmp_path).read_text(encoding="utf-8")
    assert "<svg" not in text and "The run" in text


def test_wrong_parts_are_named(run_dir, tmp_path):
    with pytest.raises(ValueError, match=r"table 'T': expected rows of 2 cells, got 1: \['x'\]"):
        write_report(tmp_path / "r.html", run_dir, tables=[Table("T", ["a", "b"], [["x"]])])
    with pytest.raises(ValueError, match="figure 'F': expected PNG bytes"):
        write_report(tmp_path / "r.html", run_dir, figures=[Figure("F", b"GIF89a")])
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "r.html", tmp_path / "nowhere")


def svg_points(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, pair.split(","))) for pair in points.split()]
        for points in re.findall(r'<polyline[^>]*points="([^"]*)"', svg)
    ]


def chart(*series: charts.Series) -> str:
    return charts.line_chart(series, x_label="step", y_label="loss (nats)", description="d")


def test_chart_places_points_in_proportion_and_up_is_more():
    (points,) = svg_points(chart(charts.Series("a", [0, 50, 100], [0.0, 5.0, 10.0])))
    (x0, y0), (x1, y1), (x2, y2) = points
    assert (x0, y0) == (charts.LEFT, charts.HEIGHT - charts.BOTTOM)
    assert (x2, y2) == (charts.WIDTH - charts.RIGHT, charts.TOP)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)


def test_chart_breaks_a_line_at_nan_and_marks_a_lone_point():
    svg = chart(charts.Series("a", [0, 1, 2, 3, 4], [1.0, 2.0, float("nan"), 1.0, 2.0]), charts.Series("b", [2], [1.5]))
    assert [len(points) for points in svg_points(svg)] == [2, 2]
    assert svg.count("<circle") == 1
    assert "step" in svg and "loss (nats)" in svg


def test_chart_bins_long_series_and_keeps_their_extremes():
    y = [1.0] * 5000
    y[2500] = 9.0
    svg = chart(charts.Series("a", list(range(5000)), y))
    (points,) = svg_points(svg)
    assert len(points) <= charts.MAX_POINTS
    band = re.search(r'<polygon[^>]*points="([^"]*)"', svg)
    assert band and min(float(pair.split(",")[1]) for pair in band[1].split()) < min(y for _, y in points)


def test_chart_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one finite point"):
        chart(charts.Series("a", [1], [float("inf")]))
    with pytest.raises(ValueError, match="as many x as y, got 2 and 1"):
        chart(charts.Series("a", [1, 2], [0.0]))


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 90_000, ["0", "20k", "40k", "60k", "80k", "100k"]),
        (0.31, 0.79, ["0.3", "0.4", "0.5", "0.6", "0.7", "0.8"]),
        (0, 6.25e-4, ["0", "2e-4", "4e-4", "6e-4", "8e-4"]),
        (0.998, 1.0, ["0.9980", "0.9985", "0.9990", "0.9995", "1.0000"]),
        (-3, 3, ["-4", "-2", "0", "2", "4"]),
        (5, 5, ["4.4", "4.6", "4.8", "5.0", "5.2", "5.4", "5.6"]),
    ],
)
def test_ticks_are_round_and_told_apart(low, high, labels):
    values = charts.ticks(low, high, 5)
    assert values[0] <= low and values[-1] >= high
    assert charts.tick_labels(values) == labels
