"""Tokens, passwords and signed URLs never reach a log or a message; what can't succeed is not retried."""

from __future__ import annotations

import importlib.util
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from hub_server import Fault, HubServer
from weights_kit import HASTY, TAR, fill, settings, start, tar_of

from emu_cog.errors import CheckpointError, InputError, redacted
from emu_cog.weights.http import FetchError, Remote, Transient, hopeless, open_range, reason_of
from emu_cog.weights.hub import Hub
from emu_cog.weights.store import resolve

TOKEN = "hf_S3cretS3cretS3cret"


@pytest.fixture
def hub(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server, with everything logged kept; afterwards the token is in none of it."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    caplog.set_level(logging.DEBUG, "emu_cog")
    with HubServer() as server:
        yield server
    assert TOKEN not in caplog.text
    assert "S3cret" not in caplog.text


@pytest.mark.parametrize(
    "given", [f"{TOKEN}\n", f" \t{TOKEN}\r\n", f'"{TOKEN}"', f"'{TOKEN}' "], ids=["newline", "blanks", "quotes", "both"]
)
def test_blanks_and_quotes_around_a_token_are_dropped(hub: HubServer, tmp_path: Path, given: str) -> None:
    """A newline at the end was sent as it was: the client's error quoted the header, six times in the log."""
    fill(hub)
    hub.token = TOKEN
    found = resolve(settings(hub, tmp_path / "w", source="hub", HF_TOKEN=given), patience=HASTY)
    assert found.model.is_dir()
    assert {s.headers["Authorization"] for s in hub.asked("/api/")} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("inside", ["\n", " ", "\0", "\u2019", "\u200b", '"'])
def test_token_that_no_header_can_hold_is_refused_before_any_request(
    hub: HubServer, tmp_path: Path, inside: str
) -> None:
    hub.files[TAR] = tar_of()
    with pytest.raises(InputError, match="HF_TOKEN can't be used: character 11 of 22 is") as caught:
        resolve(settings(hub, tmp_path / "w", HF_TOKEN=TOKEN[:10] + inside + TOKEN[10:]), patience=HASTY)
    assert "S3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not hub.seen


def test_stored_token_is_held_to_the_same(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: f"{TOKEN} {TOKEN}")
    with pytest.raises(InputError, match="the token that `hf auth login` stored can't be used"):
        resolve(settings(hub, tmp_path / "w", source="hub"), patience=HASTY)
    assert not hub.seen


@pytest.mark.parametrize(
    "endpoint", ["huggingface.co", "user:S3cret@mirror", "ftp://mirror", "http://", "http://h:x", "http://a b"]
)
def test_endpoint_that_is_no_address(hub: HubServer, tmp_path: Path, endpoint: str) -> None:
    """It was asked six times, with waits between."""
    with pytest.raises(InputError, match=r"HF_ENDPOINT=.* with http:// or https://") as caught:
        resolve(settings(hub, tmp_path / "w", HF_ENDPOINT=endpoint), patience=HASTY)
    assert "S3cret" not in str(caught.value)


def test_endpoint_on_which_the_client_fails_to_import(hub: HubServer, tmp_path: Path) -> None:
    """huggingface_hub parses HF_ENDPOINT as it is imported, and ended in a traceback."""
    child = start(settings(hub, tmp_path / "w", HF_ENDPOINT="http://user:S3cret@h:x"), HF_ENDPOINT="http://h:x")
    _, said = child.communicate(timeout=60)
    assert said.startswith("InputError: HF_ENDPOINT='http://***@h:x' is not an address")


def test_endpoint_with_a_password_is_shown_without_it(hub: HubServer, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: the connection is refused
        endpoint = f"http://user:S3cret@127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(CheckpointError, match=r"http://\*\*\*@127.0.0.1") as caught:
            resolve(settings(hub, tmp_path / "w", source="hub", HF_ENDPOINT=endpoint, HF_TOKEN=TOKEN), patience=HASTY)
    assert "S3cret" not in str(caught.value)


def test_signed_address_of_the_archive_is_neither_shown_nor_kept(hub: HubServer, tmp_path: Path) -> None:
    hub.faults = [Fault(TAR, status=503), Fault(TAR, times=None, status=403)]
    signed = f"{hub.url}{TAR}?X-Amz-Signature=S3cret"
    with pytest.raises(CheckpointError, match=r"model.tar\?\*\*\* answered 403") as caught:
        resolve(settings(hub, tmp_path / "w", source="cdn", EMU_WEIGHTS_CDN_URL=signed), patience=HASTY)
    assert "S3cret" not in str(caught.value)
    hub.files[TAR], hub.faults = tar_of(), []
    found = resolve(settings(hub, tmp_path / "w", source="cdn", EMU_WEIGHTS_CDN_URL=signed), patience=HASTY)
    assert not [p for p in found.model.glob("*.json") if "S3cret" in p.read_text()]


@pytest.mark.parametrize("url", ["mirror/model.tar", "ftp://mirror/model.tar", "http://[::/model.tar", "http:///x"])
def test_archive_address_that_can_never_be_asked_is_asked_once(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FetchError), open_range(Remote(url=url, token=TOKEN), 0, 1, patience=HASTY):
        pass
    assert "attempt" not in caplog.text


@pytest.mark.parametrize("secret", ["abc\ndef", "abc\u2019def", " abcdef"])
def test_transport_that_quotes_the_header(hub: HubServer, secret: str) -> None:
    """requests' and http.client's own errors for a header that can't be sent, past the check of the token."""
    with (
        pytest.raises(FetchError) as caught,
        open_range(Remote(url=hub.url + TAR, token=secret), 0, 1, patience=HASTY),
    ):
        pass
    assert "abc" not in str(caught.value)
    assert "def" not in str(caught.value)


def _client_errors() -> Iterator[tuple[Exception, bool]]:
    """Errors of both clients that carry the header, and whether the same request would fail again."""
    header = f"Authorization: Bearer {TOKEN}"
    yield requests.exceptions.InvalidHeader(f"Invalid return character in header value: 'Bearer {TOKEN}\\n'"), True
    yield requests.exceptions.MissingSchema(f"Invalid URL '{TOKEN}'"), True
    yield UnicodeEncodeError("latin-1", f"Bearer {TOKEN}\u2019", 3, 4, "ordinal not in range"), True
    yield requests.exceptions.ConnectionError(f"Max retries exceeded with url: /x?token={TOKEN}"), False
    if importlib.util.find_spec("httpx2") is None:
        return  # an older huggingface_hub, whose client is another one
    import httpx2

    yield httpx2.LocalProtocolError(f"Illegal header value b'Bearer {TOKEN}\\n'"), True
    yield httpx2.UnsupportedProtocol("Request URL is missing an 'http://' or 'https://' protocol."), True
    yield httpx2.InvalidURL(f"Invalid port in https://user:{TOKEN}@mirror:x"), True
    yield httpx2.TooManyRedirects(f"redirected with {header}"), True
    yield httpx2.ConnectError(f"refused; headers {{'authorization': 'Bearer {TOKEN}'}}"), False
    yield httpx2.ReadTimeout(f"timed out: {header}"), False


@pytest.mark.parametrize(("error", "final"), list(_client_errors()), ids=lambda value: type(value).__name__)
def test_errors_of_both_clients(
    error: Exception, final: bool, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*_: object, **__: object) -> None:
        calls.append(1)
        raise error

    assert hopeless(error) == final
    assert TOKEN not in reason_of(error, TOKEN)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(CheckpointError) as caught:
        resolve(settings(hub, tmp_path / "w", source="hub", HF_TOKEN=TOKEN), patience=HASTY)
    assert "S3cret" not in str(caught.value)
    assert len(calls) == (2 if final else 2 * HASTY.attempts)  # two parts


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pa/s@s@host/x", "https://***@host/x"),
        ("https://host/x?sig=a%2F&t=b' failed", "https://host/x?***' failed"),
        ("{'authorization': 'Bearer abc'}", "{'authorization***"),
        ("header b'Bearer abc def'", "header b'Bearer***"),
        ("Proxy said Basic dXNlcjpwYXNz", "Proxy said Basic ***"),
        ("hf_abcdefgh12", "hf_***"),
        ("/data/user@host/model has 3 bytes?", "/data/user@host/model has 3 bytes?"),
        (
            "http://127.0.0.1:8000/a answered 401 (not authorised)",
            "http://127.0.0.1:8000/a answered 401 (not authorised)",
        ),
    ],
)
def test_redacted(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown
    assert str(CheckpointError(text)) == str(Transient(text)) == shown


def test_token_is_in_no_representation(tmp_path: Path) -> None:
    assert TOKEN not in repr(Remote(url="http://x", token=TOKEN))
    assert TOKEN not in repr(Hub({"HF_TOKEN": TOKEN}, HASTY))
