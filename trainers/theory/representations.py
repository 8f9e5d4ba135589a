"""Hidden states of pairs in a real model, and the geometry of untrained ones (paper §5, its footnote): D = h⁺ − h⁻.

Shapes: P pairs that are trained on, Q others, K response tokens, D hidden, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainers.data.texts import bag, nearest_overlap
from trainers.errors import ModelError, SpecError
from trainers.evaluate.scoring import scoring_batches
from trainers.models.reward_parts import hidden_states
from trainers.pairs.tokens import TokenPair

# Hard: a softer margin would let pairs be on the wrong side.
_PENALTY = 1e9


class PairStates(NamedTuple):
    """A pair's hidden states: the last of each response, [D], and those before its tokens with the tokens, [K, D], [K]."""

    chosen_D: Tensor
    rejected_D: Tensor
    chosen_tokens: tuple[Tensor, Tensor]
    rejected_tokens: tuple[Tensor, Tensor]


def pair_states(model: Any, pairs: Sequence[TokenPair]) -> list[PairStates]:
    """The states of each pair, in the order of `pairs`, on the CPU."""
    found: dict[int, PairStates] = {}
    for batch in scoring_batches(model, pairs):
        with torch.inference_mode():
            hidden_ND = hidden_states(model, batch)
        last_RD = hidden_ND[batch.last_R].cpu().clone()
        before_MD = hidden_ND[batch.predictor_M].cpu().clone()
        target_M, owner_M = batch.target_M.cpu(), batch.owner_M.cpu()
        count = len(batch.indices)
        for place, index in enumerate(batch.indices):
            chosen_M, rejected_M = owner_M == place, owner_M == place + count
            found[index] = PairStates(
                last_RD[place],
                last_RD[place + count],
                (before_MD[chosen_M], target_M[chosen_M]),
                (before_MD[rejected_M], target_M[rejected_M]),
            )
    return [found[pair.index] for pair in pairs]


def differences(states: Sequence[PairStates]) -> Tensor:
    """D = h⁺ − h⁻ at the last token, [P, D]."""
    return torch.stack([item.chosen_D - item.rejected_D for item in states])


def plain_unembedding(model: Any) -> Tensor:
    """U of π = softmax(U h), [V, D], on the CPU. Raises ModelError where the model's π is another function."""
    layer = model.get_output_embeddings()
    if layer.bias is not None or layer.softcap is not None or layer.scale != 1:
        raise ModelError(
            f"a {type(model).__name__} has biased, scaled or soft-capped logits, for which the formula does not hold; "
            "name a model whose π is softmax(U h)."
        )
    weight: Tensor = layer.weight.detach().cpu().clone()
    return weight


def separator(difference_PD: Tensor) -> Tensor:
    """The max-margin direction through the origin with ⟨w, D⟩ > 0 for every pair, of norm 1, [D].

    Raises SpecError where there is none.
    """
    from sklearn.svm import SVC  # type: ignore[import-untyped]

    # With every pair in both directions the problem is symmetric, so the best plane goes through the origin.
    scale = float(difference_PD.norm(dim=1).mean())
    both = torch.cat([difference_PD, -difference_PD]).double() / scale
    labels = [1] * len(difference_PD) + [-1] * len(difference_PD)
    found: Any = SVC(kernel="linear", C=_PENALTY, tol=1e-9).fit(both.numpy(), labels)
    weight_D = torch.tensor(found.coef_[0], dtype=torch.float64)
    if not bool((difference_PD.double() @ weight_D > 0).all()):
        raise SpecError(
            f"no direction separates all of the {len(difference_PD)} pairs; take fewer pairs or a wider model."
        )
    return weight_D / weight_D.norm()


def inner_products(seen_PD: Tensor, unseen_QD: Tensor) -> Tensor:
    """⟨D_seen, D_unseen⟩ of every two, [P × Q]."""
    return (seen_PD.double() @ unseen_QD.double().T).flatten()


def cosines(direction_D: Tensor, unseen_QD: Tensor) -> Tensor:
    """cos(w, D_unseen), [Q]."""
    return torch.cosine_similarity(unseen_QD.double(), direction_D.double()[None], dim=1)


def nearest_cosines(seen_PD: Tensor, unseen_QD: Tensor) -> Tensor:
    """The largest cosine of each D_unseen with a D_seen, [Q]."""
    return (normalize(unseen_QD) @ normalize(seen_PD).T).amax(dim=1)


def nearness(
    model: Any, seen: Sequence[TokenPair], unseen: Mapping[str, Sequence[TokenPair]]
) -> dict[str, dict[int, dict[str, float]]]:
    """Return, by set and index, how near a pair is to the nearest seen one: in tokens, and in hidden states."""
    seen_PD = differences(pair_states(model, seen))
    seen_bags = [bag(pair.chosen, pair.rejected) for pair in seen]
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name, pairs in unseen.items():
        overlap_Q = nearest_overlap([bag(pair.chosen, pair.rejected) for pair in pairs], seen_bags)
        cosine_Q = nearest_cosines(seen_PD, differences(pair_states(model, pairs)))
        measured = zip(pairs, overlap_Q, cosine_Q, strict=True)
        found[name] = {pair.index: {"overlap": float(a), "cosine": float(b)} for pair, a, b in measured}
    return found


def statistics(values: Tensor) -> dict[str, float]:
    """Return mean, quartiles, minimum, maximum, and the share above zero."""
    values = values.double()
    names = ("min", "first_quartile", "median", "third_quartile", "max")
    quartiles = torch.quantile(values, torch.linspace(0, 1, 5, dtype=torch.float64)).tolist()
    return {
        "mean": float(values.mean()),
        **dict(zip(names, quartiles, strict=True)),
        "share_positive": float((values > 0).double().mean()),
        "n": float(values.numel()),
    }
