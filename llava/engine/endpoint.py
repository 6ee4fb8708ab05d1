"""The engine that asks a server with an OpenAI-compatible API, such as the one `llava serve` starts.

The server holds the model: prompt template, batching, caches and the reducer are its own. What is sent is the
conversation, the pictures as `data:` URLs, how to sample, and a request's reducer where it names one.
"""

import asyncio
import base64
import contextlib
import io
import os
import time
from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.engine.requests import Answer, ImageSource, Request, Timing, texts_of
from llava.errors import UserError
from llava.mm_utils import get_model_name_from_path, load_image, load_image_from_base64

if TYPE_CHECKING:  # it takes a second to import, and a local engine needs none
    import openai

RETRIES = 9
"""Pauses of 0.5, 1, 2, 4, 8, 8 ... seconds: 45 in all, in which a small server has started again."""

OF_ALL = (401, 403, 404)
"""Status of what is wrong with every request: the key, the address, the model."""


class Model(msgspec.Struct):
    id: str


class Models(msgspec.Struct):
    """What a server's list of models holds."""

    data: list[Model]


class EndpointEngine:
    """A model behind an OpenAI-compatible API. An `Engine`, as `LocalEngine` is.

    Args:
        base_url: address of the API, up to and with `/v1`.
        model: what the server calls it; None: the only one it has.
        concurrency: requests in flight at a time.

    The key is OPENAI_API_KEY of the environment, if any.

    Raises:
        UserError: the server cannot be reached, refuses the key, or has no such model.
    """

    def __init__(self, base_url: str, model: str | None = None, *, concurrency: int = 32):
        try:
            import openai
        except ImportError:
            raise UserError(
                "asking a server needs the openai package: pip install 'llava[endpoint]'"
            ) from None
        if concurrency < 1:
            raise UserError(f"--concurrency {concurrency}: give 1 or more.")
        self.base_url, self.concurrency, self._openai = base_url, concurrency, openai
        key = os.environ.get("OPENAI_API_KEY") or "none"  # the client insists on one
        self._options: dict[str, Any] = {"base_url": base_url, "api_key": key}
        try:
            with openai.OpenAI(**self._options) as client:
                found = msgspec.convert(client.get("/models", cast_to=object), Models)
        except openai.OpenAIError as error:
            raise UserError(self._problem(error)) from error
        except msgspec.ValidationError as error:
            raise UserError(f"{base_url}/models lists no models ({error}): check the address.") from error
        names = [one.id for one in found.data]
        if model not in names and (model or len(names) != 1):
            raise UserError(f"{base_url} has the models {', '.join(names)}: choose one of them by --model.")
        self.model = model or names[0]

    @property
    def name(self) -> str:
        """The model's, as answers files call it."""
        return get_model_name_from_path(self.model)

    def answer(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """One answer per request, in the order in which they come. What is wrong with one is its answer's
        `problem`.

        Raises:
            UserError: the server can no longer be reached; answers that were given are not affected.
        """
        todo = iter(requests)
        running: set[asyncio.Task[Answer | UserError]] = set()

        async def next_done(client: "openai.AsyncOpenAI") -> set[asyncio.Task[Answer | UserError]]:
            for request in islice(todo, self.concurrency - len(running)):
                running.add(asyncio.create_task(self._ask(client, request)))
            if not running:
                return set()
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            running.difference_update(done)
            return done

        # The loop runs only while this generator is asked for more; closing the runner cancels what is left.
        with asyncio.Runner() as runner:
            client = self._openai.AsyncOpenAI(**self._options, max_retries=RETRIES)
            try:
                while done := runner.run(next_done(client)):
                    for task in done:
                        found = task.result()
                        if isinstance(found, UserError):
                            raise found
                        yield found
            finally:
                runner.run(client.close())

    async def _ask(self, client: "openai.AsyncOpenAI", request: Request) -> Answer | UserError:
        """The error is returned: raised in a task that nobody waits for any more, it would be printed."""
        try:
            reply = await client.chat.completions.create(**self._body(request))
        except UserError as error:
            return Answer(request.id, problem=str(error))
        except self._openai.OpenAIError as error:
            return self._failure(request, error)
        if not reply.choices:
            return Answer(request.id, problem=f"the server replies without an answer: {reply}")
        text = reply.choices[0].message.content or ""
        return Answer(request.id, text.strip(), visual_tokens(request, reply.usage))

    def stream(self, request: Request) -> Generator[str, None, Answer]:
        """The pieces of one answer as they come; returns the whole.

        Where the generator is closed before its end the connection is closed, which stops the server. Of the
        timing, `vision_ms` is 0: the server does not tell it apart from the rest before the first piece.
        """
        start = time.perf_counter()
        first, text, usage = 0.0, "", None
        try:
            with (
                self._openai.OpenAI(**self._options) as client,
                client.chat.completions.create(
                    **self._body(request), stream=True, stream_options={"include_usage": True}
                ) as chunks,
            ):
                for chunk in chunks:
                    usage = chunk.usage or usage
                    piece = "".join(choice.delta.content or "" for choice in chunk.choices)
                    if not text:
                        piece, first = piece.lstrip(), time.perf_counter()
                    text += piece
                    if piece:
                        yield piece
        except UserError as error:
            return Answer(request.id, problem=str(error))
        except self._openai.OpenAIError as error:
            failure = self._failure(request, error)
            if isinstance(failure, UserError):
                raise failure from error
            return failure
        timing = Timing(
            vision_ms=0.0,
            prefill_ms=1000 * (first - start),
            total_ms=1000 * (time.perf_counter() - start),
            new_tokens=usage.completion_tokens if usage else 0,
        )
        return Answer(request.id, text.strip(), visual_tokens(request, usage), timing=timing)

    def _body(self, request: Request) -> dict[str, Any]:
        """The request as the API takes it. UserError: its turns or a picture of it are at fault."""
        if request.num_beams != 1:
            raise UserError("a server has no beam search: num_beams is 1.")
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages(request)),
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
        }
        if request.temperature > 0:
            options = {"top_p": request.top_p, "seed": request.seed}
            body |= {name: value for name, value in options.items() if value is not None}
        if request.reducer is not None:
            # The question is for reducers that read it.
            asked = {"reducer": request.reducer, "question": request.question}
            body["extra_body"] = {"mm_processor_kwargs": asked}
        return body

    def _failure(self, request: Request, error: "openai.OpenAIError") -> Answer | UserError:
        """What an error means: this request has a problem, or no request can be answered."""
        problem = self._problem(error)
        unreachable = isinstance(error, self._openai.APIConnectionError)
        if unreachable or getattr(error, "status_code", 0) in OF_ALL:
            return UserError(problem)
        return Answer(request.id, problem=problem)

    def _problem(self, error: "openai.OpenAIError") -> str:
        openai, where = self._openai, f"the server at {self.base_url}"
        match error:
            case openai.APIConnectionError():
                return f"{where} does not answer ({error.__cause__ or error}): check that it runs there."
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                return f"{where} refuses the key ({said(error)}): set OPENAI_API_KEY."
            case openai.NotFoundError():
                return f"{where} answers {said(error)!r}: check the address, which ends in /v1, and --model."
            case openai.APIStatusError():
                return f"{where} answers {error.status_code}: {said(error)}"
        return f"{where}: {said(error)}"


