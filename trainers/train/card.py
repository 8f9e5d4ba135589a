"""The card of a trained model: what it is, how its reward is read in Python, and what its training came to."""

import json
from pathlib import Path

from trainers.train.inputs import TrainInputs, TrainResult

CARD = "README.md"
_OF_THE_MEAN = (
    "It is the mean over the response's tokens. `AutoModelForSequenceClassification` gives the logit at the last token alone, "
    "which is **not** this reward; `python -m trainers.evaluate --reward ex_rm_mean` gives it."
)


def model_card(inputs: TrainInputs, result: TrainResult | None = None) -> bytes:
    """Return the README.md of a trained model: what it is, how its reward is read, and the `result` of a finished training."""
    reward, on_hub = inputs.reward, inputs.location.count("/") == 1 and not Path(inputs.location).exists()
    head = reward.type.output == "head"
    # No class of peft's reads an adapter's head and its log-probabilities.
    one_reader = reward.type.output != "both" or not inputs.saves_adapter
    shows_code = reward.type.rendering == "response" and reward.pooling == "last" and one_reader
    lines = [
        "---",
        f"library_name: {'peft' if inputs.saves_adapter else 'transformers'}",
        f"base_model: {json.dumps(inputs.location if on_hub else inputs.name)}",
        *([f"datasets: [{json.dumps(inputs.dataset)}]"] if inputs.dataset else []),
        f"pipeline_tag: {'text-classification' if head else 'text-generation'}",
        "tags: [reward-model, rmsweep]",
        "---",
        "",
        f"# {reward.name} on {inputs.name}",
        "",
        f"A reward model of type `{reward.name}`, trained by rmsweep: {reward.type.formula}.",
        "A response's tokens include its end-of-turn token.",
        *(f"β is {beta}." for beta in [reward.beta] if beta is not None),
        *(["ln π_ref is left out."] if "reference" in reward.type.options and not reward.reference else []),
        *([_OF_THE_MEAN] if reward.pooling == "mean" else []),
        "",
        *(_snippet(inputs) if shows_code else []),
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in (_facts(inputs, result) if result else {}).items()),
    ]
    return ("\n".join(lines) + "\n").encode()


def _facts(inputs: TrainInputs, result: TrainResult) -> dict[str, object]:
    """Return what the card of a finished training says, by name."""
    optim, last = inputs.optim, result.log[-1]
    return {
        "base model": inputs.name,
        "training pairs": len(inputs.pairs),
        "optimiser": f"{optim.optimizer}, learning rate {optim.lr}, {optim.schedule}",
        "pairs a step": optim.effective_batch,
        "epochs": optim.epochs,
        "seed": inputs.seed,
        "precision": inputs.precision,
        **{type(option).__name__: option for option in inputs.unusual},
        "training accuracy, last epoch": f"{result.train_accuracy:.4f}",
        "loss, last step": f"{last['loss']:.4f}",
        "margin, last step": f"{last['margin']:.4f}",
    }


def _snippet(inputs: TrainInputs) -> list[str]:
    """Return Python code that scores a response, or computes its tokens' log-probabilities or logits."""
    head, adapter, reads = inputs.reward.type.output == "head", inputs.saves_adapter, inputs.reward.type.reads
    loader = f"Auto{'Peft' if adapter else ''}ModelFor{'SequenceClassification' if head else 'CausalLM'}"
    imports = [f"from transformers import {loader}, AutoTokenizer"]
    if adapter:
        imports = [f"from peft import {loader}", "from transformers import AutoTokenizer"]
    of_tokens = [
        'prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, **as_ids)["input_ids"]',
        f"every = model(input_ids=ids).logits[0, :-1]{'.log_softmax(-1)' if reads == 'log_probs' else ''}",
        f"{reads} = every.gather(1, ids[0, 1:, None])[prompt.shape[1] - 1 :, 0]",
    ]
    return [
        "```python",
        *imports,
        "",
        'folder = "."  # this folder, or its id on the hub',
        f"model = {loader}.from_pretrained(folder{', num_labels=1' if adapter and head else ''}).eval()",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        'turns = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]',
        'as_ids = {"return_dict": True, "return_tensors": "pt"}',
        'ids = tokenizer.apply_chat_template(turns, **as_ids)["input_ids"]',
        *(["reward = model(input_ids=ids).logits[0, 0].item()"] if head else of_tokens),
        "```",
        "",
    ]
