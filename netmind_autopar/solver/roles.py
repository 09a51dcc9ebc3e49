"""What the dims of a program mean: batch, sequence, attention heads, and the feature dims between pairs of matmuls.

Read off the graph, not off names. Letters of ops that stand for the same dim form a *component*: two letters are joined where a value
that one op makes with the first is taken by another with the second, at the same outer edge of the same dim. (An edge is the product
of the sizes of a letter and of those inside it: splits of two letters with one outer edge are one split, however long the letters are.)

    batch       components of dim 0 of the user's inputs
    sequence    those of the query rows and of the keys of attention; without attention, of dim 1 of inputs of positions
    heads       those of the (key-value) heads of attention
    stream      the feature dim that most weights read or write: that of the residual stream
    split       features that tensor parallelism splits: matmuls with a weight alternate between splitting what they make (by
                columns) and what they sum over (by rows), beginning at the stream, which is whole (Shoeybi et al., arXiv:1909.08053);
                heads are always split; of the largest table that the inputs are looked up in, the rows
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ..ir.program import Program, is_getitem, op_name, source, tensor_args, values
from ..rules.algebra import Rule, Term

ATTENTION = "autopar.attention.default"
STREAM_WEIGHTS = 5  # a feature dim that at least so many weights touch may be the stream

Dims = tuple[tuple[int, ...], ...]  # per dim of a tensor the components in it, that of the whole dim first
_Key = tuple[object, ...]


class _Sets:
    """Disjoint sets of keys."""

    def __init__(self) -> None:
        self.parent: dict[_Key, _Key] = {}

    def find(self, key: _Key) -> _Key:
        root = key
        while (above := self.parent.setdefault(root, root)) != root:
            root = above
        while self.parent[key] != root:
            self.parent[key], key = root, self.parent[key]
        return root

    def join(self, a: _Key, b: _Key) -> None:
        self.parent[self.find(a)] = self.find(b)


@dataclass(frozen=True)
class Product:
    """A forward op that combines activations with a weight: components summed over, made, and looked up (rows of a table)."""

    node: str
    weight: str
    inner: tuple[int, ...]
    made: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Roles:
    """The component of every letter, and which components play which role.

    letters[node]: component by letter. sizes: of a component's shortest letter. dims[name]: per dim of a placeholder the components
    in it, that of the whole dim first. carried: parameters, and ops that only rearrange or cast one. products: in program order.
    pairs: components of `split` that one weight makes and another sums over.
    """

    letters: Mapping[str, Mapping[str, int]]
    dims: Mapping[str, Dims]
    sizes: Mapping[int, int]
    batch: frozenset[int]
    batch_size: int
    sequence: frozenset[int]
    heads: frozenset[int]
    stream: frozenset[int]
    split: frozenset[int]
    pairs: frozenset[int]
    carried: frozenset[str]
    products: tuple[Product, ...]

    def of(self, node: str, components: frozenset[int]) -> tuple[str, ...]:
        """The letters of a node that belong to some of the components."""
        return tuple(letter for letter, c in self.letters.get(node, {}).items() if c in components)


def roles_of(program: Program, rules: Mapping[str, Rule]) -> Roles:
    """Roles of all letters of a captured program, `rules` as `bind_program` gives them."""
    ops = [node for node in program.graph.nodes if node.name in rules]
    forward = [node for node in ops if node.meta["phase"] == "forward"]
    letters, dims, sizes = _components(program, ops, rules)
    inputs = [i.node for i in program.inputs if i.role == "input"]
    batch, batch_size = _leading(program, inputs, dims)
    sequence, heads = _attention(forward, letters)
    sequence = (sequence or _second(program, inputs, dims)) - batch
    carried = _carried(program, ops)
    products = _products(program, forward, rules, letters, carried)
    fixed = frozenset(letters[n.name][x] for n in forward for x in rules[n.name].fixed if x in letters[n.name])
    stream = _stream(products) - heads
    whole = (fixed | stream | batch | sequence) - heads
    split = _alternate(program, products, set(whole), set(heads))
    made, inner = (
        {c for p in products for c in side} for side in ([c for p in products for c in p.made], [c for p in products for c in p.inner])
    )
    return Roles(letters, dims, sizes, batch, batch_size, sequence, heads, stream, split, split & made & inner, carried, products)


def _components(
    program: Program, ops: Sequence[fx.Node], rules: Mapping[str, Rule]
) -> tuple[dict[str, dict[str, int]], dict[str, Dims], dict[int, int]]:
    """Components of letters by node, those in every dim of the placeholders, and the size of each."""
    sets = _Sets()
    for node in ops:
        rule = rules[node.name]
        for term, arg in zip(rule.inputs, tensor_args(node), strict=True):
            producer, index = source(arg)
            _join(sets, rule, term, node.name, producer.name, index)
        for index, made in enumerate(rule.outputs):
            if made is not None:
                _join(sets, rule, made, node.name, node.name, index)
    _join_gradients(program, sets)
    number: dict[_Key, int] = {}
    letters: dict[str, dict[str, int]] = {node.name: {} for node in ops}
    sizes: dict[int, int] = {}
    ends: dict[str, dict[int, dict[int, int]]] = {}
    names = {n.name for n in program.graph.nodes if n.op == "placeholder"}
    for key in list(sets.parent):
        component = number.setdefault(sets.find(key), len(number))
        if key[0] == "letter":
            _, name, letter = key
            letters[name][letter] = component  # type: ignore[index]
            sizes[component] = min(sizes.get(component, 1 << 62), rules[name].sizes[letter])  # type: ignore[index]
        elif key[1] in names:
            ends.setdefault(key[1], {}).setdefault(key[3], {})[key[4]] = component  # type: ignore[arg-type, index]
    dims = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            found = ends.get(node.name, {})
            edges = [found.get(d, {}) for d in range(node.meta["val"].dim())]
            dims[node.name] = tuple(tuple(at[edge] for edge in sorted(at, reverse=True)) for at in edges)
    return letters, dims, sizes


def _join(sets: _Sets, rule: Rule, term: Term, name: str, producer: str, index: int) -> None:
    for d, dim in enumerate(term.dims):
        edge = 1
        for letter in reversed(dim):
            edge *= rule.sizes[letter]
            if rule.sizes[letter] > 1:
                sets.join(("letter", name, letter), ("value", producer, index, d, edge))


def _join_gradients(program: Program, sets: _Sets) -> None:
    """A gradient has the dims of its parameter."""
    nodes = {node.name: node for node in program.graph.nodes}
    owners: dict[_Key, str] = {}
    for item in program.outputs:
        if item.role == "grad":
            producer, index = source(nodes[item.node])
            owners[producer.name, index] = program.owner(item).node
    for key in list(sets.parent):
        if key[0] == "value" and key[1:3] in owners:
            sets.join(key, ("value", owners[key[1:3]], 0, *key[3:]))


def _leading(program: Program, inputs: Sequence[str], dims: Mapping[str, Dims]) -> tuple[frozenset[int], int]:
    """The components of the inputs' dim 0, and its size: the one that most inputs have, of several the first."""
    shapes = {i: tuple(program.node(i).meta["val"].shape) for i in inputs}
    counted = Counter(s[0] for s in shapes.values() if s)
    if not counted:
        return frozenset(), 1
    size = max(counted, key=lambda n: counted[n])
    return frozenset(c for i in inputs if shapes[i] and shapes[i][0] == size for c in dims[i][0]), size


