"""What a gradient exchange costs: measured between network namespaces, and as a model of it.

Wen et al., *TernGrad*, NeurIPS 2017, section 6 and figure 4. Timings want a machine at rest; bytes
do not care. Where namespaces are not permitted the workers meet on loopback, and what needs a rate
limit is not shown (NaN, which holds nothing).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from gossamer.core.timing import best_of
from gossamer.distribute.bench import bench
from gossamer.distribute.bench.performance import (
    NETWORKS,
    Constants,
    Network,
    Scheme,
    mixed,
    speed_up,
)
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.shared.panels import draw

__all__ = ["exchange_bench", "exchange_performance"]

RATE = "1gbit"
MOST = 4  # divisor of the eight workers' layers: memory


def measured(given: dict[str, Any]) -> dict[str, Any]:
    """A bench of these settings."""
    return bench(warm=3, say=print, **given)


def _bench(context: Context, **given: Any) -> dict[str, Any]:
    (found,) = context.map(measured, [(given,)])
    return found


def _row(found: dict[str, Any], hook: str) -> dict[str, float]:
    """A hook's figures; NaN for one that failed."""
    row = next(r for r in found["rows"] if r["hook"] == hook)
    if "error" in row:
        return dict.fromkeys(("seconds", "sent", "sent_a_parameter", "cpu_seconds"), math.nan)
    return row


def _judge_bench(raw: Mapping[str, Any]) -> list[Claim]:
    two = raw["two"]
    plain, ours = _row(two, "none"), _row(two, "terngrad")
    limited = two["link"]["rate"] is not None
    what = f"{two['parameters']:,} parameters, 2 workers"
    claims = [
        Claim("exchange.1", f"{what}: MB sent a step", ours["sent"] / 1e6, "<=", 10.2),
        Claim("exchange.1", "plain DDP's bytes over it", plain["sent"] / ours["sent"], ">=", 24.0),
        Claim(
            "exchange.2",
            f"{RATE}: seconds of plain DDP over it",
            plain["seconds"] / ours["seconds"] if limited else math.nan,
            ">=",
            7.0,
        ),
        Claim(
            "exchange.4",
            "processor seconds over plain DDP's",
            ours["cpu_seconds"] / plain["cpu_seconds"],
            "<=",
            1.0,
        ),
    ]
    if "eight" not in raw:  # a smoke run
        return claims
    power = _row(two, "powersgd-1")["seconds"] / ours["seconds"]
    eight, forms = raw["eight"], two["forms"]
    return [
        *claims,
        Claim(
            "exchange.2",
            f"{RATE}: seconds of PowerSGD rank 1 over it",
            power if limited else math.nan,
            ">=",
            2.2,
        ),
        Claim(
            "exchange.3",
            f"two-phase, 8 workers, {eight['parameters']:,} parameters: bytes a parameter",
            _row(eight, "terngrad-two-phase")["sent_a_parameter"],
            "<=",
            0.6,
        ),
        Claim(
            "terngrad.3",
            "interface: float32's bytes over base 3's, 16.8 M elements",
            forms["base3"]["ratio"],
            ">=",
            19.9,
        ),
        Claim(
            "terngrad.3",
            "payload: float32's bytes over two planes'",
            forms["planes"]["payload_ratio"],
            "==",
            16.0,
        ),
    ]


@experiment("exchange-bench", seeds=(0,), judge=_judge_bench)
def exchange_bench(context: Context) -> dict[str, Any]:
    """Exchange 1-4, TernGrad 3: bytes and seconds of AlexNet's gradients at 1 Gbit/s."""
    small = context.quick
    two = _bench(
        context,
        workers=2,
        rate=RATE,
        hooks=["none", "terngrad"]
        if small
        else ["none", "fp16", "powersgd-1", "terngrad", "terngrad-two-phase", "terngrad-server"],
        divisor=256 if small else 1,
        steps=1 if small else 8,
        rounds=1 if small else 2,
        forms=not small,
    )
    raw: dict[str, Any] = {"two": two}
    if not small:
        raw["eight"] = _bench(
            context, workers=8, rate=RATE, hooks=["terngrad-two-phase"], divisor=MOST, steps=2
        )
    return raw


FLOAT = Scheme("float", "ring", 32, 0)
FLOAT_SERVER = Scheme("float, server", "server", 32, 0)
GATHER = Scheme("TernGrad, all_gather", "all_gather", 1.32, 1)
TWO_PHASE = Scheme("TernGrad, two_phase", "two_phase", 1.32, 1)
SERVER = Scheme("TernGrad, server", "server", 1.32, 1)
HOOKS = {"none": FLOAT, "terngrad": GATHER, "terngrad-two-phase": TWO_PHASE}
WORKERS = tuple(1 << i for i in range(10))
RATES = {"1 Gbit/s": 1e9, "10 Gbit/s": 1e10, "100 Gbit/s": 1e11}
ACCELERATOR = 5e12  # operations a second, assumed: a graphics card of the paper's year
BUCKETS = 8  # DDP's 25 MB buckets of AlexNet, whose largest parameter is one of them


def ours(workers: int) -> Scheme:
    """What ``auto`` takes."""
    return GATHER if workers <= 3 else TWO_PHASE


def training_rate(rounds: int) -> float:
    """Operations a second of forward and backward, one thread."""
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
    x = torch.randn(8, 64, 28, 28, requires_grad=True)
    (seconds,) = best_of([lambda: net(x).sum().backward()], rounds)
    return 6 * 8 * 2 * 64 * 64 * 9 * 28 * 28 / seconds


def constants_of(found: dict[str, Any], rate: float) -> Constants:
    """Those of a bench's link and workers."""
    link = found["link"]
    return Constants(
        **found["costs"], bandwidth=link["bandwidth"], latency=link["latency"], rate=rate,
        buckets=BUCKETS,
    )  # fmt: skip


