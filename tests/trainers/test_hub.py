"""`--push`: what arrives on a hub on loopback, what is refused before a training, and where the token is not."""

import pytest

from tests.hub import TOKEN, pushed_hub
from trainers.errors import SpecError, TrialFailed
from trainers.specs import OptimSpec
from trainers.train.__main__ import Train, run

NAME = "acme/judge"
# Of huggingface_hub's own upload over plain HTTP.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch):
    with pushed_hub(monkeypatch) as served:
        yield served


def train(model, out, **options):
    words = {"model": str(model), "reward": "ex_rm", "data": "tiny_world", "max_pairs": 4, "push": NAME}
    run(Train(**{**words, **options}, out=out, optim=OptimSpec(epochs=1)))


def test_a_trained_model_is_pushed_with_its_card_and_nothing_tells_the_token(
    hub, tiny_model, tmp_path, capfd
):
    train(tiny_model, tmp_path / "out")
    folder = tmp_path / "out" / "model"
    assert hub.private == {NAME: True}
    assert hub.files == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= hub.files.keys()
    assert not any(
        str(place).encode() in content for content in hub.files.values() for place in (tmp_path, tiny_model)
    )
    out, err = capfd.readouterr()
    assert f"pushed to {hub.url}/{NAME}" in err
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(TOKEN.encode() in content for content in (out.encode(), err.encode(), *written))
    train(tiny_model, tmp_path / "seen", push="acme/seen", public=True)
    assert hub.private["acme/seen"] is False


def test_what_cannot_be_pushed_is_said_before_the_training(hub, tiny_model, tmp_path, monkeypatch):
    hub.private["acme/open"] = False
    for options, said in (
        ({"push": "a/b/c"}, "'a/b/c' is no name on the hub; give ORG/NAME"),
        ({"push": "judge"}, "'judge' is no name on the hub; give ORG/NAME"),
        ({"push": "acme/open"}, "acme/open is public on the hub; give another name"),
        ({"lora_rank": 2}, f"its base, the folder {tiny_model}; push it merged"),
        ({"push": None, "public": True}, "--public makes the repository of --push public"),
    ):
        with pytest.raises(SpecError, match=said):
            train(tiny_model, tmp_path / "out", **options)
    monkeypatch.setenv("HF_TOKEN", TOKEN[::-1])
    with pytest.raises(SpecError, match=f"does not open {NAME} for the token .*401") as found:
        train(tiny_model, tmp_path / "out")
    assert TOKEN[::-1] not in str(found.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(SpecError, match=r"for the token of HF_TOKEN or hf auth login: .*401"):
        train(tiny_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list(hub.private) == ["acme/open"]


def test_a_model_that_does_not_arrive_is_kept_and_named(hub, tiny_model, tmp_path):
    hub.takes = False
    with pytest.raises(TrialFailed, match=r"model is sound, but could not be pushed to acme/judge: .*404"):
        train(tiny_model, tmp_path / "out")
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
