from pathlib import Path

import torch

from gossamer.experiments.fixed_point.fixed_point import _smallest, brute_force, plot_static_dynamic
from gossamer.quantize.fixed_point import error, search


def test_brute_force_looks_at_every_length():
    tensor = torch.cat([torch.full((500,), 0.11), torch.tensor([1.0])])
    best, least = brute_force(tensor, 4)
    assert best == search(tensor, 4)
    assert least == min(error(tensor, 4, frac) for frac in range(-8, 16))


def test_the_plot_is_written(tmp_path: Path):
    table = {
        way: {"8": {"mean": 90.0 - i}, "4": {"mean": 40.0 - i}}
        for i, way in enumerate(("dynamic", "static"))
    }
    text = plot_static_dynamic(table, 91.0, tmp_path / "made" / "plot.svg").read_text()
    assert text.count("<svg") == 1


def test_the_rank_is_chosen_on_validation():
    run = {
        "float": {"float, validation": 1.0, "float, test": 5.0},
        "rows": [
            {"rank": 1, "float, validation": 2.0, "float, test": 0.0},
            {"rank": 2, "float, validation": 1.1, "float, test": 9.0},
            {"rank": 3, "float, validation": 0.5, "float, test": 0.0},
        ],
    }
    assert _smallest(run, 0.1)["rank"] == 2
    assert _smallest(run, -2.0)["rank"] == 3
