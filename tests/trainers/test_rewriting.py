"""Rewriting against a server that speaks the protocol and misbehaves: nothing lost, nothing paid twice."""

import json
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from pyarrow import parquet

from tests.loopback import Loopback, Quiet
from trainers.command import command
from trainers.data import hygiene
from trainers.data.__main__ import Data, run
from trainers.data.journal import Answered, Journal
from trainers.data.rewriting import Spending, Terms, estimate
from trainers.data.rules import rewritten_by_rules
from trainers.data.sources import read_pairs
from trainers.errors import DataError, SpecError
from trainers.specs import DatasetSpec

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
        self.times: list[float] = []
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
            self.times.append(time.monotonic())
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
                handler.send_header("Retry-After", "0.3")
            body = json.dumps({"error": {"message": f"said {act}", "code": "some_code"}}).encode()
        else:
            key = handler.headers["Idempotency-Key"]
            with self.lock:
                if key not in self.charged:
                    self.charged.add(key)
                    self.paid[text] += 1
            if act == "time out":
                time.sleep(6)
            handler.send_response(200)
            body = self.completion(act, text, key)
        if act == "truncated":
            body = body[: len(body) // 2]
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body) + (100 if act == "broken off" else 0)))
        handler.end_headers()
        if act == "broken off":
            handler.close_connection = True
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


@pytest.fixture
def endpoint():
    server = Endpoint()
    yield server
    server.close()


@pytest.fixture
def rewrite(endpoint, tmp_path, monkeypatch, capsys):
    """Run the command on `count` pairs: its exit code and all it said."""

    def run_it(*words: object, count: int = 6) -> tuple[object, str]:
        data = tmp_path / "test.jsonl"
        rows = [
            {"prompt": f"p{n}", "chosen": original(n, "chosen"), "rejected": original(n, "rejected")}
            for n in range(count)
        ]
        data.write_text("\n".join(map(json.dumps, rows)))
        usual = {
            "--into": "french",
            "--endpoint": endpoint.url,
            "--model": "m",
            "--out": tmp_path / "out.parquet",
            "--timeout-s": "5",
            "--pause-s": "0.01",
        }
        pairs = [word for flag, value in usual.items() if flag not in words for word in (flag, value)]
        monkeypatch.setattr(sys, "argv", ["data", "rewrite", *map(str, (data, *pairs, *words))])
        code: object = 0
        try:
            command(Data, run, "trainers.data", models=False)
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run_it


def written(tmp_path: Path) -> list[dict[str, object]]:
    return parquet.read_table(tmp_path / "out.parquet").to_pylist()


def test_every_response_is_rewritten_and_paid_once(rewrite, endpoint, tmp_path):
    code, said = rewrite()
    assert code == 0, said
    rows = written(tmp_path)
    assert [row["orig_index"] for row in rows] == list(range(6))
    for n, row in enumerate(rows):
        assert row["chosen"] == translated(original(n, "chosen"))
        assert row["orig_rejected"] == original(n, "rejected")
    assert set(endpoint.paid.values()) == {1}
    assert "paid: 2,400 + 600 tokens" in said
    hygienic = [
        json.loads(line) for line in (tmp_path / "out.parquet.hygiene.jsonl").read_text().splitlines()
    ]
    assert len(hygienic) == 12
    assert {line["language"] for line in hygienic} == {"fr"}
    pairs = read_pairs(DatasetSpec(name="a", source=str(tmp_path / "out.parquet")), "test")
    assert pairs[0].original_chosen == original(0, "chosen")
    assert rewrite()[0] == 0
    assert endpoint.requests.total() == 12


PASSING = ("429", "500", "time out", "truncated", "broken off", "no choices")
UNUSABLE = ("refusal", "cut", "english", "empty", "another's")


def test_faults_that_pass_are_asked_again_and_paid_once(rewrite, endpoint, tmp_path):
    for number, act in enumerate(PASSING):
        endpoint.acts[original(number, "rejected")] = [act]
    code, said = rewrite("--concurrency", "3")
    assert code == 0, said
    assert len(written(tmp_path)) == 6
    assert [endpoint.requests[original(n, "rejected")] for n in range(6)] == [2] * 6
    assert set(endpoint.paid.values()) == {1}
    assert endpoint.most_busy <= 4  # the one that timed out is still served


