"""Layer patterns: `(kda*3 full)*2 kda` is a list of mixer names, one per layer.

Grammar, whitespace between items:
    items := item+      item := (layer | "(" items ")") ["*" count]
    layer := mixer [(":" | "@") label] ["/" mlp]
    mixer, mlp: a letter or _, then letters, digits, _; looked up in the config's `mixers` and `mlps`.
    A layer without mlp has the SwiGLU of width model.mlp_hidden.       count: 1, 2, ...
    full:a leaves its keys and values to later layers under the label a, full@a reuses those that the last
    such layer left: it has no projections of its own for them, and no cache. CLA: (full:a full@a)*12.
    YOCO: swa*12 full:a full@a*11. MixAttention: full:a (swa:b swa@b*3 full@a)*5.

What r:1 means here. `ratio(linear, full, r, n)` takes the text of "A Systematic Analysis of Hybrid Linear
Attention" (arXiv 2507.06457) by the letter: a period of r linear layers and 1 full one, r + 1 layers long,
so a fraction 1/(r+1) of the layers is full: 6 of 24 at 3:1. The checkpoints released with that paper are said
to follow another convention, one full layer in every N ("3:1" has 8 full layers of 24): r = N - 1 here.
A ratio alone is ambiguous, so the number and the indices of the full layers are always reported.
"""

import re
from collections.abc import Collection, Sequence

from hybridlm import plan, untrusted
from hybridlm.errors import ConfigError, nearest

FIELD = "model.pattern"
MAX_LAYERS = 4096  # a slip such as kda*30000 should fail here, not in memory
MAX_DIGITS = 9  # of a count, zeros in front included
PLACEMENTS = ("last", "first", "middle")
TOKEN = re.compile(
    r"\s*(?:(?P<name>[A-Za-z_]\w*(?:[:@][A-Za-z_]\w*)?(?:/[A-Za-z_]\w*)?)|(?P<count>\d+)|(?P<mark>[()*])|(?P<end>\Z)|(?P<other>.))",
    re.ASCII | re.DOTALL,
)


class PatternError(ConfigError):
    """A pattern that cannot be read; ``position`` is the index of the offending character."""

    def __init__(self, pattern: str, position: int, problem: str, fix: str = ""):
        super().__init__(FIELD, pattern, problem, fix)
        self.position = position
        sentence = f"{FIELD}: {problem}, at character {position + 1}. {fix}".rstrip()
        shown = lambda text: untrusted.terminal(re.sub(r"\s", " ", text))
        self.args = (f"{sentence}\n  {shown(pattern)}\n  {' ' * len(shown(pattern[:position]))}^",)


def nameable(name: str) -> bool:
    """Whether a pattern can name a mixer or an MLP so."""
    return re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) is not None


def split(layer: str) -> tuple[str, str]:
    """(mixer, mlp) of "mixer:label/mlp"; mlp is "" where the layer names none."""
    mixer, _, mlp = layer.partition("/")
    return re.split("[:@]", mixer)[0], mlp


def labels(layer: str) -> tuple[str, str]:
    """(label under which the layer leaves its keys and values, label of those that it reuses); "": none."""
    mixer = layer.partition("/")[0]
    return mixer.partition(":")[2], mixer.partition("@")[2]


def sources(layers: Sequence[str]) -> dict[int, int]:
    """Index of each layer that reuses keys and values -> index of the layer that left them.

    ConfigError where no earlier layer did.
    """
    found: dict[int, int] = {}
    last: dict[str, int] = {}
    for index, layer in enumerate(layers):
        leaves, reuses = labels(layer)
        if reuses:
            if reuses not in last:
                problem = f"layer {index} reuses keys and values, but no earlier layer leaves {reuses!r}"
                raise ConfigError(FIELD, layer, problem, nearest(reuses, last))
            found[index] = last[reuses]
        elif leaves:
            last[leaves] = index
    return found


