"""A hypothesis strategy: valid graphs over every kind of node and term."""

from hypothesis import strategies as st

from fastokd.graph import (
    KL,
    CrossEntropy,
    External,
    Graph,
    Logits,
    LowestCrossEntropy,
    MinLogit,
    Mixture,
    Node,
    ProbabilityMixture,
    Term,
)

_TEMPERATURES = (0.7, 1.0, 2.5, 3.0, 4.0)
_CONSTANT_TEACHERS = (External, MinLogit, LowestCrossEntropy)


def _draw_weights(draw: st.DrawFn, count: int, widths: dict[str, int]) -> str | tuple[float, ...]:
    """Constants, a separate weight tensor, or one that an earlier node of as many inputs uses."""
    shared = [name for name, width in widths.items() if width == count]
    choice = draw(st.sampled_from(["constant", "own", *(["shared"] if shared else [])]))
    if choice == "shared":
        return draw(st.sampled_from(shared))
    if choice == "constant":
        parts = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
        return tuple(part / sum(parts) for part in parts)
    name = f"w{len(widths)}"
    widths[name] = count
    return name


@st.composite
def random_graphs(draw: st.DrawFn) -> Graph:
    """1 to 4 logits rows, up to 2 external rows, up to 4 derived nodes (mixtures of mixtures among
    them), 1 to 6 terms.
    """
    learning: list[Node] = [Logits(f"z{k}") for k in range(draw(st.integers(1, 4)))]
    externals: list[Node] = [External(f"x{k}") for k in range(draw(st.integers(0, 2)))]
    teachers: list[Node] = []
    widths: dict[str, int] = {}
    for k in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from([Mixture, ProbabilityMixture, MinLogit, LowestCrossEntropy]))
        pool = learning + (externals if kind is ProbabilityMixture else [])
        inputs = tuple(
            node.name for node in draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3))
        )
        if kind is Mixture:
            learning.append(Mixture(f"n{k}", inputs, _draw_weights(draw, len(inputs), widths)))
        elif kind is ProbabilityMixture:
            weights = _draw_weights(draw, len(inputs), widths)
            teachers.append(
                ProbabilityMixture(f"n{k}", inputs, weights, draw(st.sampled_from(_TEMPERATURES)))
            )
        else:
            teachers.append(kind(f"n{k}", inputs))
    everything = [*learning, *externals, *teachers]
    terms: dict[str, Term] = {}
    for _ in range(draw(st.integers(1, 6))):
        weight, scheduled = draw(st.sampled_from((0.0, 0.3, 1.0, 4.0))), draw(st.booleans())
        student = draw(st.sampled_from(learning))
        teacher = draw(st.sampled_from(everything))
        if teacher is student:
            term: Term = CrossEntropy(student.name, weight, scheduled)
        else:
            constant = isinstance(teacher, _CONSTANT_TEACHERS)
            direction = draw(st.sampled_from(("teacher_first", "teacher_first", "student_first")))
            eps = draw(st.sampled_from((0.0, 1e-7, 1e-2))) if direction == "teacher_first" else 0.0
            probabilities = isinstance(teacher, (External, ProbabilityMixture))
            term = KL(
                teacher.name,
                student.name,
                weight,
                draw(st.sampled_from(_TEMPERATURES)),
                draw(st.booleans()),
                detach=constant or draw(st.booleans()),
                eps=eps,
                eps_mode=(
                    "exact" if probabilities else draw(st.sampled_from(("exact", "first_order")))
                ),
                direction=direction,
                scheduled=scheduled,
            )
        terms[term.name] = term
    # Only what reaches a term may stay.
    used = {
        name
        for term in terms.values()
        for name in (
            (term.node,) if isinstance(term, CrossEntropy) else (term.teacher, term.student)
        )
    }
    for node in reversed([*learning, *teachers]):
        if node.name in used:
            used.update(node.inputs)
    kept = draw(st.permutations([node for node in everything if node.name in used]))
    return Graph("random", tuple(kept), tuple(terms.values()), draw(st.sampled_from((0.0, 0.1))))