def _second(program: Program, inputs: Sequence[str], dims: Mapping[str, Dims]) -> frozenset[int]:
    """The components of dim 1 of the inputs that hold positions, `[batch, sequence]` of integers, or `[batch, sequence, features]`."""
    vals = {i: program.node(i).meta["val"] for i in inputs}
    kept = [i for i in inputs if vals[i].dim() == 3 or (vals[i].dim() == 2 and not vals[i].is_floating_point())]
    return frozenset(c for i in kept for c in dims[i][1])


def _attention(forward: Sequence[fx.Node], letters: Mapping[str, Mapping[str, int]]) -> tuple[frozenset[int], frozenset[int]]:
    """Components of rows and keys, and of heads, of all attention ops."""
    found = [letters[n.name] for n in forward if op_name(n) == ATTENTION]
    rows = frozenset(x[name] for x in found for name in ("s", "t") if name in x)
    return rows, frozenset(x["g"] if "g" in x else x["r"] for x in found if "g" in x or "r" in x)


def _carried(program: Program, ops: Sequence[fx.Node]) -> frozenset[str]:
    """Parameters, and ops that take one of these alone and keep its elements."""
    out = {i.node for i in program.inputs if i.role == "param"}
    for node in ops:
        args = tensor_args(node)
        if len(args) == 1 and args[0].name in out and not is_getitem(node):
            made = values(node)
            if len(made) == 1 and made[0] is not None and made[0].numel() == args[0].meta["val"].numel():
                out.add(node.name)
    return frozenset(out)


