"""A chat endpoint on loopback that speaks the protocol and misbehaves, and texts that it translates."""

import contextlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler

from tests.loopback import Loopback, Quiet

SENTENCES = (
    "The garden behind the old house is full of red apples in the autumn.",
    "Most travellers prefer the slow train along the river to the motorway.",
    "A careful cook tastes the soup twice before adding any more salt to it.",
    "Scientists measured the depth of the lake with a rope and a heavy stone.",
)
FRENCH = (
    "Le jardin derrière la vieille maison est plein de pommes rouges en automne.",
    "La plupart des voyageurs préfèrent le train lent le long de la rivière.",
    "Un cuisinier prudent goûte la soupe deux fois avant d'ajouter du sel.",
    "Les scientifiques ont mesuré la profondeur du lac avec une corde.",
)


def original(number: int, side: str) -> str:
    return f"{SENTENCES[number % 4]} It was number {number} of the {side} answers, no more and no less."


def rows(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"p{n}", "chosen": original(n, "chosen"), "rejected": original(n, "rejected")}
        for n in range(count)
    ]


def translated(text: str) -> str:
    number = SENTENCES.index(next(sentence for sentence in SENTENCES if sentence in text))
    tail = text.rsplit("number ", 1)[1].split(" ")[0] + " " + ("bonnes" if "chosen" in text else "mauvaises")
    return f"{FRENCH[number]} C'était la réponse numéro {tail}, ni plus ni moins, et voilà tout ce qu'il y a à dire."


class Endpoint(Loopback):
    """A chat endpoint. `acts[text]` are what it does on the first requests for a text; then it answers well.

    It charges once for each idempotency key, as an endpoint does that knows them.
    """

    def __init__(self) -> None:
        self.acts: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.charged: set[str] = set()
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(Quiet):
            def do_POST(self) -> None:
                outer.serve(self)

        super().__init__(Handler)
        self.url += "/v1"

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        asked = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        text = asked["messages"][0]["content"].partition("Text:\n")[2].strip()
        with self.lock:
            self.requests[text] += 1
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
            act = self.acts[text].pop(0) if self.acts.get(text) else "answer"
        try:
            self.act(handler, act, text)
        finally:
            with self.lock:
                self.busy -= 1

    def act(self, handler: BaseHTTPRequestHandler, act: str, text: str) -> None:
        if act in ("429", "400", "401", "500"):
            handler.send_response(int(act))
            if act == "429":
                handler.send_header("Retry-After", "0.1")
            body = json.dumps({"error": {"message": f"said {act}", "code": "some_code"}}).encode()
        else:
            key = handler.headers["Idempotency-Key"]
            with self.lock:
                if key not in self.charged:
                    self.charged.add(key)
                    self.paid[text] += 1
            if act == "time out":
                time.sleep(4)
            handler.send_response(200)
            body = self.completion(act, text, key)
        if act == "truncated":
            body = body[: len(body) // 2]
        # A client that waits no longer has hung up.
        with contextlib.suppress(ConnectionError):
            self.send(handler, body, broken=act == "broken off")

    @staticmethod
    def send(handler: BaseHTTPRequestHandler, body: bytes, *, broken: bool) -> None:
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body) + (100 if broken else 0)))
        handler.end_headers()
        handler.close_connection = broken
        handler.wfile.write(body)

    def completion(self, act: str, text: str, key: str) -> bytes:
        said = {
            "refusal": "I'm sorry, but I can't help with that request, whatever it may be about.",
            "cut": translated(text)[:60],
            "english": "Behind an ancient building lies an orchard whose trees bear plenty of fruit, so it goes on.",
            "empty": "",
            "another's": translated(original(0, "chosen")),
        }.get(act, translated(text))
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": said},
            "finish_reason": "length" if act == "cut" else "stop",
        }
        identity = (
            f"id of {original(0, 'chosen')}" if said == translated(original(0, "chosen")) else f"id {key}"
        )
        body = {
            "id": identity,
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [] if act == "no choices" else [choice],
            "usage": {"prompt_tokens": 200, "completion_tokens": 50, "total_tokens": 250},
        }
        return json.dumps(body).encode()
