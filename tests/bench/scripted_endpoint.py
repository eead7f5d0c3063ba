"""An OpenAI-compatible endpoint in its own process; each question says how it fails.

A question may contain `script:A,B,C`, the behaviour for its first, second, ... attempt (the last
repeats), and `say:TEXT;`, the answer. `python scripted_endpoint.py [--delay S]` prints its port;
GET /log returns the requests. The step `hang` answers after GET /release. With `--loading S` it
answers 503 for S seconds after the first request. With `--models` its answers carry a model
digest, `model-1` until a step `swap` and then `model-2` and so on; the step `model` answers with
the digest.
"""

import argparse
import asyncio
import json
import re
import time
from collections import Counter
from typing import Any

ATTEMPTS: Counter[str] = Counter()
LISTED: Counter[str] = Counter()
LOG: list[dict[str, Any]] = []
OPEN = {"now": 0, "most": 0}
MODEL = {"number": 0}
LOADING = {"seconds": 0.0, "until": 0.0}
RELEASED = asyncio.Event()


def digest() -> str:
    return f"model-{MODEL['number']}" if MODEL["number"] else ""


def event(data: Any) -> bytes:
    # Some servers do not escape non-ASCII text, so Unicode line separators are sent as they are.
    text = json.dumps(data, ensure_ascii=False)
    if not text.isprintable() and re.search("[\ud800-\udfff]", text):
        text = json.dumps(data)
    return f"data: {text}\n\n".encode()


def chunk(text: str | None, *, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}
    return event({"object": "chat.completion.chunk", "choices": [choice], **more})


CANNED = {
    "badjson": (b"data: {not json\n\n", "text/event-stream"),
    "cut": (chunk("half an"), "text/event-stream"),
    # A last event without its blank line, and a charset that server-sent events never have.
    "unterminated": (
        chunk("é") + b"id: 1\n\n: ping\n\ndata: [DONE]\n",
        "text/event-stream; charset=latin-1",
    ),
    "errorevent": (event({"error": {"message": "overloaded"}}), "text/event-stream"),
    "html": (b"<html>gateway</html>", "text/html"),
    "owncode": (b'{"code": 500, "msg": "no quota"}', "application/json"),
    "ownevent": (b"event: error\n" + event({"message": "no quota"}), "text/event-stream"),
    "plainerror": (b'{"error": {"message": "no quota"}}', "text/event-stream"),
    "nochoices": (b'{"object": "list", "data": []}', "application/json"),
    "nochoiceevents": (event({"choices": []}) + b"data: [DONE]\n\n", "text/event-stream"),
    "nested": (b"data: " + b"[" * 100_000 + b"\n\n", "text/event-stream"),
    "digits": (b'{"choices": [], "n": ' + b"1" * 9_999 + b"}", "application/json"),
    "badgzip": (b"no gzip", "application/json\r\ncontent-encoding: gzip"),
}


def whole(choice: dict[str, Any]) -> tuple[bytes, str]:
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    return json.dumps({"choices": [choice], "usage": usage}).encode(), "application/json"


def message(content: Any, *, finish: Any = "stop", **more: Any) -> tuple[bytes, str]:
    return whole(
        {"message": {"role": "assistant", "content": content, **more}, "finish_reason": finish}
    )


