"""A hypothesis strategy: valid graphs over every kind of node and term."""

from hypothesis import strategies as st

from fastokd.graph import (
    DKD,
    KL,
    L1,
    MSE,
    CrossEntropy,
    External,
    Graph,
    JensenShannon,
    Logits,
    LowestCrossEntropy,
    MinLogit,
    Mixture,
    Node,
    ProbabilityMixture,
    Standardized,
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
def random_graphs(draw: st.DrawFn, with_standardized: bool = False) -> Graph:
    """1 to 4 logits rows, up to 2 external rows, up to 4 derived nodes (mixtures of mixtures among
    them), 1 to 6 terms.

    Standardized rows need weights that ``GraphLoss`` computes, which executors alone do not.
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
    if with_standardized:
        sources = draw(st.lists(st.sampled_from(learning), max_size=2, unique=True))
        learning += [Standardized(f"s{k}", node.name) for k, node in enumerate(sources)]
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
            probabilities = isinstance(teacher, (External, ProbabilityMixture))
            between_logits = teacher in learning
            pair_nodes = (teacher, student)
            has_means = not any(isinstance(node, Standardized) for node in pair_nodes)
            # A mixture may equal its input but for rounding, which decides the sign that L1 has.
            between_branches = isinstance(teacher, Logits) and isinstance(student, Logits)
            detach = constant or draw(st.booleans())
            kinds = ["js", *["dkd"] * between_logits, *["mse"] * (between_logits and has_means)]
            kinds += ["l1"] * between_branches
            kind = draw(st.sampled_from(["kl"] * 6 + kinds))
            pair = teacher.name, student.name, weight
            options = {"detach": detach, "scheduled": scheduled}
            temperature, t2_scaling = draw(st.sampled_from(_TEMPERATURES)), draw(st.booleans())
            softened = {"temperature": temperature, "t2_scaling": t2_scaling, **options}
            if kind == "js":
                term = JensenShannon(*pair, beta=draw(st.sampled_from((0.1, 0.5, 0.8))), **softened)
            elif kind == "dkd":
                alpha, beta = draw(st.sampled_from(((1.0, 8.0), (1.0, 0.0), (0.0, 1.0))))
                term = DKD(*pair, alpha=alpha, beta=beta, **softened)
            elif kind in ("mse", "l1"):
                term = (MSE if kind == "mse" else L1)(*pair, **options)
            else:
                directions = ("teacher_first", "teacher_first", "student_first", "symmetric")
                direction = draw(st.sampled_from(directions))
                eps = 0.0
                if direction == "teacher_first":
                    eps = draw(st.sampled_from((0.0, 1e-7, 1e-2)))
                modes = ("exact",) if probabilities else ("exact", "first_order")
                eps_mode = draw(st.sampled_from(modes))
                term = KL(*pair, eps=eps, eps_mode=eps_mode, direction=direction, **softened)
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
