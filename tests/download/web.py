"""A web server on this machine that can be made to stumble, and a small made-up COCO for it."""

from __future__ import annotations

import io
import json
import re
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captune.download.coco import download_coco
from captune.download.stumbling import Patience

QUICK = Patience(attempts=4, timeout=5.0, first_wait=0.001, longest_wait=0.002)
SPLITS = {"train": 12, "val": 5}


@dataclass
class Server:
    """What it serves, how it misbehaves, and what it was asked for.

    Attributes:
        files: content by path.
        versions: the ETag's text by path, where it is not the first version.
        tells_versions: whether answers after the first carry an ETag.
        asked: ``(path, Range header)`` of each request.
        encodings: the Accept-Encoding header of each request.
        sent: bytes of content sent so far.
        limit: where ``sent`` reaches it, the server falls silent until it is raised; connections
            from before that are then closed.
        drop_after: bytes after which each connection breaks.
        failures: how many requests are still answered with ``failure_status``.
        overstate: bytes by which Content-Length and Content-Range lie.
        span: what Content-Range says in place of the truth.
        ignores_range: always sends whole files.
        pause: seconds between pieces.
        on_request: called with the path before each answer.
        spoil: called with path, first byte and piece; returns what is sent.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    tells_versions: bool = True
    asked: list[tuple[str, str]] = field(default_factory=list)
    encodings: list[str] = field(default_factory=list)
    sent: int = 0
    limit: int | None = None
    drop_after: int | None = None
    failures: int = 0
    failure_status: int = 503
    failure_headers: dict[str, str] = field(default_factory=dict)
    overstate: int = 0
    span: str = ""
    ignores_range: bool = False
    pause: float = 0.0
    piece: int = 1 << 16
    on_request: Callable[[str], None] | None = None
    spoil: Callable[[str, int, bytes], bytes] | None = None

    def url(self, path: str) -> str:
        return f"{self.address}{path}"


def serve() -> tuple[Server, ThreadingHTTPServer]:
    """Start to serve on a free port of 127.0.0.1."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(server, self)

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Clients that hang up are what these tests are about."""

    web = Quiet(("127.0.0.1", 0), Handler)
    server.address = f"http://127.0.0.1:{web.server_address[1]}"
    threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
    return server, web


def answer(server: Server, handler: BaseHTTPRequestHandler) -> None:
    path = handler.path
    wanted = handler.headers.get("Range", "")
    server.asked.append((path, wanted))
    server.encodings.append(handler.headers.get("Accept-Encoding", ""))
    if server.on_request:
        server.on_request(path)
    content = server.files.get(path)
    if content is None or server.failures:
        server.failures -= content is not None
        handler.send_response(404 if content is None else server.failure_status)
        for name, value in server.failure_headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return
    etag = f'"{server.versions.get(path, "1")}"'
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
    first, last = 0, len(content) - 1
    partial = bool(match) and not server.ignores_range
    if handler.headers.get("If-Range", etag) != etag:
        partial = False
    if partial and match:
        first, last = int(match.group(1)), min(int(match.group(2) or last), last)
    handler.send_response(206 if partial else 200)
    if server.tells_versions or len(server.asked) == 1:
        handler.send_header("ETag", etag)
    handler.send_header("Content-Length", str(last - first + 1 + server.overstate))
    if partial:
        truth = f"bytes {first}-{last}/{len(content)}"
        handler.send_header("Content-Range", server.span or truth)
    handler.end_headers()
    send(server, handler, content[first : last + 1], first)


def send(server: Server, handler: BaseHTTPRequestHandler, content: bytes, first: int) -> None:
    end = len(content) if server.drop_after is None else server.drop_after
    limit = server.limit
    try:
        for start in range(0, min(end, len(content)), server.piece):
            while limit is not None and server.sent >= limit:
                time.sleep(0.001)
                if server.limit != limit:
                    raise ConnectionAbortedError
            piece = content[start : min(start + server.piece, end)]
            if server.spoil:
                piece = server.spoil(handler.path, first + start, piece)
            handler.wfile.write(piece)
            server.sent += len(piece)
            if server.pause:
                time.sleep(server.pause)
    except (ConnectionError, TimeoutError):  # the client has had enough, or was killed
        handler.close_connection = True
    if end < len(content) or server.overstate:
        handler.close_connection = True


def photo(number: int, width: int = 120, height: int = 90, noise: float = 20.0) -> bytes:
    """A JPEG of soft blobs and noise, the same for the same number."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    blobs = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = rng.normal(0, noise, (height, width, 1)).astype(np.float32)
    out = io.BytesIO()
    pixels = np.clip(blobs + grain, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(out, "JPEG", quality=92)
    return out.getvalue()


def packed(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive; the same entries give the same bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name, (2014, 1, 1, 0, 0, 0))
            info.compress_type = method
            archive.writestr(info, content)
    return out.getvalue()


def photo_name(split: str, number: int) -> str:
    return f"COCO_{split}2014_{number:012d}.jpg"


def stock(
    server: Server,
    counts: dict[str, int] = SPLITS,
    make: Callable[[int], bytes] = photo,
    words: int = 8,
) -> dict[str, bytes]:
    """Serve a made-up COCO as its host does; returns the files of an unshrunk download."""
    files: dict[str, bytes] = {}
    tables: dict[str, bytes] = {}
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        names = [photo_name(split, number) for number in range(1, count + 1)]
        photos = {f"{split}2014/{n}": make(i) for i, n in enumerate(names)}
        server.files[f"/zips/{split}2014.zip"] = packed({f"{split}2014/": b"", **photos})
        files |= photos
        images = [{"id": i, "file_name": name} for i, name in enumerate(names, start=1)]
        captions = [
            {"id": 10 * i, "image_id": i, "caption": rng.bytes(words).hex()}
            for i in range(1, count + 1)
        ]
        captioned = json.dumps({"images": images, "annotations": captions}).encode()
        tables[f"annotations/captions_{split}2014.json"] = captioned
        tables[f"annotations/instances_{split}2014.json"] = json.dumps({"images": images}).encode()
        tables[f"annotations/person_keypoints_{split}2014.json"] = b"{}"
    server.files["/annotations/annotations_trainval2014.zip"] = packed(tables, zipfile.ZIP_DEFLATED)
    return files | {name: text for name, text in tables.items() if "keypoints" not in name}


def found(folder: Path) -> dict[str, bytes]:
    """Content of every file below ``folder``, the lock aside."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".download.lock"
    }


def fetch(server: Server, folder: Path, **options: Any) -> Path:
    """Download the made-up COCO in this process."""
    return download_coco(folder, source=server.address, patience=QUICK, **options)
