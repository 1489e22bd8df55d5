"""Plans from C against a session: the claims of made-up times, and the run in small."""

from gossamer.experiments.inference import from_c


def test_claims_are_of_medians_and_of_the_least() -> None:
    rows = {
        "c": [{"first": s, "least": t} for s, t in ((0.01, 0.5), (0.02, 0.4), (0.9, 0.7))],
        "onnxruntime": [{"first": s, "least": t} for s, t in ((0.05, 0.3), (0.04, 0.2), (0.01, 1))],
    }
    claims = from_c._judge({"run": {"rows": rows, "difference": 1e-7}})
    assert [(c.value, c.holds) for c in claims] == [(0.5, True), (0.5, False), (1e-7, True)]