def said(error: "openai.OpenAIError") -> str:
    """What a server said, without the JSON around it."""
    body = getattr(error, "body", None)
    return str(body["message"] if isinstance(body, dict) and "message" in body else error)


def messages(request: Request) -> Iterator[dict[str, Any]]:
    """The turns of a request as the API takes them.

    A picture is a part of its own in front of its turn's text, which is where LLaVA's have them and where
    `llava serve` puts its tag. Where a text has the tag elsewhere it stays, and that server obeys it.
    """
    images = iter(request.images)
    for place, text in enumerate(texts_of(request)):
        if place % 2:
            yield {"role": "assistant", "content": text}
            continue
        count = text.count(DEFAULT_IMAGE_TOKEN)
        parts = [{"type": "image_url", "image_url": {"url": data_url(one)}} for one in islice(images, count)]
        text = text.removeprefix(f"{DEFAULT_IMAGE_TOKEN}\n" * count)
        yield {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def data_url(image: ImageSource) -> str:
    """A picture as a `data:` URL: the very bytes of its file, or, of one that is no file, a PNG. (Not what
    LocalEngine made of one.)

    What is broken is found here, as by the local engine, whatever the server would do with it.

    Raises:
        UserError: it cannot be read.
    """
    source, data = str(image), b""
    if isinstance(image, Image.Image) or source.startswith(("http://", "https://")):
        picture = image if isinstance(image, Image.Image) else load_image(source)
        file = io.BytesIO()
        picture.save(file, "PNG")
        data = file.getvalue()
    elif source.startswith("data:"):
        load_image_from_base64(text := source.partition(",")[2])
        data = base64.b64decode(text)
    else:
        with contextlib.suppress(OSError):  # load_image says what it is
            data = Path(source).read_bytes()
        load_image(data or source, name=source)
    kind = Image.open(io.BytesIO(data)).get_format_mimetype()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def visual_tokens(request: Request, usage: Any) -> tuple[int, ...]:
    """Those of a request with one picture, if the server tells them: vLLM does with
    --enable-prompt-tokens-details, which `llava serve` sets. Else ()."""
    details = getattr(usage, "prompt_tokens_details", None)
    counts = getattr(details, "multimodal_tokens", None)
    return (counts["image"],) if counts and len(request.images) == 1 else ()
