"""A server as the engine: what it is sent, what comes back, and what becomes of its failures.

The server is a small one of our own (`Server`), which answers yes or no by a rule that the tests know too.
"""

import base64
import hashlib
import io
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from llava import cli
from llava.engine import EndpointEngine, Request, endpoint, finish
from llava.errors import UserError
from llava.mini.benchmarks import generate

KEY = "of-the-tests"


def rule(text: str, *pictures: bytes) -> str:
    """The answer to a question, by all its words and every byte of its pictures."""
    return "Yes" if hashlib.sha256(b"".join([text.encode(), *pictures])).digest()[0] % 2 else "No"


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server with one model, `small`.

    Attributes:
        bodies: of the chat requests that came, in their order.
        fault: called with each body's number; a status (with which it is answered), "drop" (the connection is
            closed), "die" (the whole server is gone), None (it is answered).
        together: where set, requests wait until as many are there.
    """

    daemon_threads = True
    request_queue_size = 100

    def __init__(self, port: int = 0, *, counts: bool = True):
        super().__init__(("127.0.0.1", port), Handler)
        self.counts, self.bodies = counts, []
        self.fault, self.together, self.lock = (lambda number: None), None, threading.Lock()
        self.running = self.most = 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A client that has left is no error here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_) -> None:
        pass

    def reply(self, status: int, content: dict | str) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After-Ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, message: str) -> None:
        self.reply(status, {"error": {"message": message, "code": status}})

    def do_GET(self) -> None:
        if self.headers["Authorization"] != f"Bearer {KEY}":
            return self.refuse(401, "no such key")
        if self.path == "/page/models":
            return self.reply(200, "no API here")
        if self.path != "/v1/models":
            return self.refuse(404, f"no page {self.path}")
        self.reply(
            200,
            {"object": "list", "data": [{"id": "small", "object": "model", "created": 0, "owned_by": "us"}]},
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.running += 1
            server.most = max(server.most, server.running)
        if server.together:
            server.together.wait(timeout=120)
        with server.lock:
            server.running -= 1
        match server.fault(number):
            case int(status):
                self.refuse(status, f"this is a {status}")
            case "drop" | "die" as how:
                if how == "die":
                    server.close()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            case None:
                self.answer(body)

    def answer(self, body: dict) -> None:
        parts = body["messages"][-1]["content"]
        text, pictures = parts[-1]["text"], [one["image_url"]["url"] for one in parts[:-1]]
        said = rule(text, *[base64.b64decode(url.partition("base64,")[2]) for url in pictures])
        usage = {"prompt_tokens": 99, "completion_tokens": 2, "total_tokens": 101}
        if self.server.counts and pictures:
            usage["prompt_tokens_details"] = {"multimodal_tokens": {"image": 7 * len(pictures)}}
        if not body.get("stream"):
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": f" {said} "},
            }
            return self.reply(
                200,
                {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": "small",
                    "choices": [choice],
                    "usage": usage,
                },
            )
        chunks = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in (" ", *said)]
        chunks.append({"choices": [], "usage": usage})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for chunk in chunks:
            chunk |= {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "small"}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The small benchmarks: two pictures, 36 yes-no questions of POPE."""
    root = tmp_path_factory.mktemp("mini")
    generate(root, seed=0, number=2)
    return root


