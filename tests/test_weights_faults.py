"""Servers and lines that misbehave, for real: the transfer goes on where it was, or says what is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import Fault, HubServer, http_date
from weights_kit import (
    HALF,
    HASTY,
    HEADERS,
    IMAGE,
    TAR,
    VISION,
    assert_complete,
    body,
    bring,
    parts,
    settings,
    total,
)

from emu_cog.errors import CheckpointError
from emu_cog.weights.store import resolve

pytestmark = pytest.mark.usefixtures("log_captured")


class TestOnce:
    """One thing goes wrong, then all is well: no error, and no byte twice where the server can send parts."""

    @pytest.mark.parametrize(
        "fault",
        [
            pytest.param({"reset": True, "after": HALF}, id="connection reset"),
            pytest.param({"end": True, "after": HALF}, id="closed before the end"),
            pytest.param({"stall": True, "after": HALF}, id="silent for ever"),
            pytest.param({"status": 503}, id="503"),
        ],
    )
    def test_goes_on(self, hub: HubServer, tmp_path: Path, way: str, fault: dict[str, object]) -> None:
        hub.faults = [body(way, **fault)]
        assert_complete(bring(hub, tmp_path / "w", way))
        assert hub.faults[0].times == 0
        if way != "tar as a stream":  # a little is sent into a connection that breaks, and never read
            assert hub.sent() < total() + HEADERS + 50_000

    def test_every_passing_status_and_a_silent_start(self, hub: HubServer, tmp_path: Path) -> None:
        hub.faults = [body("hub", status=status) for status in (408, 425)]
        hub.faults += [Fault("/config.json", status=429), Fault("/config.json", status=500), Fault("index", status=504)]
        hub.faults += [Fault("/api/", stall=True), Fault("/generation_config", stall=True)]
        assert_complete(bring(hub, tmp_path / "w", "hub"))
        assert not [fault for fault in hub.faults if fault.times]

    def test_many_breaks_in_a_row_are_no_reason_to_give_up_while_something_arrives(
        self, hub: HubServer, tmp_path: Path
    ) -> None:
        hub.faults = [Fault("/cdn/", minimum=100_000, times=12, reset=True, after=60_000)]
        assert_complete(bring(hub, tmp_path / "w", "hub"))
        assert hub.faults[0].times == 0

    def test_slow_connection_is_left_for_another(self, hub: HubServer, tmp_path: Path) -> None:
        hub.faults = [body("hub", rate=2000)]
        patience = replace(HASTY, slowest=20_000)
        assert_complete(bring(hub, tmp_path / "w", "hub", patience))
        largest = [s.sent for s in hub.asked("/cdn/") if s.headers["Range"] and s.sent > 1_000_000]
        assert len(largest) == 1  # the second connection's; over the first model.ckpt would take a quarter of an hour

    def test_slow_but_steady_is_waited_for(self, hub: HubServer, tmp_path: Path) -> None:
        """A whole transfer may take much longer than any timeout."""
        hub.faults = [body("hub", rate=900_000)]
        assert_complete(bring(hub, tmp_path / "w", "hub"))
        assert len([s for s in hub.asked("/cdn/") if s.sent > 1_000_000]) == 1

    def test_redirects_are_followed(self, hub: HubServer, tmp_path: Path) -> None:
        hub.files["/elsewhere.tar"] = hub.files[TAR]
        hub.faults = [Fault(TAR, times=None, location="/elsewhere.tar")]
        assert_complete(bring(hub, tmp_path / "w", "tar by ranges"))

    @pytest.mark.parametrize("way", ["hub"])
    def test_altered_or_cut_file_is_fetched_anew(self, hub: HubServer, tmp_path: Path, way: str) -> None:
        for fault in ({"alter": True, "after": 5}, {"cut": True, "after": 1_200_000}):
            hub.faults = [body(way, **fault)]
            weights = tmp_path / next(iter(fault))
            assert_complete(bring(hub, weights, way))
            assert hub.faults[0].times == 0

    def test_altered_small_file_is_found_by_its_git_hash(self, hub: HubServer, tmp_path: Path) -> None:
        hub.faults = [Fault("/config.json", alter=True)]
        assert_complete(bring(hub, tmp_path / "w", "hub"))
        assert len(hub.asked(f"{IMAGE}/resolve/.*/config.json")) == 2


class TestAskedToWait:
    @pytest.mark.parametrize(
        "headers",
        [
            {"Retry-After": "1"},
            {"Retry-After": lambda: http_date(2)},
            {"RateLimit": '"resolvers";r=0;t=1'},
        ],
        ids=["seconds", "date", "the hub's own header"],
    )
    def test_waits_as_long_as_asked(
        self, hub: HubServer, tmp_path: Path, headers: dict[str, str | Callable[[], str]]
    ) -> None:
        given = {name: value() if callable(value) else value for name, value in headers.items()}
        hub.faults = [Fault("/cdn/", status=429, headers=given)]
        begun = time.monotonic()
        assert_complete(bring(hub, tmp_path / "w", "hub"))
        assert time.monotonic() - begun >= 0.95

    def test_the_hubs_listing_too(self, hub: HubServer, tmp_path: Path) -> None:
        hub.faults = [Fault("/api/models/", status=503, headers={"Retry-After": "1"})]
        begun = time.monotonic()
        assert_complete(bring(hub, tmp_path / "w", "hub"))
        assert time.monotonic() - begun >= 0.95

    def test_not_longer_than_makes_sense(self, hub: HubServer, tmp_path: Path) -> None:
        hub.faults = [Fault("/cdn/", status=429, headers={"Retry-After": "86400"})]
        with pytest.raises(CheckpointError, match="asks to come back in 86400 s"):
            bring(hub, tmp_path / "w", "hub")


class TestForGood:
    """It does not get better: a clear reason, nothing half in place, and the next start goes on from what arrived."""

    @pytest.mark.parametrize(
        ("fault", "says"),
        [
            pytest.param({"reset": True, "after": 0}, "connection broke|no answer", id="connection reset"),
            pytest.param({"stall": True, "after": 0}, "timed out", id="silent"),
            pytest.param({"status": 404}, r"404 \(not found\)", id="404"),
            pytest.param({"status": 503}, "answered 503 .* given up after 3 attempts", id="503"),
            pytest.param({"location": "/round"}, "redirects", id="redirected in a circle"),
        ],
    )
    def test_says_why_and_goes_on_next_time(
        self, hub: HubServer, tmp_path: Path, way: str, fault: dict[str, object], says: str
    ) -> None:
        hub.faults = [Fault("/round", times=None, location="/round"), body(way, times=None, **fault)]
        with pytest.raises(CheckpointError, match=says):
            bring(hub, tmp_path / "w", way)
        model = tmp_path / "w" / "Emu3.5-Image"
        assert not (tmp_path / "w" / "Emu3.5-VisionTokenizer").exists()
        assert way == "hub" or not model.exists()
        kept = sum(p.stat().st_size for p in (tmp_path / "w").rglob("*") if p.suffix in (".safetensors", ".ckpt"))
        hub.faults = []
        hub.seen.clear()
        assert_complete(bring(hub, tmp_path / "w", way))
        if way != "tar as a stream":
            assert hub.sent() < total() - kept + HEADERS
            if fault.keys() & {"stall", "reset"}:  # attempts took their time: all but model.ckpt had come
                assert hub.sent() < len(parts()[VISION]["model.ckpt"]) + HEADERS

    @pytest.mark.parametrize(("status", "says"), [(401, "not authorised"), (403, "access refused"), (410, "gone")])
    def test_other_refusals_are_not_repeated(self, hub: HubServer, tmp_path: Path, status: int, says: str) -> None:
        hub.faults = [Fault(TAR, times=None, status=status)]
        with pytest.raises(CheckpointError, match=rf"{status} \({says}\)"):
            bring(hub, tmp_path / "w", "tar")
        assert len(hub.asked(TAR)) == 1

    def test_file_that_arrives_altered_each_time(self, hub: HubServer, tmp_path: Path) -> None:
        hub.faults = [body("hub", times=None, alter=True)]
        with pytest.raises(CheckpointError, match=r"arrived altered, 3 time\(s\): model.ckpt has SHA-256"):
            bring(hub, tmp_path / "w", "hub")
        assert not (tmp_path / "w" / "Emu3.5-VisionTokenizer").exists()

    def test_file_that_is_cut_off_on_the_server(self, hub: HubServer, tmp_path: Path) -> None:
        hub.faults = [body("hub", times=None, cut=True, after=1_500_000)]
        with pytest.raises(CheckpointError, match="has 1500000 bytes where 1.* were expected"):
            bring(hub, tmp_path / "w", "hub")

    @pytest.mark.parametrize("stall", [False, True])
    def test_hub_whose_listing_fails(self, hub: HubServer, tmp_path: Path, stall: bool) -> None:
        hub.faults = [Fault("/api/", times=None, stall=True) if stall else Fault("/api/", times=None, status=502)]
        with pytest.raises(CheckpointError, match="given up after 3 attempts"):
            bring(hub, tmp_path / "w", "hub")
        assert len(hub.asked("/api/")) == 2 * HASTY.attempts

    def test_nobody_answers(self, hub: HubServer, tmp_path: Path) -> None:
        chosen = settings(hub, tmp_path / "w")
        environ = {**chosen.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "EMU_WEIGHTS_CDN_URL": "http://127.0.0.1:9/x"}
        with pytest.raises(CheckpointError) as caught:
            resolve(replace(chosen, environ=environ), patience=HASTY)
        assert str(caught.value).count("refused") >= 2

    @pytest.mark.parametrize("url", ["weights.tar", "ftp://127.0.0.1/weights.tar", "http://"])
    def test_address_that_is_none(self, hub: HubServer, tmp_path: Path, url: str) -> None:
        chosen = settings(hub, tmp_path / "w", source="cdn", EMU_WEIGHTS_CDN_URL=url)
        with pytest.raises(CheckpointError, match="cdn: "):
            resolve(chosen, patience=HASTY)
