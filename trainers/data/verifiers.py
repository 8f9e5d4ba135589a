"""Verifiers: programs that know the right answers to some prompts, and so judge what a policy writes."""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from trainers.data import worlds

_NUMBER = r"-?\d+(?:\.\d+)?"
_EXPRESSION = re.compile(rf"{_NUMBER}(?:\s*[-+*×]\s*{_NUMBER})+")
_OPERATIONS: Mapping[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


class Verifier(NamedTuple):
    """`knows` whether a prompt is one of its own; `right` takes an answer and its prompt; `about` says what is right."""

    knows: Callable[[str], bool]
    right: Callable[[str, str], bool]
    about: str


def _is_graph(prompt: str) -> bool:
    try:
        return bool(worlds.graph_of(prompt)[1])
    except (ValueError, IndexError):
        return False


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

    return value(ast.parse(expression.replace("×", "*"), mode="eval").body)


def _computes(answer: str, prompt: str) -> bool:
    """Return whether the last number of the answer is the value of the prompt's one expression."""
    said = re.findall(_NUMBER, answer.replace(",", ""))
    return bool(said) and abs(float(said[-1]) - _value(_EXPRESSION.findall(prompt)[0])) < 1e-9


VERIFIERS = {
    "hamiltonian": Verifier(_is_graph, worlds.is_correct, "an order of the vertices that is a cycle"),
    "arithmetic": Verifier(
        lambda prompt: len(_EXPRESSION.findall(prompt)) == 1,
        _computes,
        "its last number is the value of the expression in the prompt, of + − × and decimals",
    ),
    "tiny_world": Verifier(worlds.is_statement, worlds.is_agreeing, "a prefix, then a word that agrees"),
}
