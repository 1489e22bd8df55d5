"""The bench of exchanges: links, its table, and one run of two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from gossamer import cli
from gossamer.core.errors import ArgumentError, GossamerError
from gossamer.distribute.bench import bench, table
from gossamer.distribute.bench.links import (
    bits_a_second,
    counters,
    loopback,
    namespaces,
    unavailable,
)
from gossamer.distribute.bench.worker import Job

SMALL = {"hooks": ["none", "terngrad"], "divisor": 1024, "warm": 3, "steps": 1}


@pytest.mark.parametrize(
    ("text", "bits"), [("1gbit", 10**9), ("2.5gbit", 25 * 10**8), (" 200Mbit", 2 * 10**8)]
)
def test_rates(text: str, bits: int) -> None:
    assert bits_a_second(text) == bits


@pytest.mark.parametrize("text", ["fast", "1", "10bit", "-1gbit", "1gbyte", ""])
def test_rates_that_are_none(text: str) -> None:
    with pytest.raises(ArgumentError, match="write 1gbit"):
        bits_a_second(text)


def test_arguments_are_checked_before_anything_starts() -> None:
    good = {**SMALL, "workers": 2, "rate": None}
    for change, match in (
        ({"workers": 1}, "workers=1"),
        ({"hooks": ["none", "smoke"]}, "smoke"),
        ({"hooks": []}, "give some of none"),
        ({"steps": 0}, "steps=0"),
        ({"warm": 1}, "warm=1"),
        ({"rate": "fast"}, "rate='fast'"),
        ({"where": "here"}, "where='here'"),
    ):
        with pytest.raises(ArgumentError, match=match):
            bench(**{**good, **change})
    with pytest.raises(ArgumentError, match="workers=1 is outside"), namespaces(1, None):
        pass


def test_jobs_come_back_from_the_command_line() -> None:
    job = Job("none", 1, 2, "tcp://127.0.0.1:1", "lo", ((2, 3), (2,)), 3, 5, 60.0)
    assert Job.load(job.dump()) == job


def test_loopback_counts_its_traffic() -> None:
    sent, received = counters("lo")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        server.accept()[0] as peer,
    ):
        client.sendall(b"x" * 50_000)
        read = 0
        while read < 50_000:
            read += len(peer.recv(1 << 16))
    after = counters("lo")
    assert after[0] - sent >= 50_000
    assert after[1] - received >= 50_000
    assert loopback(3).prefixes == ((), (), ())


def test_table_names_what_failed_and_why_there_are_no_namespaces() -> None:
    link = {"kind": "loopback", "reason": "network namespaces need root", "rate": None}
    row = {"sent": 4e6, "sent_a_parameter": 4.0, "cpu_seconds": 0.5}

    def took(*seconds: float) -> dict:
        return {**row, "seconds": min(seconds), "all_seconds": list(seconds)}

    text = table(
        {
            "workers": 2,
            "parameters": 10**6,
            "link": link,
            "rows": [
                {"hook": "none", **took(2.0, 2.1, 2.2, 2.3)},
                {"hook": "terngrad", **took(0.5, 0.6, 0.7, 1.9)},
                {"hook": "sq2", **took(1.0, 1.0, 1.0, 2.05)},
                {"hook": "sq8", **took(0.5, 0.5, 0.5)},
                {"hook": "fp16", "error": "rank 1 failed: boom"},
            ],
        }
    )
    assert "no namespaces: network namespaces need root" in text
    speeds = {line.split()[0]: line.split()[-1] for line in text.splitlines()}
    assert speeds["terngrad"] == "4.00x"
    assert speeds["none"] == "0.500"  # processor seconds: it is not compared with itself
    assert speeds["sq2"] == "~"  # one of its steps took as long as plain DDP's
    assert speeds["sq8"] == "~"  # three steps say nothing
    assert "rank 1 failed: boom" in text
    assert "divided by the workers" in text


def test_a_rank_that_fails_is_named() -> None:
    from gossamer.distribute.bench.runner import _ranks

    def job(rank: int) -> Job:
        return Job("none", rank, 2, "nonsense://", "lo", ((2,),), 3, 1, 5.0)

    with pytest.raises(GossamerError, match=r"rank . failed: .*nonsense"):
        _ranks(job, loopback(2), 60)


def test_loopback_bench_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(
            ["bench", "exchange", "--where", "loopback", "--divisor", "1024", "--steps", "1",
             "--hook", "terngrad", "--json"]
        )  # fmt: skip
    assert not end.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["link"]["kind"] == "loopback"
    (row,) = found["rows"]
    assert row["hook"] == "terngrad"
    assert row["ranks_agree"]
    # other processes use the interface, too: only the least is certain
    assert row["sent_a_parameter"] > 0.16


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_bytes_between_namespaces() -> None:
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    given = {**SMALL, "hooks": ["terngrad"]}
    found = bench(workers=2, rate="1gbit", where="namespaces", **given)
    (row,) = found["rows"]
    assert row["ranks_agree"]
    # .165 bytes each, and the floats of small tensors, the headers, the barriers
    assert 0.16 < row["sent_a_parameter"] < 0.3
    # 125 MB/s at most, and not the machine's own speed; the first burst is free
    assert found["link"]["bandwidth"] < 160e6
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert f"gossamer-{os.getpid()}-" not in left
