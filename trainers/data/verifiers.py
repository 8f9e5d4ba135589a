"""Verifiers: programs that decide whether an answer to a prompt of some data set is right."""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from trainers.data import worlds

_NUMBER = r"-?\d+(?:\.\d+)?"
_EXPRESSION = re.compile(rf"{_NUMBER}(?:\s*[-+*]\s*{_NUMBER})+")
# An expression beside one of these is a part of a longer one.
_BEFORE, _AFTER = re.compile(r"[-+*/÷^%(.·]\s*$"), re.compile(r"\s*(?:[-+*/÷^%)·]|\.\d|x\s*-?\d)")
_OPERATIONS: Mapping[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


class Verifier(NamedTuple):
    """`knows(prompt)`: whether it can judge answers to a prompt; `right(answer, prompt)`; `about` says which answers are right."""

    knows: Callable[[str], bool]
    right: Callable[[str, str], bool]
    about: str


def _is_graph(prompt: str) -> bool:
    try:
        return bool(worlds.graph_of(prompt)[1])
    except (ValueError, IndexError):
        return False


def _plain(text: str) -> str:
    """Return the text with numbers and signs as Python writes them."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.replace("−", "-").replace("×", "*"))
    return re.sub(r"(?<![\d.])0+(?=\d)", "", text)


def _expression(prompt: str) -> str:
    """Return the one expression of a prompt; "" where there is none, more than one, or a part of one with other signs."""
    prompt = _plain(prompt)
    found = [*_EXPRESSION.finditer(prompt)]
    beside = found and (_BEFORE.search(prompt[: found[0].start()]) or _AFTER.match(prompt, found[0].end()))
    return found[0][0] if len(found) == 1 and not beside else ""


def _value(expression: str) -> float:
    def value(node: ast.AST) -> float:
        match node:
            case ast.BinOp(left=left, op=found, right=right):
                return _OPERATIONS[type(found)](value(left), value(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.Constant(value=int() | float() as number):
                return number
        raise ValueError(expression)

    return value(ast.parse(expression, mode="eval").body)


def _computes(answer: str, prompt: str) -> bool:
    """Return whether the last number of the answer is the value of the prompt's one expression."""
    said = re.findall(_NUMBER, _plain(answer))
    return bool(said) and abs(float(said[-1]) - _value(_expression(prompt))) < 1e-9


# The verifier of built-in sets, by how their names begin.
USUAL = {"hamiltonian": "hamiltonian", "tiny_": "tiny_world"}
VERIFIERS = {
    "hamiltonian": Verifier(_is_graph, worlds.is_correct, "an order of the vertices that is a cycle"),
    "arithmetic": Verifier(
        lambda prompt: bool(_expression(prompt)),
        _computes,
        "its last number is the value of the expression in the prompt, of + − × and decimals",
    ),
    "tiny_world": Verifier(worlds.is_statement, worlds.is_agreeing, "a prefix, then a word that agrees"),
}