def test_answers_that_are_no_rewritings_are_asked_for_anew(rewrite, endpoint, tmp_path):
    for number, act in enumerate(UNUSABLE, start=1):
        endpoint.acts[original(number, "chosen")] = [act]
    code, said = rewrite("--concurrency", "1")
    assert code == 0, said
    assert [row["chosen"] for row in written(tmp_path)] == [
        translated(original(n, "chosen")) for n in range(6)
    ]
    journal = Journal(tmp_path / "out.parquet.journal.jsonl")
    faults = [
        answer.fault
        for n in range(1, 6)
        for key in {
            a.key for a in journal.all() if a.text == translated(original(n, "chosen")) and not a.fault
        }
        for answer in journal.of(key)[:1]
    ]
    assert faults == ["refused", "cut off", "in en, not fr", "empty", "the answer to another request"]
    assert endpoint.requests.total() == 12 + len(UNUSABLE)


def test_what_never_comes_right_is_listed_and_the_rest_is_kept(rewrite, endpoint, tmp_path):
    endpoint.acts[original(2, "chosen")] = ["refusal"] * 9
    endpoint.acts[original(4, "rejected")] = ["400"] * 9
    code, said = rewrite("--attempts", "2")
    assert code == 3
    assert "2 responses have no usable rewriting (row 2, chosen: refused; row 4, rejected: declined" in said
    assert [row["orig_index"] for row in written(tmp_path)] == [0, 1, 3, 5]
    listed = [json.loads(line) for line in (tmp_path / "out.parquet.failures.jsonl").read_text().splitlines()]
    assert [(item["row"], item["side"]) for item in listed] == [(2, "chosen"), (4, "rejected")]
    assert endpoint.requests[original(2, "chosen")] == 2
    before = endpoint.paid.total()
    assert rewrite("--attempts", "2")[0] == 3
    assert endpoint.paid.total() == before
    endpoint.acts.clear()
    assert rewrite("--attempts", "3")[0] == 0
    assert endpoint.paid.total() == before + 2
    assert not (tmp_path / "out.parquet.failures.jsonl").exists()
    assert len(written(tmp_path)) == 6


def test_a_run_that_was_killed_goes_on_from_its_journal(rewrite, endpoint, tmp_path):
    rewrite()
    journal = tmp_path / "out.parquet.journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    endpoint.requests.clear()
    assert rewrite()[0] == 0
    assert endpoint.requests.total() == 7
    assert len(Journal(journal).all()) == 12


def test_an_answer_that_was_lost_on_the_way_is_not_paid_again_by_the_next_command(rewrite, endpoint):
    endpoint.acts[original(1, "chosen")] = ["time out"]
    code, said = rewrite("--tries", "1", count=2)
    assert code == 3
    assert "row 1, chosen: Request timed out" in said
    assert rewrite("--tries", "1", count=2)[0] == 0
    assert endpoint.requests[original(1, "chosen")] == 2
    assert set(endpoint.paid.values()) == {1}


def test_retry_after_holds_everybody(rewrite, endpoint):
    endpoint.acts[original(0, "chosen")] = ["429"]
    began = time.monotonic()
    assert rewrite("--concurrency", "1", count=2)[0] == 0
    assert endpoint.times[1] - endpoint.times[0] >= 0.29
    assert time.monotonic() - began < 60


def test_requests_keep_the_pace(rewrite, endpoint):
    assert rewrite("--requests-per-minute", "120", count=3)[0] == 0
    gaps = [later - earlier for earlier, later in zip(endpoint.times, endpoint.times[1:], strict=False)]
    # The first request may take longer on its way than the last one.
    assert sum(gaps) >= 0.5 * (len(gaps) - 1)


def test_a_wrong_key_ends_it_at_once(rewrite, endpoint):
    for n in range(6):
        endpoint.acts[original(n, "chosen")] = endpoint.acts[original(n, "rejected")] = ["401"] * 9
    code, said = rewrite("--concurrency", "2")
    assert code == 2
    assert "answered 401" in said
    assert "Traceback" not in said
    assert endpoint.requests.total() <= 2


def test_an_estimate_over_the_cap_starts_nothing(rewrite, endpoint):
    code, said = rewrite("--max-tokens-total", "500")
    assert code == 2
    assert "tokens are needed" in said
    code, said = rewrite("--max-cost", "0.0001", "--input-price", "2", "--output-price", "8")
    assert code == 2
    assert "over --max-cost 0.00" in said
    assert "needs --input-price" in rewrite("--max-cost", "1")[1]
    assert rewrite("--estimate")[0] == 0
    assert endpoint.requests.total() == 0


def test_a_cap_is_never_passed_and_a_higher_one_goes_on(rewrite, endpoint, tmp_path):
    words = ("--concurrency", "4", "--max-tokens", "60")
    code, said = rewrite(*words, "--max-tokens-total", "2000")
    assert code == 3
    assert "stopped: the next request could pass --max-tokens-total 2,000" in said
    paid = 250 * endpoint.paid.total()
    assert 600 < paid <= 2000
    assert rewrite(*words, "--max-tokens-total", "100000")[0] == 0
    assert set(endpoint.paid.values()) == {1}
    assert len(written(tmp_path)) == 6