def _products(
    program: Program,
    forward: Sequence[fx.Node],
    rules: Mapping[str, Rule],
    letters: Mapping[str, Mapping[str, int]],
    carried: frozenset[str],
) -> tuple[Product, ...]:
    """Every forward op that multiplies activations by a weight, or looks rows of one up.

    What is looked up in a table of three dims or more is a weight again: the matrices of the experts that a token is sent to.
    """
    origin = {name: name for name in carried}
    out = []
    for node in forward:
        if node.name in carried:
            origin[node.name] = origin[tensor_args(node)[0].name]
            continue
        rule, args = rules[node.name], tensor_args(node)
        slots = [i for i, a in enumerate(args) if a.name in origin and a.meta["val"].dim() > 1]
        if len(slots) != 1 or len(args) == 1 or rule.outputs[0] is None:
            continue
        weight = {x for dim in rule.inputs[slots[0]].dims for x in dim if rule.sizes[x] > 1}
        other = {x for i, a in enumerate(args) if a.name not in origin for dim in rule.inputs[i].dims for x in dim}
        result = [x for dim in rule.outputs[0].dims for x in dim]
        inner, rows = (weight & other) - set(result), weight - other - set(result) - rule.fixed
        made = [x for x in result if x in weight - other]
        known = letters[node.name]
        source_ = origin[args[slots[0]].name]
        if rows and not inner and len(rule.inputs[slots[0]].dims) > 2:
            origin[node.name] = source_
        elif inner or rows:
            out.append(Product(node.name, source_, *(tuple(known[x] for x in xs) for xs in (sorted(inner), made, sorted(rows)))))
    return tuple(out)


def _stream(products: Sequence[Product]) -> frozenset[int]:
    """Feature dims that clearly more weights touch than others."""
    touched: dict[int, set[str]] = {}
    for p in products:
        for c in {*p.inner, *p.made}:
            touched.setdefault(c, set()).add(p.weight)
    most = max((len(w) for w in touched.values()), default=0)
    return frozenset(c for c, w in touched.items() if len(w) >= STREAM_WEIGHTS and 2 * len(w) > most)


def _alternate(program: Program, products: Sequence[Product], whole: set[int], split: set[int]) -> frozenset[int]:
    """The components to split, given some that are whole and some that are split."""
    tables = {p.node: values(program.node(p.weight))[0].shape[0] for p in products if p.rows and not p.inner and _by_input(program, p)}  # type: ignore[union-attr]
    vocabulary = max(tables.values(), default=0)
    for p in products:
        if p.rows and not p.inner:
            if not split.intersection(p.made):
                whole.update(p.made)
                if tables.get(p.node) == vocabulary:
                    split.update(c for c in p.rows if c not in whole)
        elif split.intersection(p.inner):
            whole.update(c for c in p.made if c not in split)
        else:
            whole.update(c for c in p.inner)
            if not split.intersection(p.made):
                split.update([c for c in p.made if c not in whole][:1])
    return frozenset(split)


def _by_input(program: Program, product: Product) -> bool:
    """True when rows are looked up by an input of the user, as it is."""
    inputs = {i.node for i in program.inputs if i.role == "input"}
    return any(arg.name in inputs for arg in tensor_args(program.node(product.node)))