def predicted(found: dict[str, Any], constants: Constants, hook: str) -> dict[str, float]:
    """A bench row's seconds against the model's; its compute is the step without exchange."""
    row = _row(found, hook)
    fixed = Network("bench", found["parameters"], 0, 0, 0, 0)
    model = row["local_seconds"] + HOOKS[hook].step(fixed, found["workers"], constants)
    return {"measured": row["seconds"], "model": model, "ratio": model / row["seconds"]}


def table(constants: Constants, networks: dict[str, Network]) -> list[dict[str, Any]]:
    """Seconds and speed-up over float for every network, rate and number of workers."""
    rows = []
    for name, network in networks.items():
        for label, rate in RATES.items():
            # the share of the link's rate that a measured link lets through is kept
            c = replace(constants, bandwidth=constants.bandwidth * rate / RATES["1 Gbit/s"])
            rows += [
                {
                    "network": name,
                    "rate": label,
                    "workers": n,
                    "float": FLOAT.step(network, n, c),
                    "terngrad": ours(n).step(network, n, c),
                    "speed_up": speed_up(ours(n), FLOAT, network, n, c),
                    "server_speed_up": speed_up(SERVER, FLOAT_SERVER, network, n, c),
                    "examples_a_second": n * network.batch / ours(n).step(network, n, c),
                }
                for n in WORKERS
            ]
    return rows


def _pick(rows: list[dict[str, Any]], key: str, **where: Any) -> list[float]:
    return [r[key] for r in rows if all(r[k] == v for k, v in where.items())]


def _drawn(context: Context, name: str, rows: list[dict[str, Any]]) -> list[str]:
    """A panel a network, a line a rate; the pictures' names."""
    pictures = []
    for key, label in (
        ("speed_up", "speed-up over float, ring"),
        ("server_speed_up", "speed-up over float, server"),
        ("examples_a_second", "examples a second"),
    ):
        panels = {
            net: {
                rate: {
                    r["workers"]: [r[key]] for r in rows if (r["network"], r["rate"]) == (net, rate)
                }
                for rate in RATES
            }
            for net in NETWORKS
        }
        path = context.work / f"{name}-{key.replace('_', '-')}.svg"
        pictures.append(draw(panels, path, xlabel="workers", ylabel=label).name)
    return pictures


def _judge_performance(raw: Mapping[str, Any]) -> list[Claim]:
    """Every network, rate, number of workers and compute that was modelled is judged."""
    tables = {
        "measured compute": raw["measured_compute"],
        "assumed accelerator": raw["assumed_accelerator"]["rows"],
    }
    page, claims = "terngrad.6", []
    nets, rates, counts = list(NETWORKS), list(RATES), list(WORKERS)
    for key, how in (("speed_up", "ring"), ("server_speed_up", "server")):
        for compute, rows in tables.items():
            workers = min(
                b / a
                for net in nets
                for rate in rates
                for a, b in pairwise(_pick(rows, key, network=net, rate=rate))
            )
            slower = min(
                a / b
                for net in nets
                for n in counts[1:]
                for a, b in pairwise(_pick(rows, key, network=net, workers=n))
            )
            at = f"{how}, {compute}, every network"
            what = f"speed-up, twice the workers, 1 to 512, {at} and rate: least ratio"
            claims.append(Claim(page, what, workers, ">", 1))
            what = f"speed-up, a tenth of the bandwidth, 2 to 512 workers, {at}: least ratio"
            claims.append(Claim(page, what, slower, ">", 1))
    what = "speed-up, more of the parameters fully connected, 8 workers, 1 Gbit/s: least ratio"
    least = min(b / a for a, b in pairwise(raw["shares"].values()))
    claims.append(Claim(page, what, least, ">", 1))
    for speed, check in raw["checks"].items():
        far = max(abs(math.log(row["ratio"])) for row in check.values())
        what = f"model against measured steps, {speed}: farthest factor"
        claims.append(Claim(page, what, math.exp(far), "<=", 1.5))
    return claims


@experiment("exchange-performance", seeds=(0,), judge=_judge_performance)
def exchange_performance(context: Context) -> dict[str, Any]:
    """TernGrad 6: the performance model, against measured steps, and drawn for 1 to 512 workers."""
    (rate,) = context.alone(training_rate, [(2 if context.quick else 9,)])
    links = ("1gbit",) if context.quick else ("1gbit", "10gbit")
    checks: dict[str, dict[str, Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    for speed in links:
        found[speed] = _bench(
            context, workers=2, rate=speed, hooks=list(HOOKS),
            divisor=256 if context.quick else 1, steps=1 if context.quick else 5,
            rounds=1 if context.quick else 2, costs=True,
        )  # fmt: skip
        constants = constants_of(found[speed], rate)
        checks[speed] = {hook: predicted(found[speed], constants, hook) for hook in HOOKS}
    constants = constants_of(found[links[0]], rate)
    here = table(constants, NETWORKS)
    card = table(replace(constants, rate=ACCELERATOR), NETWORKS)
    drawn = _drawn(context, "measured", here) + _drawn(context, "accelerator", card)
    shares = {
        f"{share:g}": speed_up(ours(8), FLOAT, mixed(NETWORKS["vgg-a"], share), 8, constants)
        for share in (0, 0.2, 0.4, 0.6, 0.8, 0.9, 1)
    }
    return {
        "constants": asdict(constants),
        "links": {speed: found[speed]["link"] for speed in links},
        "checks": checks,
        "shares": shares,
        "measured_compute": here,
        "assumed_accelerator": {"rate": ACCELERATOR, "rows": card},
        "pictures": drawn,
    }