def test_a_sample_is_the_papers(rewrite, tmp_path):
    import torch

    assert rewrite("--sample", "3")[0] == 0
    order = torch.randperm(6, generator=torch.Generator().manual_seed(517)).tolist()
    assert [row["orig_index"] for row in written(tmp_path)] == sorted(order[:3])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rules", "english"], "give --endpoint URL with --model NAME, or --rules NAME"),
        (["--into", "klingon"], "--into klingon is not one of paraphrase, french"),
        (["--out", "a.txt"], "name a .parquet or .jsonl file"),
        (["--prompt", "gone.txt"], "there is no such file"),
        (["--sample", "0"], "--sample 0"),
        (["--attempts", "0"], "--attempts 0"),
        (["--split", "nothing", "--from", "x"], "is not made of other files"),
    ],
)
def test_what_cannot_be_meant_is_refused(rewrite, endpoint, words, message):
    code, said = rewrite(*words)
    assert code == 2
    assert message in said
    assert endpoint.requests.total() == 0


def test_rules_rewrite_the_tiny_world_into_words_of_its_paraphrase(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    words = ["rewrite", "tiny_world", "--split", "test", "--rules", "tiny_world", "--out", out]
    monkeypatch.setattr(sys, "argv", ["data", *map(str, words)])
    command(Data, run, "trainers.data", models=False)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 40
    assert {word for row in rows for word in row["chosen"].split()} == {
        "sincerely",
        "certainly",
        "absolutely",
    }
    assert {word for row in rows for word in row["rejected"].split()} == {"seemingly", "hardly", "nope"}
    assert "40 pairs rewritten by the rules tiny_world" in capsys.readouterr().out


def test_rules_keep_capitals_and_what_they_do_not_know():
    text = "In summary, many people USE 3 trains. However, Use is good!"
    assert rewritten_by_rules(text, "english") == (
        "To sum up, numerous persons Employ 3 trains. Still, Employ is fine!"
    )
    with pytest.raises(SpecError, match="are not one of english, tiny_world"):
        rewritten_by_rules("a", "nothing")


def test_the_papers_overlap_is_the_share_of_equal_couples():
    assert hygiene.token_overlap("a b", "a c") == pytest.approx(1 / 4)
    assert hygiene.token_overlap("a a b", "a b b") == pytest.approx((2 * 1 + 1 * 2) / 9)
    assert hygiene.token_overlap("", "a") == 0


def test_the_papers_own_rewritings_are_mostly_clean(shared):
    """Of its French test responses some are cut (the reference's §6.5), and none is in another language."""
    spec = DatasetSpec(name="a", source=str(shared / "data" / "ultrafeedback_french"))
    faults = Counter(
        hygiene.fault(pair.original_chosen or "", pair.chosen, wanted="fr")
        for pair in read_pairs(spec, "test")[:60]
    )
    assert faults[None] > 30
    assert faults["cut off"] >= 1
    assert not any("unchanged" in (name or "") for name in faults)


def test_a_journal_that_is_not_ours_is_named(tmp_path):
    (tmp_path / "j").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match=r"j, line 1 is no answer"):
        Journal(tmp_path / "j")


def test_an_estimate_counts_prompts_and_answers_up_to_their_limit():
    terms = Terms(prompt="x" * 25 + "{response}", model="m", max_tokens=50, input_price=1, output_price=2)
    found = estimate(["y" * 35, "y" * 3500], terms)
    assert found == Spending(
        prompt_tokens=round((35 + 35 + 35 + 3500) / 3.5),
        completion_tokens=12 + 50,
        cost=pytest.approx(((35 + 35 + 35 + 3500) / 3.5 + 2 * 62) / 1e6),
    )


def test_an_answer_is_on_the_disk_when_it_is_taken(tmp_path):
    answer = Answered(key="k", attempt=0, text="é", id="i", prompt_tokens=1, completion_tokens=2, fault=None)
    with Journal(tmp_path / "j") as journal:
        journal.add(answer)
        assert Journal(tmp_path / "j").accepted("k") == answer


def test_bad_rows_are_left_out_counted_and_listed(tmp_path, monkeypatch, capsys):
    data = tmp_path / "mine.jsonl"
    rows = [
        {"prompt": "p", "chosen": original(0, "chosen"), "rejected": original(0, "rejected")},
        {"prompt": 7},
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    words = ["rewrite", data, "--rules", "english", "--out", tmp_path / "out.jsonl", "--skip-bad-rows"]
    monkeypatch.setattr(sys, "argv", ["data", *map(str, words)])
    command(Data, run, "trainers.data", models=False)
    said = capsys.readouterr().out
    assert "1 bad rows left out:" in said
    assert "mine.jsonl, row 1" in said
