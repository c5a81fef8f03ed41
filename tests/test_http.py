"""Predictions over HTTP, on Cog's real server with a tiny checkpoint."""

from __future__ import annotations

import http.client
import io
import json
import re
import struct
import time
import uuid
import zlib
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from _models import tiny
from _server import HOST, Server
from PIL import Image

from emu_cog.outputs import read_settings
from tests.cog_kit import BIG, data_url, from_data_url, png, run, serving
from tests.conftest import ROOT, photo

Inputs = dict[str, Any]
PHOTO = data_url(png(photo(1)))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folders = tiny.make_tiny(
        tmp_path_factory.mktemp("http"),
        seed=7,
        logit_bias=tiny.STORYTELLER,
        defaults=tiny.small_defaults(),
        context=16384,
    )
    with serving(folders) as running:
        yield running


@pytest.fixture(autouse=True)
def the_next_request_works(server: Server) -> Iterator[None]:
    """After every test here, whatever it did, one more prediction succeeds."""
    yield
    idle(server)
    _, result = run(server, prompt="a red boat", seed=1)
    assert result["status"] == "succeeded"
    idle(server)


def idle(server: Server, seconds: float = 8) -> None:
    """Wait for the one slot to be free: Cog answers a request first and frees its slot a moment later."""
    until = time.monotonic() + seconds
    while server.get("/health-check")["status"] != "READY":
        assert time.monotonic() < until, "the last prediction never ended"
        time.sleep(0.02)


def post(server: Server, inputs: Inputs) -> tuple[int, dict[str, Any]]:
    idle(server)
    return at_once(server, inputs)


def at_once(server: Server, inputs: Inputs) -> tuple[int, dict[str, Any]]:
    return server._request("POST", "/predictions", {"input": inputs})


def opened(url: str) -> Image.Image:
    image = Image.open(io.BytesIO(from_data_url(url)[1]))
    image.load()
    return image


