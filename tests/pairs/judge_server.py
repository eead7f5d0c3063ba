"""A judge behind OpenAI's chat completions API, as a process: `python judge_server.py LOG`.

Asked a plain question it answers with the score of that. Else it scores an answer by its
digest, and replies with prose to questions about a number. Every request fails with the status in
the file `LOG.status`, if there is one. Each request is a line of LOG. With a file `LOG.digest` it
names its model by that digest as `tita serve` does.
"""

import base64
import hashlib
import io
import json
import re
import sys
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

LOG = Path(sys.argv[1]) if __name__ == "__main__" else Path()


def score(answer: str) -> int:
    """From 2 to 9."""
    return 2 + zlib.crc32(answer.encode()) % 8


class Judge(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def digest(self) -> str:
        file = Path(f"{LOG}.digest")
        return file.read_text() if file.exists() else ""

    def do_GET(self) -> None:
        entry = {"id": "j", "object": "model", "created": 1, "owned_by": "x", "root": "/models/j"}
        listed = {"object": "list", "data": [entry | {"digest": self.digest}]}
        self.reply(200 if self.digest else 404, listed)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        image, text = (part for part in body["messages"][0]["content"])
        data = base64.b64decode(image["image_url"]["url"].partition("base64,")[2])
        scores = "Question: " in text["text"]
        question = text["text"].partition("Question: ")[2].partition("\n")[0] or text["text"]
        answers = re.findall(r"Answer \d+: (.*)", text["text"])
        entry = {
            "key": self.headers["authorization"],
            "model": body["model"],
            "digest": hashlib.sha256(data).hexdigest(),
            "size": Image.open(io.BytesIO(data)).size,
            "question": question,
            "answers": answers,
            "guidance_form": body.get("guidance_form"),
        }
        with LOG.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        status = Path(f"{LOG}.status")
        if status.exists():
            self.reply(int(status.read_text()), {"error": {"message": f"no {entry['key']}"}})
            return
        content = json.dumps({"scores": [score(answer) for answer in answers]})
        if "number" in question:
            content = "All answers are equally good."
        content = f"Here it is: {content}" if scores else f"a {score(question)}"
        message = {"role": "assistant", "content": content}
        usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        common = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]}
        self.reply(200, common | {"choices": [choice], "usage": usage})

    def reply(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if self.digest:
            self.send_header("x-tita-model-digest", self.digest)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    print(server.server_port, flush=True)
    server.serve_forever()
