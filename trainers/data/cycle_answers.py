"""Is what a model wrote a Hamiltonian cycle? An exact parser of both renderings, in words and with separator tokens."""

from trainers.data import hamiltonian
from trainers.data.hamiltonian import Edge
from trainers.data.paper_hamiltonian import EDGE_SEPARATOR, SEPARATOR


def graph_of(prompt: str) -> tuple[int, list[Edge]]:
    """Number of vertices and the edges of a prompt."""
    if EDGE_SEPARATOR not in prompt:
        return hamiltonian.parse_prompt(prompt)
    vertices, edges = prompt.removeprefix("Vertices: ").split("\nEdges: ")
    ends = [edge.split(EDGE_SEPARATOR) for edge in edges.split(SEPARATOR)[1:]]
    return len(vertices.split(SEPARATOR)) - 1, [(int(u), int(v)) for u, v in ends]


def is_correct(answer: str, prompt: str) -> bool:
    """Whether the text is an order of exactly the prompt's vertices, nothing beside it, that is a cycle of its graph."""
    words = answer.strip().split(SEPARATOR) if EDGE_SEPARATOR in prompt else answer.split()
    vertices, edges = graph_of(prompt)
    # int() reads more than is written: 01, +1, 1_0.
    if not set(words) <= set(map(str, range(vertices))):
        return False
    return hamiltonian.is_cycle([int(word) for word in words], vertices, edges)
