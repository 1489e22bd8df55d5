"""The report: every figure on one page that needs no network, whatever the run holds."""

import copy
import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer import report
from gossamer.core.errors import ArgumentError
from gossamer.pack import Archive, pack_bytes
from gossamer.report import plots, tables, words
from gossamer.report.sections import byte_rows

VOID = {"meta", "link", "wbr", "br"}


class Page(HTMLParser):
    """Checks that tags balance; collects attributes and the text that people see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"
        self.text = " ".join("".join(self.pieces).replace("\xa0", " ").split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> is out of place"

    def handle_data(self, data):
        if "style" not in self.open:
            self.pieces.append(data)


def accuracy(correct: int, total: int) -> dict:
    low, high = words.interval({"accuracy": correct / total, "total": total})
    return {
        "correct": correct,
        "total": total,
        "accuracy": correct / total,
        "score": correct / total,
        "low": low,
        "high": high,
        "loss": 0.0612,
    }


def minimal() -> dict:
    return {
        "name": "bare",
        "model": "mlp",
        "dataset": "digits",
        "bytes": {"dense": 40_000, "file": 1_600, "ratio": 25.0},
        "evaluation": {"before": accuracy(970, 1000), "after": accuracy(968, 1000)},
    }


@pytest.fixture(scope="module")
def full_run() -> dict:
    """A run of a packed two-layer network, as JSON gives it back."""
    generator = torch.Generator().manual_seed(0)
    book = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, -0.25, 0.125, 0.5])
    state = {
        "ip1.weight": book[torch.randint(8, (20, 64), generator=generator)],
        "ip1.bias": torch.randn(20, generator=generator),
        "ip2.weight": book[torch.randint(8, (10, 20), generator=generator)],
        "ip2.bias": torch.randn(10, generator=generator),
    }
    with Archive(pack_bytes(state, profile="huffman")) as archive:
        layers = tables.layer_rows(archive.rows(), archive.tensors())
        size, parts = archive.file_bytes, archive.parts()
    scan = [[1.0, 0.97], [0.3, 0.95], [0.1, 0.8], [0.03, 0.4]]
    run = {
        **minimal(),
        "command": "gossamer compress mlp --data https://example.org/digits <here>",
        "versions": {"gossamer": "0.1.0", "torch": "2.13.0"},
        "hardware": {"cpu": "A CPU & more", "cores": 2, "gpu": None},
        "created": "2030-01-02T03:04:05Z",
        "seed": 0,
        "recipe": "name: bare\nstages:\n- pack\n",
        "bytes": {
            "dense": 6000,
            "file": size,
            "ratio": 6000 / size,
            "parts": parts,
            "reloaded": {
                "fresh_process": True,
                "identical": True,
                "evaluated_in": "a fresh process",
            },
        },
        "layers": layers,
        "stages": [
            {"stage": "1-train", "score": 0.981, "density": 1.0, "bytes": None, "seconds": 12.5},
            {"stage": "2-pack", "score": 0.9805, "density": 0.4, "bytes": size, "seconds": 150},
        ],
        "latency": {
            "same_operations": False,
            "dense_ms": 0.043,
            "compressed_ms": 0.044,
            "ratio": 0.043 / 0.044,
            "interval": [0.9, 1.1],
            "engine": "torch eager",
            "batch": 1,
            "threads": 1,
            "pairs": 200,
            "rows": [
                {
                    "engine": engine,
                    "batch": 1,
                    "threads": 1,
                    "before_ms": 0.043,
                    "after_ms": 0.022,
                    "ratio": 1.95,
                    "interval": [1.9, 2.0],
                }
                for engine in ("torch eager", "onnxruntime")
            ],
            "note": "It decodes to dense tensors.",
        },
        "macs": {
            "before": {"macs": 1000, "nonzero": 1000, "live": 1000},
            "after": {"macs": 900.5, "nonzero": 300, "live": 600},
        },
        "sensitivity": {"ip1.weight": scan, "ip2.weight": scan[:2]},
        "curves": [
            {
                "stage": f"{1 + i // 6}-train",
                "epoch": 1 + i % 6,
                "train_loss": 2.0 / (i + 1),
                "score": 1 - 0.5 / (i + 1),
            }
            for i in range(12)
        ],
        "mask_image": tables.first_layer_image(state, (1, 8, 8)),
    }
    return json.loads(json.dumps(run))


def test_a_full_page_holds_every_section_and_figure(full_run, tmp_path):
    path = report.write(full_run, tmp_path / "new" / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert list(path.parent.iterdir()) == [path]
    assert len(text.encode()) < 500_000
    size = full_run["bytes"]["file"]
    titles = (
        "Accuracy before and after", "The file, read back", "Where the bytes go",
        "Deep Compression’s table", "Density and sensitivity", "Shared values", "Training",
        "What the first layer looks at", "Latency", "Stages", "Every tensor", "How it was made",
    )  # fmt: skip
    found = [page.text.index(title) for title in titles]
    assert found == sorted(found)
    for told in (
        "mlp on digits: 6.00 KB →",
        f"{6000 / size:.1f}× smaller, accuracy 97.00 % → 96.80 %.",
        "The change of −0.20 points lies within the 95 % confidence interval",
        f"{size:,} bytes on disk",
        "A fresh process that had nothing but the file decoded it",
        f"whole file {size:,} bytes",
        "95.75 to 97.89 %",  # Wilson's interval of 970 of 1000
        "970 of 1,000",
        "the decoded network, evaluated in a fresh process.",
        "No difference that these timings can show: the ratio's 95 % interval is 0.90× to 1.10×.",
        "0.043 ms",
        "2.5 min",
        "A CPU & more",
        "gossamer compress mlp --data https://example.org/digits <here>",
        "- pack",
        "4.17 % at the end",  # 1 - (1 - 0.5 / 12)
        "0.1667 at the end",
    ):
        assert told in page.text, told
    assert "gpu" not in page.text


def test_the_page_needs_no_network_and_runs_no_script(full_run):
    text = report.render(full_run)
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "img", "iframe", "object", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href", "action", "srcset"):
                assert value.startswith(("#", "data:,")), (tag, value)
    style = re.search(r"<style>(.*?)</style>", text, re.S).group(1)
    assert "url(" not in style
    assert "@import" not in style
    outside = re.sub(r"<pre.*?</pre>", "", text, flags=re.S)
    assert "://" not in outside


def test_the_page_is_accessible(full_run):
    page = Page(report.render(full_run))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == 1
    assert tags.count("title") >= 1
    assert dict(page.tags)["html"]["lang"] == "en"
    assert all(a.get("scope") in ("col", "row") for tag, a in page.tags if tag == "th")
    idents = [a["id"] for _, a in page.tags if "id" in a]
    assert len(idents) == len(set(idents))
    used = {a["href"].removeprefix("#") for tag, a in page.tags if tag == "use"}
    assert used == set(idents)
    plots_ = [a for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    assert len(plots_) > 12
    assert all(a["aria-label"] for a in plots_)


def test_text_is_escaped_everywhere(full_run):
    bad = "<script>alert('x')</script>\"&{{ 7 * 7 }}"
    run = copy.deepcopy(full_run)
    for key in ("name", "model", "dataset", "command", "recipe", "created"):
        run[key] = bad
    run["layers"][0]["name"] = run["layers"][0]["codec"] = bad
    run["layers"][0]["parts"] = {bad: run["layers"][0]["bytes"]}
    run["stages"][0]["stage"] = run["curves"][0]["stage"] = bad
    run["sensitivity"] = {bad: [[0.5, 0.9], [1.0, 0.95]]}
    run["versions"] = {bad: bad}
    run["mask_image"]["name"] = bad
    run["latency"].update(engine=bad, note=bad)
    text = report.render(run)
    page = Page(text)
    assert "<script" not in text
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(bad) >= 10
    assert html.escape("alert('x')") in text


def test_a_minimal_run_leaves_out_what_it_lacks():
    page = Page(report.render(minimal()))
    assert "This run did not read the file back." in page.text
    for title in ("Where the bytes go", "Shared values", "Latency", "Stages", "How it was made"):
        assert title not in page.text
    empty = {
        **minimal(),
        **dict.fromkeys(
            ("command", "versions", "hardware", "recipe", "stages", "layers", "latency",
             "sensitivity", "curves", "mask_image", "evaluation", "created", "seed")
        ),
    }  # fmt: skip
    assert "Accuracy was not measured." in Page(report.render(empty)).text


def test_a_run_of_an_earlier_version_is_read(full_run):
    old = copy.deepcopy(full_run)
    old["accuracy"] = old.pop("evaluation")
    for figures in old["accuracy"].values():
        del figures["score"]
    for row in old["stages"]:
        row["accuracy"] = row.pop("score")
    for row in old["curves"]:
        row["validation_accuracy"] = row.pop("score")
    assert report.render(old) == report.render(full_run)


def test_a_score_of_another_unit_and_without_an_interval():
    run = minimal()
    metric = {"name": "loss", "unit": "nats", "higher_is_better": False, "relative": True}
    run["task"] = {"name": "language-model", "metric": metric}
    run["evaluation"] = {
        "before": {"total": 500, "score": 2.0, "loss": 2.0, "low": 1.9, "high": 2.1},
        "after": {"total": 500, "score": 2.5, "loss": 2.5},
    }
    text = Page(report.render(run)).text
    assert "Loss rose by 25.00 %, beyond the 95 % confidence interval" in text
    assert "not known" in text
    assert "ccuracy" not in text


def test_a_run_without_shared_values_says_so(full_run):
    run = copy.deepcopy(full_run)
    for layer in run["layers"]:
        layer.update(paper=None, codebook=[], histogram=[])
    text = Page(report.render(run)).text
    assert "Deep Compression’s table" not in text
    assert "Shared values" not in text
    run["layers"][0]["paper"] = full_run["layers"][0]["paper"]
    assert "Not in the table, as not shared: ip2." in Page(report.render(run)).text


def test_a_file_that_did_not_come_back_is_called_out():
    run = minimal()
    run["bytes"]["reloaded"] = {"fresh_process": True, "identical": False}
    assert "Do not use it." in Page(report.render(run)).text


def test_what_is_no_run_is_refused():
    with pytest.raises(ArgumentError, match=r"lacks model, bytes; .*run\.json"):
        report.render({"name": "x", "dataset": "y"})


@pytest.mark.parametrize(
    ("ratio", "correct", "speed", "told"),
    [
        (25.0, 970, None, [("No accuracy was lost: ±0.00 points, within", False)]),
        (25.0, 990, (0.9, 1.0, 1.1), [("+2.00 points, beyond", False)]),
        (
            25.0,
            965,
            (1.4, 1.5, 1.6),
            [("−0.50 points lies within", False), ("1.50× faster (95 %: 1.40× to 1.60×)", False)],
        ),
        (
            25.0,
            950,
            (0.4, 0.5, 0.625),
            [
                ("Accuracy fell by 2.00 points, beyond", True),
                ("2.00× the time (95 %: 1.60× to 2.50×)", True),
            ],
        ),
        (1.0, 970, None, [("No gain", True), ("No accuracy was lost", False)]),
    ],
)
def test_the_verdict_is_plain(ratio, correct, speed, told):
    run = minimal()
    run["bytes"]["ratio"] = ratio
    run["evaluation"]["after"] = accuracy(correct, 1000)
    run["latency"] = speed and {
        "ratio": speed[1],
        "interval": [speed[0], speed[2]],
        "dense_ms": 1.0,
        "compressed_ms": 1 / speed[1],
    }
    found = words.verdict(run)
    assert [bad for _, bad in found] == [bad for _, bad in told]
    for (sentence, _), (part, _) in zip(found, told, strict=True):
        assert part in sentence
    assert ("not smaller" in words.headline(run)) == (ratio <= 1)


def test_a_ratio_without_an_interval_or_of_the_same_operations_is_no_verdict():
    old = {"ratio": 1.45, "dense_ms": 1.45, "compressed_ms": 1.0}
    same = {**old, "interval": [1.4, 1.5], "same_operations": True}
    for latency in (old, same, {**old, "interval": None}, {**old, "ratio": None}):
        run = {**minimal(), "latency": latency}
        assert len(words.verdict(run)) == 1
        text = Page(report.render(run)).text
        assert not re.search(r"faster|slower|speed-up", text, re.I)
    assert "No verdict on speed" in words.speed(old)
    assert "same operations" in words.speed(same)


def test_training_since_the_reference_stands_beside_the_accuracy():
    run = minimal()
    run["evaluation"]["after"] = accuracy(990, 1000)
    row = {"train_loss": 0.1, "score": 0.9}
    run["stages"] = [{"stage": name} for name in ("1-train", "2-prune", "3-share", "4-pack")]
    names = ["1-train"] * 9 + ["2-prune-0", "2-prune-0", "2-prune-1", "3-share"]
    run["curves"] = [{"stage": name, **row} for name in names]
    assert words.trained(run) == {"2-prune": 3, "3-share": 1}
    (told, bad), *rest = words.verdict(run)
    assert not bad
    assert not rest
    assert "No accuracy was lost" not in told
    assert told.startswith("Accuracy rose by 2.00 points, beyond the 95 % confidence interval")
    assert "4 epochs of training (2-prune 3, 3-share 1), and no network was trained as long" in told
    for correct, start in (
        (970, "Accuracy is what it was"),
        (965, "The change"),
        (900, "Accuracy fell"),
    ):
        run["evaluation"]["after"] = accuracy(correct, 1000)
        told = words.verdict(run)[0][0]
        assert told.startswith(start)
        assert "4 epochs of training" in told
    run["curves"] = run["curves"][:9]  # all of it before the figures before
    run["evaluation"]["after"] = accuracy(990, 1000)
    assert "No accuracy was lost: +2.00 points" in words.verdict(run)[0][0]


def test_a_test_loss_that_rose_is_said():
    run = minimal()
    run["evaluation"]["after"]["loss"] = 0.07
    assert ("Test loss rose: 0.0612 → 0.0700.", True) in words.verdict(run)
    assert "Test loss rose: 0.0612 → 0.0700." in Page(report.render(run)).text
    for loss in (0.0612, 0.06120001, 0.05, None):
        run["evaluation"]["after"]["loss"] = loss
        run["evaluation"]["before"]["loss"] = 0.0612
        assert not any("rose" in told for told, _ in words.verdict(run))
    run["evaluation"]["after"]["loss"] = float("nan")
    assert any("no finite number" in told for told, _ in words.verdict(run))


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("a fresh process", "evaluated in a fresh process."),
        ("fresh process", "evaluated in a fresh process."),
        ("this process", "evaluated in the process that compressed it."),
    ],
)
def test_where_the_accuracy_was_measured_is_told_as_it_was(full_run, told, shown):
    run = copy.deepcopy(full_run)
    run["bytes"]["reloaded"]["evaluated_in"] = told
    assert shown in Page(report.render(run)).text


def test_bytes_add_up_to_the_file(full_run):
    rows = byte_rows(full_run)
    assert sum(sum(parts.values()) for _, parts in rows) == full_run["bytes"]["file"]
    assert [name for name, _ in rows][:: len(rows) - 1] == ["ip1.weight", "file header"]
    # The bars of the whole file fill its width.
    text = report.render(full_run)
    whole = text[text.index('<div class="whole">') :].split("</div>")[0]
    widths = re.findall(r'width="([\d.e-]+)%" height="100%"', whole)
    assert sum(map(float, widths)) == pytest.approx(100, abs=0.1)


@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.dictionaries(st.text(max_size=3), st.integers(0, 500))),
        max_size=90,
    ),
    st.integers(1, 300),
)
def test_byte_rows_of_any_file_add_up(tensors, header):
    layers = [
        {"name": f"t{i}", "shape": [2] * rank, "bytes": sum(parts.values()), "parts": parts}
        for i, (rank, parts) in enumerate(tensors)
    ]
    size = header + sum(layer["bytes"] for layer in layers)
    rows = byte_rows({"bytes": {"file": size, "parts": {"header": header}}, "layers": layers})
    if rows:
        assert sum(sum(parts.values()) for _, parts in rows) == size
    assert len(rows) <= 62


def test_a_large_network_makes_a_small_page():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 5, 100)
    layers = [
        {
            "name": f"encoder.{i}.attention.{'very' * 20}_long.weight",
            "shape": [64, 64],
            "numel": 4096,
            "kept": 1000,
            "density": 1000 / 4096,
            "distinct": 1001,
            "codec": "raw",
            "bytes": 1000,
            "parts": {"codes": 1000},
            "bits_per_weight": 1.9,
            "codebook": [0.0, *np.sort(rng.normal(size=1000)).tolist()],
            "histogram": [3096, *rng.integers(1, 9, 1000).tolist()],
            "paper": tables.paper_columns(codes),
        }
        for i in range(60)
    ]
    curve = [[d / 20, 0.9] for d in range(1, 21)]
    run = {**minimal(), "layers": layers, "sensitivity": {x["name"]: curve for x in layers}}
    assert len(report.render(run).encode()) < 500_000


# The published columns ---------------------------------------------------------------------


def test_paper_columns_by_hand():
    # Positions 1, 4, 5: gaps 1, 2, 0; codes 1, 2, 1.
    found = tables.paper_columns(np.array([[0, 1, 0, 0], [2, 1, 0, 0]]), index_bits=2, biases=2)
    assert found["weights"] == 8
    assert found["entries"] == 3
    assert found["fillers"] == 0
    assert found["kept_percent"] == 37.5
    assert (found["weight_bits"], found["index_bits"]) == (2, 2)
    assert found["weight_bits_huffman"] == pytest.approx(3 / 3)  # two codes: a bit each
    assert found["index_bits_huffman"] == pytest.approx(5 / 3)  # lengths 1, 2, 2
    assert found["weight_entropy"] == pytest.approx(np.log2(3) - 2 / 3)
    assert found["index_entropy"] == pytest.approx(np.log2(3))
    # Three entries of 4 bits, two centroids, two biases; then Huffman bits and five table bytes.
    assert found["rate_pq_percent"] == pytest.approx(100 * (12 + 64 + 64) / 320)
    assert found["rate_pqh_percent"] == pytest.approx(100 * (3 + 5 + 40 + 64 + 64) / 320)


def test_fillers_are_stored_entries_of_code_zero():
    codes = np.zeros(12, np.int64)
    codes[10] = 3  # a gap of 10 with 2 bits: two fillers of 3 zeros and themselves, then gap 2
    found = tables.paper_columns(codes, index_bits=2)
    assert (found["entries"], found["fillers"]) == (3, 2)
    assert found["weight_bits_huffman"] == 1  # codes 0, 0, 3
    assert found["index_bits_huffman"] == 1  # gaps 3, 3, 2
    assert found["rate_pq_percent"] == pytest.approx(100 * (3 * 4 + 32) / 384)


def test_paper_columns_of_nothing_and_of_nonsense():
    found = tables.paper_columns(np.zeros(5, np.int64))
    assert found["entries"] == found["kept_percent"] == found["rate_pq_percent"] == 0
    assert tables.paper_columns(np.zeros(0, np.int64))["weights"] == 0
    with pytest.raises(ArgumentError, match="got -1"):
        tables.paper_columns(np.array([-1, 0]))


@given(st.lists(st.integers(0, 7), max_size=200), st.integers(1, 6))
def test_huffman_lies_within_a_bit_of_the_entropy(codes, bits):
    found = tables.paper_columns(np.array(codes, np.int64), index_bits=bits)
    for kind in ("weight", "index"):
        low = found[f"{kind}_entropy"]
        assert low - 1e-9 <= found[f"{kind}_bits_huffman"] <= low + 1
    # What is stored takes as many places as the paper's format lets it skip.
    assert found["fillers"] <= len(codes) >> bits


def test_the_total_is_that_of_one_network():
    layers = [
        {"name": "ip1.weight", "paper": tables.paper_columns(np.array([0, 1, 2, 0]), biases=2)},
        {"name": "ip2.weight", "paper": tables.paper_columns(np.array([1, 0]))},
        {"name": "ip2.bias", "paper": None},
    ]
    rows = tables.paper_rows(layers)
    assert [row[0] for row in rows] == ["ip1", "ip2", "Total"]
    assert rows[-1][1:3] == ["6", "50.0 %"]
    # ip1: 2 entries of 2 + 5 bits, 2 centroids, 2 biases; ip2: 1 of 1 + 5, 1 centroid.
    percent = 100 * (14 + 64 + 64 + 6 + 32) / (32 * 8)
    assert rows[-1][7] == f"{percent:.2f} % (1×)"
    assert rows[-1][3] == "1.67"  # 2, 2 and 1 bits
    assert tables.paper_rows(layers[:1])[-1][0] == "ip1"
    lines = tables.paper_table(layers).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1


def test_layer_rows_describe_the_archive(full_run):
    first = full_run["layers"][0]
    assert first["codebook"] == [0.0, -0.25, 0.125, 0.5]
    assert sum(first["histogram"]) == first["numel"] == 1280
    assert sum(first["histogram"][1:]) == first["kept"]
    assert first["paper"]["biases"] == 20
    assert sum(first["parts"].values()) == first["bytes"]
    assert full_run["layers"][1]["paper"] is None
    table = tables.layer_table(full_run["layers"])
    assert "| ip1.weight | 20×64 |" in table
    assert tables.markdown(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"


def test_the_first_layers_picture():
    weight = torch.zeros(3, 2 * 6)
    weight[0, 0] = weight[2, 0] = weight[1, 6] = weight[1, 11] = 1.0
    image = tables.mask_image(weight, (2, 3))
    assert image == {"shape": [2, 3], "counts": [[3, 0, 0], [0, 0, 1]], "out": 3}
    found = tables.first_layer_image({"b": torch.ones(2), "a": weight}, (2, 2, 3))
    assert found == {"name": "a", **image}
    assert (
        tables.first_layer_image({"conv": torch.zeros(2, 1, 3, 3), "a": weight}, (2, 2, 3)) is None
    )
    with pytest.raises(ArgumentError, match="2x5 pixels"):
        tables.mask_image(weight, (2, 5))


# Plots -------------------------------------------------------------------------------------


def test_axes_have_round_ticks():
    linear = plots.axis([0.0, 10.0])
    assert [v for v, _ in linear.ticks] == [0.0, 5.0, 10.0]
    log = plots.axis([0.02, 1.0, 0.0], log=True, percent=True)
    assert log.log
    assert [label for _, label in log.ticks] == ["2 %", "5 %", "10 %", "20 %", "50 %", "100 %"]
    assert log.at(0.0) == 0
    assert log.at(5.0) == 1
    assert log.at(0.02) < log.at(0.2) < log.at(1.0)
    assert not plots.axis([1.0, 2.0], log=True).log
    for values in ([], [3.0], [0.0], [float("nan"), 1.0, 1.0]):
        flat = plots.axis(values)
        assert flat.low < flat.high


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e12), st.booleans(), st.integers(2, 6))
def test_ticks_lie_on_the_axis_and_ascend(low, spread, log, ticks):
    found = plots.axis([low, low + spread], log=log, ticks=ticks)
    values = [v for v, _ in found.ticks]
    assert values == sorted(set(values))
    assert len(values) <= ticks + 3
    slack = 1e-6 * (found.high - found.low)
    assert all(found.low - slack <= v <= found.high + slack for v in values)


def test_curves_leave_out_what_cannot_be_shown():
    x, y = plots.axis([0.0, 10.0]), plots.axis([1.0, 2.0])
    svg = plots.lines([(0.0, 1.0), (5.0, float("nan")), (10.0, 2.0)], x, y, label="<b>")
    assert svg.count("L") == 1
    assert "nan" not in svg
    assert 'aria-label="&lt;b&gt;"' in svg
    falling = plots.lines([(1.0, 0.1), (2.0, 0.0)], x, plots.axis([0.01, 0.1], log=True), label="e")
    assert re.search(r' d="([^"]+)"', falling).group(1).endswith(" 1000")  # none left: the bottom
    many = plots.lines([(i / 100, 1.5) for i in range(1001)], x, y, label="many")
    path = re.search(r' d="([^"]+)"', many).group(1)
    assert path.count("L") < 400
    assert path.endswith(f"{1000 * x.at(10.0):.0f} 500")


def test_a_histogram_bar_stands_at_its_value():
    svg = plots.histogram([-1.0, 0.0, 3.0], [5, 0, 10], label="h")
    assert re.search(r' d="([^"]+)"', svg).group(1) == "M28.3 1000V500M971.7 1000V0"
    assert ">−1<" in svg
    binned = plots.histogram([float(i) for i in range(1000)], [1] * 1000, label="h")
    assert re.search(r' d="([^"]+)"', binned).group(1).count("M") == 128
    assert "<text" in plots.histogram([2.0], [4], label="one")


def test_pictures_scale_and_large_ones_are_averaged():
    svg = plots.heat([[0, 1], [2, 4]], label="p")
    assert 'viewBox="0 0 2 2"' in svg
    shades = dict(re.findall(r'fill-opacity="([\d.]+)" d="([^"]+)"', svg))
    assert shades == {"0.25": "M1 0h1v1h-1z", "0.5": "M0 1h1v1h-1z", "1": "M1 1h1v1h-1z"}
    large = plots.heat([[1] * 224 for _ in range(100)], label="p")
    assert 'viewBox="0 0 56 25"' in large
    assert plots.heat([[0, 0]], label="p").count("<path") == 0


def test_stacked_bars_start_where_the_last_one_ends():
    svg = plots.stacked([("a", 1, "x"), ("b", 0, "y"), ("c", 3, "<z>")], 8, label="s")
    assert re.findall(r'class="(\w)" x="([^"]+)" y="0" width="([^"]+)"', svg) == [
        ("a", "0%", "12.5%"),
        ("c", "12.5%", "37.5%"),
    ]
    assert "<title>&lt;z&gt;</title>" in svg


# Damaged and older run.json ----------------------------------------------------------------

GONE = object()
DAMAGE = (
    GONE, None, "x", "", -1, 0, 1, 0.5, float("inf"), float("nan"), [], {}, True, [[]], [None],
    {"a": None}, 10**30, 1e300, "\ud800", [1], [[1, 2]], {"ip1.weight": 1},
)  # fmt: skip


def noted(run: dict) -> dict:
    """The run with notes of every stage that the page has a section for."""
    run, end = copy.deepcopy(run), {"final": {"score": 0.9, "epoch": 2}}
    value = {"ip1.weight": 0.5}
    run["integer"] = {"identical": True, "correct": 9, "total": 10}
    run["stages"] += [
        {"stage": "3-tickets", "tickets": [{"score": 0.9, "density": 0.5}]},
        {
            "stage": "4-quantize",
            "quantize": {
                **end,
                "method": "ttq",
                "warnings": ["w"],
                "layers": [
                    {"name": "ip1.weight", "weights": 1280, "values": 4, "bits": 2.0,
                     "density": 0.4, "low": -0.25, "high": 0.5}
                ],
                "trajectory": [
                    {"step": step, "high": value, "low": value, "density": value}
                    for step in (0, 5)
                ],
            },
        },
        {
            "stage": "5-activations",
            "activations": {
                **end,
                "bits": 4,
                "estimator": "clipped",
                "layers": [{"name": "a", "start": 1.0, "alpha": 0.9}],
            },
        },
        {
            "stage": "6-fixed_point",
            "fixed_point": {
                "mode": "dynamic", "activation_bits": 8, "input_length": -3,
                "integer": run["integer"], "float_score": 0.9,
                "layers": [{"name": "ip1", "bits": 8, "weight": -7, "bias": None, "output": 2}],
                "compare": [{"bits": b, "dynamic": 0.9, "static": 0.8} for b in (4, 8)],
            },
        },
        {
            "stage": "7-svd",
            "svd": {**end, "layers": [{"name": "ip1", "rank": 2, "before": 9, "after": 3}]},
        },
        {
            "stage": "8-obs",
            "obs": {
                "layers": [{"name": "ip1.weight", "density": 0.5, "bias": True, "note": "n"}],
                "outside": [{"name": "e", "kind": "Embedding", "parameters": 7, "note": "why"}],
                "examples": 64, "batch_norm": False, "rate": 0.002,
            },
        },
        {
            "stage": "8-group_lasso",
            "group_lasso": {
                "lasso": end,
                "groups": [
                    {"kind": "row", "layer": "ip1", "strength": 0.1, "groups": 9, "left": 4}
                ],
                "layers": [
                    {"name": "ip1.weight", "rows": [9, 4], "columns": [8, 6], "density": 0.3,
                     "multiplications": [72.0, 24.0]}
                ],
            },
        },
        {
            "stage": "8-shrink",
            "shrink": {
                "parameters": [99, 33], "difference": 1e-7, "stays": ["2 of fc: roll moves it"],
                "layers": [{"name": "fc.weight", "before": [9, 8], "after": [3, 8]}],
            },
        },
        {
            "stage": "8-low_rank",
            "low_rank": {
                **end, "kind": "spatial", "macs": [900, 300], "parameters": [90, 30],
                "layers": [{"name": "conv1", "form": "spatial", "ranks": [4, 2], "energy": 0.9,
                            "macs": [900, 300], "parameters": [90, 30], "ms": [0.2, 0.1]}],
            },
        },
    ]  # fmt: skip
    return run


def places(value, at=()):
    """Paths of every node of a JSON tree; of a list, the first two."""
    if at:
        yield at
    children = value.items() if isinstance(value, dict) else ()
    children = list(enumerate(value))[:2] if isinstance(value, list) else children
    for key, child in children:
        yield from places(child, (*at, key))


def test_a_damaged_run_is_rendered_or_refused_by_its_field(full_run):
    whole = noted(full_run)
    page = report.render(whole)
    assert "Wilson" in page
    for told in ("64 examples without labels", "rate 0.002", "statistics stayed", "Embedding"):
        assert told in page
    assert all(told in page for told in ("4 of 9 (row)", "6 of 8", "33.3"))
    text = json.dumps(whole)
    paths = list(places(whole))
    assert len(paths) > 150
    refused = []
    for number, path in enumerate(paths):
        for i, other in enumerate(DAMAGE):
            if (number + i) % 3:  # a third of the pairs, each node and each damage among them
                continue
            run = json.loads(text)
            *way, last = path
            at = run
            for key in way:
                at = at[key]
            if other is GONE:
                del at[last]
            else:
                at[last] = other
            try:
                Page(report.render(run))
            except ArgumentError as e:
                refused.append((str(path[0]), str(e)))
    assert len(refused) > 500
    assert [pair for pair in refused if pair[0] not in pair[1]] == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layers": [{"name": "a"}]}, "layers.0.shape is missing"),
        ({"bytes": {"dense": 1, "file": 0, "ratio": 1.0}}, "bytes.file is 0: should be greater"),
        ({"evaluation": {"before": 0.9, "after": 0.9}}, "evaluation.before is 0.9"),
        ({"curves": "none"}, "curves is 'none': should be a valid list"),
    ],
)
def test_the_message_names_file_field_value_and_fix(change, told):
    with pytest.raises(ArgumentError, match=r"^old/run\.json is damaged") as e:
        report.render({**minimal(), **change}, "old/run.json")
    assert told in str(e.value)
    assert "run the same command again" in str(e.value)
    with pytest.raises(ArgumentError, match="run holds a list"):
        report.render([1])


def test_the_engines_and_the_operations_stand_beside_the_latency(full_run):
    text = report.render(full_run).replace("<wbr>", "").replace("&#8203;", "")
    assert "onnxruntime, batch 1, 1 thread" in text
    assert "0.043 → 0.022 ms" in text
    assert "1.95× (95 %: 1.90× to 2.00×)" in text
    assert "1,000 multiplications an example before, 900 after, of which 300" in text
    run = copy.deepcopy(full_run)
    run["latency"]["rows"][0]["before_ms"] = "fast"
    with pytest.raises(ArgumentError, match=r"latency.rows.0.before_ms is 'fast'"):
        report.render(run)