def parse(pattern: str, known: Collection[str] | None = None, mlps: Collection[str] = ()) -> tuple[str, ...]:
    """What each layer that ``pattern`` spells out is called: "mixer", "mixer:label", "mixer/mlp" ...

    known, mlps: the names that exist; any other is refused where it stands. known None accepts every name.
    Raises PatternError (a ConfigError for model.pattern).
    """
    matches = ((match.lastgroup or "", match) for match in TOKEN.finditer(pattern))
    tokens = ((kind, match[kind], match.start(kind)) for kind, match in matches)
    groups: list[list[str]] = [[]]  # the names so far of each open parenthesis, outermost first
    opened: list[int] = []
    item: list[str] | None = None  # what a "*" would repeat
    position = 0  # of the first character of a token

    def refused(problem: str, fix: str = "") -> PatternError:
        return PatternError(pattern, position, problem, fix)

    for kind, text, position in tokens:
        if kind == "end":
            break
        if kind == "name":
            mixer, mlp = split(text)
            if known is not None and mixer not in known:
                raise refused(f"no mixer named {mixer!r} in mixers", nearest(mixer, known))
            if known is not None and mlp and mlp not in mlps:
                position += text.index("/") + 1
                raise refused(f"no MLP named {mlp!r} in mlps", nearest(mlp, mlps))
            item = [text]
            groups[-1] += item
        elif text == "(":
            groups.append([])
            opened.append(position)
            item = None
        elif text == ")":
            if not opened:
                raise refused("')' without '('")
            if not groups[-1]:
                raise refused("nothing between the parentheses")
            opened.pop()
            item = groups.pop()
            groups[-1] += item
        elif text == "*":
            if item is None:
                raise refused("'*' must follow a name or ')'")
            kind, text, position = next(tokens)
            count = int(text[:MAX_DIGITS]) if kind == "count" else 0
            if count < 1:
                raise refused("'*' must be followed by a whole number >= 1")
            if len(text) > MAX_DIGITS or len(item) * count > MAX_LAYERS:
                raise refused(f"more than {MAX_LAYERS} layers")
            groups[-1] += item * (count - 1)
            item = None
        else:
            fix = "Repetition is written name*3." if kind == "count" else ""
            raise refused(f"expected a name, '(', ')' or '*', found {text!r}", fix)
        if len(groups[-1]) > MAX_LAYERS:
            raise refused(f"more than {MAX_LAYERS} layers")
    if opened:
        raise PatternError(pattern, opened[-1], "'(' is never closed")
    if not groups[0]:
        raise PatternError(pattern, 0, "names no layer", "For example: 'kda*3 full'.")
    return tuple(groups[0])


def fill(names: Sequence[str], num_layers: int) -> tuple[str, ...]:
    """``names`` repeated to ``num_layers`` layers, the last repetition cut short; 0: as they are."""
    if not 0 <= num_layers <= MAX_LAYERS:
        allowed = f"must be 0 (the pattern as written) to {MAX_LAYERS}"
        raise ConfigError("model.num_layers", num_layers, allowed)
    if num_layers == 0:
        return tuple(names)
    return (tuple(names) * -(-num_layers // len(names)))[:num_layers]


def ratio(linear: str, full: str, r: int, num_layers: int, placement: str | Sequence[int] = "last") -> str:
    """A pattern of ``num_layers`` layers with r linear layers to one full layer (see the module docstring).

    placement: where the full layer stands in its period of r + 1 layers: "last", "first", "middle" (index
        r // 2); or the 0-based indices of the full layers in the whole stack, and then r is not used.
    A stack that ends inside a period is cut there. One that would get no full layer is refused.
    """
    if num_layers < 1:
        raise ConfigError("num_layers", num_layers, "must be at least 1")
    if isinstance(placement, str):
        if placement not in PLACEMENTS:
            problem = "must be last, first, middle or a list of layer indices"
            raise ConfigError("placement", placement, problem)
        if r < 1:
            raise ConfigError("r", r, "must be at least 1 linear layer to one full layer")
        offset = {"last": r, "first": 0, "middle": r // 2}[placement]
        indices: Sequence[int] = range(offset, num_layers, r + 1)
        if not indices:
            problem = f"{r}:1, full layer {placement}, needs at least {offset + 1} layers, not {num_layers}"
            raise ConfigError("r", r, problem, "Place it first or in the middle, or give the indices.")
    else:
        indices = placement
        outside = [i for i in indices if not 0 <= i < num_layers]
        if outside:
            raise ConfigError("placement", outside, f"layer indices must be 0 to {num_layers - 1}")
    return str(plan.plan([full if i in indices else linear for i in range(num_layers)]))