CANNED |= {
    "parts": message(
        [
            {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
            {"type": "text", "text": "yes"},
        ]
    ),
    "partevents": (
        event({"choices": [{"delta": {"content": [{"type": "text", "text": "ye"}]}}]})
        + event({"choices": [{"delta": {"content": ["s"]}, "finish_reason": "stop"}]}),
        "text/event-stream",
    ),
    "mark": (b"\xef\xbb\xbf" + chunk("yes", finish="stop"), "text/event-stream"),
    "untyped": (chunk("ye") + chunk("s", finish="stop"), "text/plain"),
    "wholeevent": (
        event({"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}),
        "text/event-stream",
    ),
    "wholepart": message({"type": "text", "text": "yes"}),
    "twochoices": (
        event({"choices": [{"index": 1, "delta": {"content": "ye"}}]})
        + event({"choices": [{"index": 0, "delta": {"content": "no"}, "finish_reason": "stop"}]})
        + event({"choices": [{"index": 1, "delta": {"content": "s"}, "finish_reason": "stop"}]})
        + b"data: [DONE] \n\n",
        "text/event-stream",
    ),
    "halves": (chunk("\ud83d") + chunk("\ude00", finish="stop"), "text/event-stream"),
    "empty": message(""),
    "null": message(None),
    "length": message(None, finish="length", reasoning="endless"),
    "lengthevents": (chunk(None, finish="length"), "text/event-stream"),
    "filter": message("Half of", finish="content_filter"),
    "filterevents": (chunk("Half") + chunk(None, finish="content_filter"), "text/event-stream"),
    "refusal": message(None, refusal="I cannot help with that."),
    "refusalevents": (
        event({"choices": [{"delta": {"refusal": "I cannot"}, "finish_reason": "stop"}]}),
        "text/event-stream",
    ),
    "finishrefusal": message("", finish="refusal"),
    "tools": message(None, finish="tool_calls", tool_calls=[{"id": "1"}]),
    "finisherror": message("half", finish="error"),
    "halferror": whole({"error": {"message": "half \ud83d"}}),
    "halffinish": message("yes", finish="st\ud83dop"),
    "choiceerror": whole({"error": {"code": 502, "message": "provider fell over"}}),
    "choiceerrorevents": (
        chunk("half") + event({"choices": [{"error": {"message": "fell over"}, "delta": {}}]}),
        "text/event-stream",
    ),
    "nulldelta": (
        event({"choices": [{"delta": None}]})
        + event({"choices": None, "usage": {"prompt_tokens": 1}})
        + event({"choices": [{"delta": {"content": "yes"}, "finish_reason": 7}]}),
        "text/event-stream",
    ),
}


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float):
        self.reader, self.writer, self.delay = reader, writer, delay

    async def serve(self) -> None:
        while request := await self.request():
            if not await self.answer(*request):
                break
        self.writer.close()

    async def request(self) -> tuple[str, dict[str, str], bytes] | None:
        try:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head.split("\r\n")
        headers = {k.lower(): v for k, _, v in (x.partition(": ") for x in lines if x)}
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return first, headers, body

    def send(self, status: int, body: bytes, *, kind: str = "application/json", more: str = ""):
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
        self.writer.write(f"{head}{more}\r\n".encode() + body)

    async def answer(self, first: str, headers: dict[str, str], body: bytes) -> bool:
        if first.startswith("GET /log"):
            answer = {"log": LOG, "most_open": OPEN["most"], "listed": LISTED["models"]}
            self.send(200, json.dumps(answer).encode())
            return True
        if first.startswith("GET /release"):
            RELEASED.set()
            self.send(200, b"{}")
            return True
        if LOADING["seconds"]:
            LOADING["until"] = LOADING["until"] or time.monotonic() + LOADING["seconds"]
            if time.monotonic() < LOADING["until"]:
                self.send(503, b'{"error": {"message": "the models are loading"}}')
                return True
        if first.startswith("GET /v1/models"):
            LISTED["models"] += 1
            base = {"name": "b", "source": "hub/b", "sha256": "cafe", "run": None}
            reward = {"name": "reward/current", "source": "runs/dpo-7/model", "sha256": "feed"}
            reward["run"] = "dpo-7"
            ours = {"id": "ours", "object": "model", "base": base, "reward": reward}
            of_vllm = {"id": "v", "object": "model", "root": "/models/v"}
            models = [ours, {"id": "m", "object": "model", "digest": digest()}, of_vllm]
            self.send(200, json.dumps({"object": "list", "data": models}).encode())
            return True
        if first.startswith("GET "):
            self.send(404, b"{}")
            return True
        wanted = json.loads(body)
        content = wanted["messages"][0]["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        text = next(part["text"] for part in parts if part["type"] == "text")
        images = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        LOG.append(
            {
                "text": text, "images": [url[:40] for url in images], "at": time.monotonic(),
                "key": headers.get("authorization"),
                **{k: v for k, v in wanted.items() if k != "messages"},
            }
        )  # fmt: skip
        script = re.search(r"script:(\S+)", text)
        steps = script[1].split(",") if script else ["ok"]
        step = steps[min(ATTEMPTS[text], len(steps) - 1)]
        ATTEMPTS[text] += 1
        said = re.search(r"say:(.*?);", text)
        OPEN["now"] += 1
        OPEN["most"] = max(OPEN.values())
        try:
            words = self.words(step, said[1] if said else "yes", wanted)
            return await self.act(step, words, wanted, headers)
        finally:
            OPEN["now"] -= 1

    def words(self, step: str, said: str, wanted: Any) -> str:
        if step in ("swap", "model"):
            MODEL["number"] += step == "swap"
            return digest()
        if step == "byweight":
            guided = wanted.get("guidance_weight") or wanted.get("guidance_weights")
            return "y" if guided else "x"
        return said

    async def act(self, step: str, said: str, wanted: Any, headers: dict[str, str]) -> bool:
        if step.isdecimal():
            message = {"error": {"message": f"no, not with {headers.get('authorization')}"}}
            more = {"429": "retry-after: 1\r\n", "503": "retry-after: 3600\r\n"}.get(step, "")
            self.send(int(step), json.dumps(message).encode(), more=more)
        elif step in ("reasoning", "reasoning_content", "think"):
            await self.reason(step, said)
        elif refused := self.refusal(step, wanted):
            self.send(*refused[:2], more=refused[2])
        elif step == "old":
            if "stream_options" in wanted:
                self.send(400, b'{"error": {"message": "unknown field stream_options"}}')
            else:
                await self.stream(said, usage=False)
        elif step in CANNED:
            body, kind = CANNED[step]
            self.send(200, body, kind=kind)
        elif step == "whole":
            usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
            choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            self.send(200, json.dumps({"choices": [choice], "usage": usage}).encode())
        elif step == "hang":
            await RELEASED.wait()
            await self.stream(said)
        elif step == "drop":
            return False
        elif step == "slow":
            await self.stream(said, delay=0.5)
        elif step == "broken":
            await self.stream(said, broken=True)
            return False
        else:
            await self.stream(said)
        await self.writer.drain()
        return True

    async def reason(self, field: str, said: str) -> None:
        """Three pieces of reasoning, 0.15 s each, then the answer; the usage block is late."""
        self.writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
        self.writer.write(b"connection: close\r\n\r\n")
        texts = ["<think>one ", "two ", "three</think>\n"] if field == "think" else ["one "] * 3
        name = "content" if field == "think" else field
        for text in texts:
            await asyncio.sleep(0.15)
            self.writer.write(event({"choices": [{"index": 0, "delta": {name: text}}]}))
        await asyncio.sleep(0.15)
        self.writer.write(chunk(said, finish="stop"))
        await asyncio.sleep(0.3)
        usage = {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}
        self.writer.write(event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        await self.writer.drain()
        self.writer.close()

    def refusal(self, step: str, wanted: Any) -> tuple[int, bytes, str] | None:
        """(status, body, headers) of a request that is refused; None if this one is not."""
        name = step.partition("=")[2]
        if step.startswith("refuse=") and name in wanted:
            text = f"Unsupported parameter: '{name}' is not supported with this model."
            error = {"message": text, "param": name, "code": "unsupported_parameter"}
            return 400, json.dumps({"error": error}).encode(), ""
        if step == "moved":
            return 308, b"", "location: https://other.test/v1/chat/completions\r\n"
        if step == "toolong":
            text = "maximum context length is 10 tokens, reduce the prompt or max_tokens"
            return 400, json.dumps({"error": {"message": text}}).encode(), ""
        return (429, b"{}", "retry-after: 0.6\r\n") if step == "later" else None

    async def stream(
        self, said: str, *, delay: float | None = None, broken: bool = False, usage: bool = True
    ) -> None:
        write = self.writer.write
        write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
        if digest():
            write(f"x-tita-model-digest: {digest()}\r\n".encode())
        write(b"transfer-encoding: chunked\r\n\r\n")

        def put(data: bytes) -> None:
            write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

        await asyncio.sleep(self.delay if delay is None else delay)
        words = re.findall(r"\S+\s*", said)
        put(event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
        for word in words:
            put(chunk(word))
            await self.writer.drain()
            if delay:
                await asyncio.sleep(delay / 5)
            if broken:
                return
        put(chunk(None, finish="stop"))
        if usage:
            counts = {"prompt_tokens": 10, "completion_tokens": len(words)}
            total = {"total_tokens": 10 + len(words), "changed_tokens": 1}
            put(event({"choices": [], "usage": counts | total}))
        put(b"data: [DONE]\n\n")
        write(b"0\r\n\r\n")


async def main(delay: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await Connection(reader, writer, delay).serve()
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=1 << 26, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--loading", type=float, default=0.0)
    parser.add_argument("--models", action="store_true")
    arguments = parser.parse_args()
    LOADING["seconds"] = arguments.loading
    MODEL["number"] = int(arguments.models)
    asyncio.run(main(arguments.delay))
