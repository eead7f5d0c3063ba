"""An OpenAI-compatible server whose times are known, for `../client_parity.py`.

The model's name says how it answers: `content`, `reasoning` (half of the tokens are reasoning),
`late-usage` (the usage block comes 0.3 s after the last token) and `early-role` (the event with the
role comes at once). `python timed_server.py` prints its port. Every answer has `TOKENS` tokens, one
per event: the first after `FIRST_S`, the others every `BETWEEN_S`.
"""

import asyncio
import json
import sys
from typing import Any

TOKENS, FIRST_S, BETWEEN_S, LATE_S, PROMPT_TOKENS = 24, 0.4, 0.04, 0.3, 11
MODELS = ("content", "reasoning", "late-usage", "early-role")


def event(choices: list[Any], **more: Any) -> bytes:
    body = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return f"data: {json.dumps({**body, 'choices': choices, **more})}\n\n".encode()


def delta(finish: str | None = None, **fields: str) -> bytes:
    return event([{"index": 0, "delta": fields, "finish_reason": finish}])


async def answer(writer: asyncio.StreamWriter, model: str) -> None:
    """One answer; the events are on an absolute schedule, so that no delay adds up."""
    loop = asyncio.get_running_loop()
    started = loop.time()

    def put(data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
    writer.write(b"transfer-encoding: chunked\r\n\r\n")
    if model == "early-role":
        put(delta(role="assistant", content=""))
        await writer.drain()
    for number in range(TOKENS):
        await asyncio.sleep(started + FIRST_S + number * BETWEEN_S - loop.time())
        last = number == TOKENS - 1
        text = f"word{number} "
        is_reasoning = model == "reasoning" and number < TOKENS // 2
        fields = {"reasoning": text} if is_reasoning else {"content": text}
        if number == 0 and model != "early-role":
            fields["role"] = "assistant"
        put(delta("stop" if last else None, **fields))
        await writer.drain()
    if model == "late-usage":
        await asyncio.sleep(LATE_S)
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": TOKENS}
    put(event([], usage=usage | {"total_tokens": PROMPT_TOKENS + TOKENS}))
    put(b"data: [DONE]\n\n")
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = next(
                (
                    int(x.partition(":")[2])
                    for x in head.split("\r\n")
                    if x.startswith("content-length")
                ),
                0,
            )
            body = await reader.readexactly(length)
            if head.startswith("post /v1/chat/completions"):
                await answer(writer, json.loads(body)["model"])
                continue
            models = {"object": "list", "data": [{"id": m, "object": "model"} for m in MODELS]}
            status, data = (
                (200, models) if head.startswith(("get /v1/models", "get /health")) else (404, {})
            )
            text = json.dumps(data).encode()
            writer.write(
                f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n"
                f"content-length: {len(text)}\r\n\r\n".encode()
                + text
            )
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(0)