@pytest.fixture(scope="module")
def questions(root) -> list[dict]:
    return [json.loads(line) for line in (root / "pope/llava_pope_test.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pictures(root) -> list[Path]:
    return sorted((root / "pope/val2014").glob("*.jpg"))


# --- the engine ---


def test_no_more_requests_than_allowed_are_in_flight_and_no_fewer(server, pictures):
    server.together = threading.Barrier(4)  # fewer than four at once would wait for ever
    requests = [Request(id=n, text=f"{n}?", images=[pictures[n % 2]]) for n in range(12)]
    answers = list(EndpointEngine(server.url, concurrency=4).answer(requests))
    assert server.most == 4
    assert {one.id: one.text for one in answers} == {
        n: rule(f"{n}?", pictures[n % 2].read_bytes()) for n in range(12)
    }


def test_what_a_request_becomes(server, pictures, tmp_path):
    """Files travel byte for byte, other pictures as PNG; options only where they are set."""
    picture = Image.open(pictures[0]).convert("RGB")
    png = tmp_path / "a.png"
    picture.save(png)
    talk = [("user", "<image>\n<image>\nWhat?"), ("assistant", "A <cat>."), ("user", "In <image>?")]
    requests = [
        Request(
            messages=[{"role": r, "content": c} for r, c in talk], images=[png, picture, str(pictures[0])]
        ),
        Request(text="?", temperature=0.5, top_p=0.9, seed=3, max_new_tokens=7, reducer="prumerge"),
    ]
    engine = EndpointEngine(server.url, "small", concurrency=1)
    list(engine.answer(requests))
    first, second = server.bodies
    roles = [(turn["role"], [part["type"] for part in turn["content"]]) for turn in first["messages"][::2]]
    assert roles == [("user", ["image_url", "image_url", "text"]), ("user", ["image_url", "text"])]
    assert first["messages"][0]["content"][2]["text"] == "What?"
    assert first["messages"][1] == {"role": "assistant", "content": "A <cat>."}
    assert first["messages"][2]["content"][1]["text"] == "In <image>?"
    urls = [part["image_url"]["url"] for turn in first["messages"][::2] for part in turn["content"][:-1]]
    assert urls[0] == f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"
    assert urls[2] == f"data:image/jpeg;base64,{base64.b64encode(pictures[0].read_bytes()).decode()}"
    decoded = Image.open(io.BytesIO(base64.b64decode(urls[1].removeprefix("data:image/png;base64,"))))
    assert decoded.format == "PNG" and decoded.tobytes() == picture.tobytes()
    del first["messages"]
    assert first == {"model": "small", "temperature": 0.0, "max_tokens": 512}
    wanted = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "max_tokens": 7}
    assert wanted.items() <= second.items() and second["mm_processor_kwargs"]["reducer"] == "prumerge"


def test_a_stream_gives_pieces_and_the_whole(server, pictures):
    pieces: list[str] = []
    request = Request(id="a", text="Is it?", images=[pictures[1]])
    answer = finish(EndpointEngine(server.url).stream(request), pieces.append)
    assert answer.text == "".join(pieces) == rule("Is it?", pictures[1].read_bytes())
    assert len(pieces) == len(answer.text) and answer.visual_tokens == (7,)
    assert answer.timing.new_tokens == 2 and 0 < answer.timing.prefill_ms <= answer.timing.total_ms


@pytest.mark.parametrize("fault", [429, 500, 503, "drop"])
def test_what_fails_for_a_while_is_asked_again(server, fault):
    server.fault = lambda number: fault if number < 2 else None
    (answer,) = EndpointEngine(server.url).answer([Request(text="?")])
    assert answer.text == rule("?") and not answer.problem and len(server.bodies) == 3


def test_what_is_wrong_with_one_request_is_its_problem(server, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    torn, absent = tmp_path / "torn.jpg", tmp_path / "absent.jpg"
    torn.write_bytes(pictures[0].read_bytes()[:1000])
    images = {"fine": [], "torn": [torn], "absent": [absent], "refused": [], "sick": [], "two": pictures}
    faults = {"refused": 400, "sick": 500}
    server.fault = lambda number: faults.get(server.bodies[number]["messages"][0]["content"][-1]["text"])
    texts = {"two": "<image> only"}
    requests = [Request(id=n, text=texts.get(n, n), images=one) for n, one in images.items()]
    engine = EndpointEngine(server.url)
    found = {one.id: one for one in engine.answer(requests)}
    assert found["fine"].text == rule("fine") and not found["fine"].problem
    named = {
        "torn": "torn.jpg",
        "absent": "absent.jpg",
        "refused": "this is a 400",
        "sick": "500",
        "two": "2 pictures",
    }
    for name, what in named.items():
        assert what in found[name].problem and not found[name].text
    for request in requests[1:]:
        answer = finish(engine.stream(request))
        assert named[request.id] in answer.problem and not answer.text


@pytest.mark.parametrize("counts", [True, False])
def test_visual_tokens_are_told_where_the_server_counts_them(monkeypatch, pictures, counts):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Server(counts=counts)
    asked = [Request(id=n, text="?", images=pictures[:n]) for n in range(3)]
    answers = {one.id: one.visual_tokens for one in EndpointEngine(server.url).answer(asked)}
    server.close()
    assert answers == {0: (), 1: (7,) if counts else (), 2: ()}


def test_what_makes_every_request_fail_is_one_sentence(server, monkeypatch):
    for url, model, named in [
        (server.url, "large", "small"),
        (server.url.removesuffix("/v1"), None, "/v1"),
        (server.url.replace("/v1", "/page"), None, "/page"),
    ]:
        with pytest.raises(UserError, match=named):
            EndpointEngine(url, model)
    engine = EndpointEngine(server.url)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="OPENAI_API_KEY"):
        patch.setenv("OPENAI_API_KEY", "another")
        EndpointEngine(server.url)
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    for fault in (401, 404, "die"):
        server.fault = lambda number, fault=fault: fault
        with pytest.raises(UserError, match=server.url):
            list(engine.answer([Request(text="?")]))
    with pytest.raises(UserError, match=server.url):
        EndpointEngine(server.url)


# --- chat ---


def test_chat_with_a_server(server, pictures, capsys, monkeypatch):
    """The pictures of the first turn come with every turn; a reducer begins a new conversation."""
    lines = ["What?", "Why?", "/reducer prumerge", "And?", "", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert cli.main(["chat", "--endpoint", server.url, "--image-file", str(pictures[0])]) == 0
    seen = [rule("What?", pictures[0].read_bytes()), rule("Why?"), rule("And?", pictures[0].read_bytes())]
    out, err = capsys.readouterr()
    assert out.split() == seen and "7 visual tokens; prefill" in err
    first, second, third = server.bodies
    assert second["messages"][:2] == [*first["messages"], {"role": "assistant", "content": seen[0]}]
    assert third["messages"][0]["content"][0] == first["messages"][0]["content"][0]
    assert len(third["messages"]) == 1 and third["mm_processor_kwargs"]["reducer"] == "prumerge"


# --- evaluation ---


def command(server: Server, root: Path, *more: str) -> list[str]:
    return ["eval", "pope", "--endpoint", server.url, "--root", str(root), "--max-new-tokens", "4", *more]


def rows(answers: Path) -> list[dict]:
    return [json.loads(line) for line in answers.read_text().splitlines()]


def wanted(root: Path, questions: list[dict]) -> dict[int, str]:
    return {
        one["question_id"]: rule(one["text"], (root / "pope/val2014" / one["image"]).read_bytes())
        for one in questions
    }


def test_eval_asks_a_server_scores_and_resumes(server, root, questions, capsys, tmp_path):
    answers = tmp_path / "a.jsonl"
    argv = command(server, root, "--reducer", "prumerge", "--answers", str(answers))
    assert cli.main(argv) == 0
    assert "36 of 36" in (out := capsys.readouterr().out) and "POPE: f1 " in out
    assert {row["question_id"]: row["text"] for row in rows(answers)} == wanted(root, questions)
    assert {body["mm_processor_kwargs"]["reducer"] for body in server.bodies} == {"prumerge"}
    facts = json.loads((tmp_path / "a.provenance.json").read_text())
    assert facts["run"]["server"] == server.url and facts["run"]["model"] == "small"
    assert facts["run"]["reducer"] == "prumerge" and facts["summary"]["visual_tokens"]["mean"] == 7
    before = answers.read_bytes()
    assert cli.main(argv) == 0 and answers.read_bytes() == before and len(server.bodies) == 36
    assert cli.main(["report", str(tmp_path)]) == 0 and "| small | prumerge |" in capsys.readouterr().out
    assert cli.main(command(server, root, "--answers", str(answers))) == 2  # the server's own reducer
    assert "prumerge" in capsys.readouterr().err


def test_answers_of_a_server_and_of_a_model_here_have_different_default_names(server, root, capsys):
    assert cli.main(command(server, root, "--reducer", "prumerge", "--limit", "2")) == 0
    name = f"small@127.0.0.1-{server.server_port}-prumerge.jsonl"  # of a model here: small-prumerge.jsonl
    assert len(rows(root / "pope/answers" / name)) == 2


def test_a_server_that_dies_midway_and_comes_back_loses_and_doubles_nothing(
    server, root, questions, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    answers = tmp_path / "a.jsonl"
    argv = command(server, root, "--answers", str(answers), "--concurrency", "3")
    server.fault = lambda number: "die" if number >= 10 else None
    assert cli.main(argv) == 2
    assert server.url in capsys.readouterr().err
    before = rows(answers)
    assert 8 <= len(before) <= 10  # what had come when it died
    again = Server(server.server_port)
    assert cli.main(argv) == 0
    again.close()
    after = rows(answers)
    assert after[: len(before)] == before and len(again.bodies) == 36 - len(before)
    assert sorted(row["question_id"] for row in after) == sorted(wanted(root, questions))
    assert {row["question_id"]: row["text"] for row in after} == wanted(root, questions)
    assert json.loads((tmp_path / "a.provenance.json").read_text())["summary"]["images"] == 2


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--endpoint", "{url}", "--model-base", "b"], "--model-base"),
        (["--endpoint", "{url}", "--device", "cpu", "--workers", "2"], "--device, --workers"),
        (["--endpoint", "{url}", "--concurrency", "0"], "--concurrency"),
        (["--model-path", "p", "--model", "small"], "--endpoint"),
        (["--endpoint", "http://127.0.0.1:1/v1"], "http://127.0.0.1:1/v1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(server, root, capsys, flags, named):
    assert (
        cli.main(["eval", "pope", "--root", str(root), *(flag.format(url=server.url) for flag in flags)]) == 2
    )
    assert named in capsys.readouterr().err and not server.bodies