def header_only_png(width: int, height: int) -> bytes:
    """A PNG that says it is this large, with no pixels to speak of."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_words_to_a_picture_and_its_metrics(server: Server) -> None:
    status, answer = post(server, {"prompt": "a red boat", "seed": 5})
    assert (status, answer["status"]) == (200, "succeeded")
    [url] = answer["output"]
    assert from_data_url(url)[0] == "image/png"
    picture = opened(url)
    assert (picture.size, picture.mode) == ((160, 160), "RGB")
    metrics = answer["metrics"]
    assert (metrics["seed"], metrics["width"], metrics["height"]) == (5, 160, 160)
    assert metrics["tokens"] >= 100  # ten rows of ten, and what was written before
    assert metrics["tokens_per_second"] > 0
    for name in ("prefill_seconds", "decode_seconds", "vq_seconds"):
        assert 0 < metrics[name] <= metrics["predict_time"]
    settings = read_settings(picture)
    assert (settings["task"], settings["seed"], settings["width"]) == ("t2i", 5, 160)
    assert "a red boat" not in json.dumps(settings)


def test_four_pictures_are_those_of_four_seeds(server: Server) -> None:
    _, together = post(server, {"prompt": "a red boat", "seed": 5, "num_outputs": 4})
    alone = [post(server, {"prompt": "a red boat", "seed": 5 + i})[1]["output"][0] for i in range(4)]
    assert [opened(url).tobytes() for url in together["output"]] == [opened(url).tobytes() for url in alone]
    assert len(set(alone)) == 4


def test_a_seed_is_chosen_and_logged(server: Server) -> None:
    _, first = post(server, {"prompt": "a red boat"})
    seed = first["metrics"]["seed"]
    assert f"seed {seed}" in first["logs"]
    _, again = post(server, {"prompt": "a red boat", "seed": seed})
    assert opened(again["output"][0]).tobytes() == opened(first["output"][0]).tobytes()


@pytest.mark.parametrize(("given", "mime"), [("jpeg", "image/jpeg"), ("webp", "image/webp")])
def test_formats_and_quality(given: str, mime: str, server: Server) -> None:
    sizes = []
    for quality in (10, 95):
        _, answer = post(server, {"prompt": "x", "seed": 1, "output_format": given, "output_quality": quality})
        found, data = from_data_url(answer["output"][0])
        assert found == mime
        sizes.append(len(data))
    assert sizes[0] < sizes[1]


def test_custom_gives_exactly_the_asked_pixels(server: Server) -> None:
    _, answer = post(server, {"prompt": "x", "aspect_ratio": "custom", "width": 208, "height": 160})
    assert opened(answer["output"][0]).size == (208, 160)
    assert (answer["metrics"]["width"], answer["metrics"]["height"]) == (208, 160)


def test_three_photos_to_a_picture_in_the_shape_of_the_first(server: Server) -> None:
    more = {"reference_image_2": data_url(png(photo(2))), "reference_image_3": data_url(png(photo(3, 100, 100)))}
    _, answer = post(server, {"prompt": "x", "task_type": "x2i", "reference_image": PHOTO, **more})
    assert answer["status"] == "succeeded"
    width, height = opened(answer["output"][0]).size
    assert width > height


def test_a_sequence_comes_piece_by_piece_and_at_last_its_page(server: Server) -> None:
    inputs = {"prompt": "a fox <b>", "task_type": "story", "seed": 3, "max_new_tokens": 600, "reference_image": PHOTO}
    events, result = run(server, **inputs)
    assert result["status"] == "succeeded"
    names = [name for name, _ in events]
    files = [from_data_url(data["chunk"]) for name, data in events if name == "output"]
    kinds = [mime for mime, _ in files]
    assert {"text/plain", "image/png"} <= set(kinds[:-1])
    assert kinds[-1] == "text/html"
    assert kinds.count("text/html") == 1
    # delivered while the model goes on: something is logged after the first file
    assert "log" in names[names.index("output") :]
    page = files[-1][1].decode()
    assert page.count("data:image/png;base64,") == kinds.count("image/png")
    assert "a fox &lt;b&gt;" in page
    for mime, data in files:
        if mime == "text/plain":
            assert data.decode().strip()
    assert not [link for link in ('src="http', 'href="http', "<script") if link in page]


def test_the_schema_is_served_as_written(server: Server) -> None:
    assert server.get("/openapi.json") == json.loads((ROOT / ".cog" / "openapi_schema.json").read_text())


@pytest.mark.parametrize(
    ("inputs", "where"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "x", "task_type": "t2v"}, "task_type"),
        ({"prompt": "x", "aspect_ratio": "5:1"}, "aspect_ratio"),
        ({"prompt": "x", "resolution": 1024}, "resolution"),
        ({"prompt": "x", "width": 159}, "width"),
        ({"prompt": "x", "height": 1600}, "height"),
        ({"prompt": "x", "num_outputs": 0}, "num_outputs"),
        ({"prompt": "x", "num_outputs": 5}, "num_outputs"),
        ({"prompt": "x", "num_outputs": "2"}, "num_outputs"),
        ({"prompt": "x", "guidance_scale": 0.5}, "guidance_scale"),
        ({"prompt": "x", "temperature": 0}, "temperature"),
        ({"prompt": "x", "text_top_p": 1.5}, "text_top_p"),
        ({"prompt": "x", "image_top_k": -1}, "image_top_k"),
        ({"prompt": "x", "max_new_tokens": 511}, "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": 32769}, "max_new_tokens"),
        ({"prompt": "x", "seed": 1.5}, "seed"),
        ({"prompt": "x", "seed": None}, "seed"),
        ({"prompt": "x", "output_format": "gif"}, "output_format"),
        ({"prompt": "x", "output_quality": 101}, "output_quality"),
        ({"prompt": "x", "reference_image": [PHOTO]}, "reference_image"),
    ],
)
def test_what_the_schema_refuses(inputs: Inputs, where: str, server: Server) -> None:
    status, answer = post(server, inputs)
    assert status == 422
    assert where in [detail["loc"][-1] for detail in answer["detail"]]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"prompt": " \n\t"}, "prompt is blank"),
        ({"task_type": "x2i"}, "needs 1 to 3 reference images"),
        ({"reference_image": PHOTO}, "t2i makes a picture from words alone"),
        ({"aspect_ratio": "custom"}, "needs both width and height"),
        ({"aspect_ratio": "custom", "width": 160}, "needs both width and height"),
        ({"width": 160, "height": 160}, "aspect_ratio custom only"),
        ({"aspect_ratio": "custom", "width": 170, "height": 160}, "multiple of 16"),
        ({"task_type": "story", "num_outputs": 2}, "num_outputs=2 is for t2i and x2i"),
        ({"prompt": "many words " * 20000}, "shorten the prompt"),
        ({"seed": -1}, "seed=-1 is out of range"),
    ],
)
def test_what_the_package_refuses(inputs: Inputs, words: str, server: Server) -> None:
    refused(server, {"prompt": "x", **inputs}, words)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes"),
        (b"just a text\n" * 100, "not a picture"),
        (png(photo(1))[:2000], "reference_image"),
        (png(Image.new("RGB", (1, 1))), "1x1"),
        (png(Image.new("RGB", (2100, 100))), "2100x100"),
        (header_only_png(50_000, 50_000), "2,500,000,000 pixels"),
    ],
    ids=["empty", "text", "truncated", "one pixel", "a ribbon", "huge"],
)
def test_files_that_are_no_use_as_a_photo(data: bytes, words: str, server: Server) -> None:
    refused(server, {"prompt": "x", "task_type": "x2i", "reference_image": data_url(data)}, words)


def refused(server: Server, inputs: Inputs, words: str) -> None:
    """A failed prediction with one sentence, before any model work."""
    status, answer = post(server, inputs)
    assert (status, answer["status"]) == (200, "failed")
    assert "InputError: " in answer["error"]
    assert words in answer["error"]
    assert "Traceback" not in answer["error"]
    assert "\n" not in answer["error"]
    assert "row/s" not in answer["logs"]
    assert not answer.get("output")


def test_a_huge_picture_costs_no_memory(server: Server) -> None:
    assert server._process is not None
    [worker] = psutil.Process(server._process.pid).children()
    run(server, prompt="x", seed=1)
    before = peak(worker.pid)
    huge = data_url(header_only_png(50_000, 50_000))
    refused(server, {"prompt": "x", "task_type": "x2i", "reference_image": huge}, "50")
    assert peak(worker.pid) - before < 64 * 2**20  # its pixels would be 7.5 GB


def peak(pid: int) -> int:
    """The most resident memory a process ever had, in bytes."""
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    pytest.skip("this system does not report peak memory")


@pytest.mark.parametrize(
    "form", ["{path}", "file://{path}", "FILE://{path}", "photo.png", "~/photo.png", "", " {path}"]
)
def test_a_string_that_is_no_upload_is_never_opened(form: str, server: Server, tmp_path: Any) -> None:
    """The file is a good photo: were it opened, the prediction would succeed."""
    (tmp_path / "photo.png").write_bytes(png(photo(1)))
    given = form.format(path=tmp_path / "photo.png")
    refused(server, {"prompt": "x", "task_type": "x2i", "reference_image": given}, "is not an uploaded file")
    more = {"reference_image": PHOTO, "reference_image_3": given}
    refused(server, {"prompt": "x", "task_type": "x2i", **more}, "reference_image_3")


def test_a_whole_number_may_come_as_a_float(server: Server) -> None:
    _, answer = post(server, {"prompt": "x", "seed": 5.0, "num_outputs": 2.0})
    assert (answer["metrics"]["seed"], len(answer["output"])) == (5, 2)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {"Content-Type": "application/json"}, 400),
        (b'{"input": {"prompt": "x"}}', {"Content-Type": "text/plain"}, 415),
    ],
)
def test_requests_that_are_no_json(body: bytes, headers: dict[str, str], status: int, server: Server) -> None:
    connection = http.client.HTTPConnection(HOST, server.port, timeout=30)
    connection.request("POST", "/predictions", body, headers)
    assert connection.getresponse().status == status
    connection.close()


def test_cancel_while_running_and_no_second_one_meanwhile(server: Server) -> None:
    identifier, cancelled, result = uuid.uuid4().hex, False, {}
    for name, data in server.stream({"prompt": "x", "seed": 1, **BIG}, identifier=identifier):
        if name == "log" and "%|" in data["data"] and not cancelled:
            assert at_once(server, {"prompt": "another"})[0] == 409
            cancelled = True
            server.cancel(identifier)
        elif name == "completed":
            result = data
    assert result["status"] == "canceled"
    assert not result.get("output")


def test_a_client_that_leaves_stops_its_prediction(server: Server) -> None:
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    connection = http.client.HTTPConnection(HOST, server.port, timeout=30)
    connection.request("PUT", "/predictions/away", json.dumps({"input": {"prompt": "x", **BIG}}), headers)
    response = connection.getresponse()
    # Cog loses a cancel of the first 20 ms or so, before predict has begun; leave when a picture is in the making.
    while b"%|" not in (line := response.readline()):
        assert line, "the stream ended before any row was made"
    response.close()
    connection.close()
    idle(server)


def test_progress_is_logged_while_a_picture_is_made(server: Server) -> None:
    """Line by line in the form that Replicate's client libraries read."""
    events, _ = run(server, prompt="x", seed=1, aspect_ratio="custom", width=320, height=640)
    lines = "".join(data["data"] for name, data in events if name == "log").split("\n")
    found = [int(match[1]) for line in lines if (match := re.match(r"\s*(\d+)%\s*\|.+?\|\s*(\d+)\/(\d+)", line))]
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (0, 100)
    assert 20 <= len(found) <= 51
