"""OpenAI's chat API in front of a small language model, for any client of that API:

    mqserve run examples/chat.py

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="any")
    question = {"role": "user", "content": "What is a replica?"}
    for chunk in client.chat.completions.create(model="readme", messages=[question], stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)

The model has learned to write from mqserve's README, so do not believe what it says.
"""

import asyncio
import json
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import metadata
from typing import Any, Literal

import pydantic
from starlette.responses import JSONResponse, Response, StreamingResponse

import mqserve as serve

MODEL = "readme"
TOKEN_S = 0.02  # the time that a large model takes for a token


class LanguageModel:
    """Counts which token follows the two before it in a text, and writes by these counts."""

    START, END = "\n", ""
    TOKEN = re.compile(r" ?[\w'-]+| ?[^\w\s]")  # a word or a sign, with the space before it

    def __init__(self, page: str) -> None:
        """Learns from the prose of a page in Markdown."""
        self.followers: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        page = re.sub(r"(?ms)^```.*?^```$|^[#|<].*?$|^- ", "", page)  # code, headings, tables
        page = re.sub(r"\[([^]]+)\]\([^)]*\)|[*`]", r"\1", page)  # links
        for paragraph in filter(str.strip, page.split("\n\n")):
            tokens = [self.START, *self.tokens(paragraph), self.END]
            for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
                self.followers[before, token][after] += 1
                self.followers[token,][after] += 1
            self.followers[self.START,][tokens[1]] += 1

    def tokens(self, text: str) -> list[str]:
        return self.TOKEN.findall(" " + " ".join(text.split()))

    def write(self, prompt: list[str], temperature: float, chance: random.Random) -> Iterator[str]:
        """Yields tokens until a paragraph ends. The first one is the longest word of the prompt that the model knows."""
        known = [token for token in prompt if (token,) in self.followers]
        before = self.START
        token = max(known, key=len) if known else self._next((before,), temperature, chance)
        first = token.strip()
        yield first[:1].upper() + first[1:]
        while token := self._next((before, token), temperature, chance):
            yield token
            before = token

    def _next(self, context: tuple[str, ...], temperature: float, chance: random.Random) -> str:
        counts = self.followers[context if context in self.followers else context[-1:]]
        if temperature == 0:
            return counts.most_common(1)[0][0]
        most = max(counts.values())
        weights = [(count / most) ** (1 / temperature) for count in counts.values()]
        return chance.choices(list(counts), weights)[0]


class TextPart(pydantic.BaseModel):
    type: Literal["text"]
    text: str


class Message(pydantic.BaseModel):
    role: Literal["developer", "system", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(pydantic.BaseModel):
    include_usage: bool = False


class ChatRequest(pydantic.BaseModel, strict=True):
    """The parameters of OpenAI's API that this example knows. The others are ignored."""

    model: str
    messages: list[Message] = pydantic.Field(min_length=1)
    max_tokens: int = pydantic.Field(100, ge=1, le=1000, validation_alias=pydantic.AliasChoices("max_completion_tokens", "max_tokens"))
    n: Literal[1] = 1
    seed: int | None = None
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float = pydantic.Field(1, ge=0, le=2)


class Answer:
    """One answer: its text in pieces, as they are written, and afterwards how it ended."""

    def __init__(self, model: LanguageModel, chat: ChatRequest) -> None:
        prompt = [token for message in chat.messages for token in model.tokens(message.text)]
        self.written = model.write(prompt, chat.temperature, random.Random(chat.seed))
        self.max_tokens = chat.max_tokens
        self.stops = [stop for stop in ([chat.stop] if isinstance(chat.stop, str) else chat.stop) if stop]
        self.prompt_tokens = len(prompt)
        self.tokens = 0
        self.finish_reason = "stop"

    async def pieces(self) -> AsyncIterator[str]:
        """Yields the text up to a stop sequence. What may be the beginning of one is held back until it is known."""
        text, shown = "", 0
        held = max(map(len, self.stops), default=1) - 1
        for token in self.written:
            if self.tokens == self.max_tokens:
                self.finish_reason = "length"
                break
            await asyncio.sleep(TOKEN_S)
            self.tokens += 1
            text += token
            if ends := [at for stop in self.stops if (at := text.find(stop, shown)) >= 0]:
                text = text[: min(ends)]
                break
            if len(text) - held > shown:
                yield text[shown : len(text) - held]
                shown = len(text) - held
        if text[shown:]:
            yield text[shown:]

    @property
    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": total}


@serve.endpoint("/v1/{path:path}")
class Chat:
    """Trained once per replica, in the constructor."""

    def __init__(self) -> None:
        self.model = LanguageModel(metadata("mqserve")["Description"])
        self.card = {"id": MODEL, "object": "model", "created": int(time.time()), "owned_by": "mqserve"}

    async def __call__(self, request: serve.Request) -> Response | dict[str, Any]:
        match request.method, request.path_params["path"].split("/"):
            case "POST", ["chat", "completions"]:
                return await self.complete(request)
            case "GET", ["models"]:
                return {"object": "list", "data": [self.card]}
            case "GET", ["models", name]:
                return self.card if name == MODEL else no_model(name)
        return refusal(404, f"there is no {request.method} {request.url.path}", code="unknown_url")

    async def complete(self, request: serve.Request) -> Response | dict[str, Any]:
        try:
            sent = request.data
            given = {name: value for name, value in sent.items() if value is not None} if isinstance(sent, dict) else sent
            chat = ChatRequest.model_validate(given)
        except serve.BadBody as error:
            return refusal(400, str(error))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            return refusal(400, first["msg"], param=".".join(map(str, first["loc"])) or None)
        if chat.model != MODEL:
            return no_model(chat.model)
        answer = Answer(self.model, chat)
        facts = {"id": f"chatcmpl-{request.id}", "created": int(time.time()), "model": MODEL}
        if chat.stream:
            events = self.events(answer, facts | {"object": "chat.completion.chunk"}, chat.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        message = {"role": "assistant", "content": "".join([piece async for piece in answer.pieces()])}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
        return facts | {"object": "chat.completion", "choices": [choice], "usage": answer.usage}

    async def events(self, answer: Answer, facts: dict[str, Any], include_usage: bool) -> AsyncIterator[str]:
        """Yields server-sent events, one for each piece, as OpenAI does."""
        unused = {"usage": None} if include_usage else {}

        def event(delta: dict[str, str], finish_reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
            return f"data: {json.dumps(facts | {'choices': [choice]} | unused)}\n\n"

        yield event({"role": "assistant", "content": ""})
        async for piece in answer.pieces():
            yield event({"content": piece})
        yield event({}, answer.finish_reason)
        if include_usage:
            yield f"data: {json.dumps(facts | {'choices': [], 'usage': answer.usage})}\n\n"
        yield "data: [DONE]\n\n"


def no_model(name: str) -> Response:
    return refusal(404, f"there is no model {name!r}: ask for {MODEL!r}", param="model", code="model_not_found")


def refusal(status: int, message: str, *, param: str | None = None, code: str | None = None) -> Response:
    """An error in the shape of OpenAI's, which its clients raise as exceptions of their own."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status)
