"""FLOP, bytes and exponentials of one training step, operation by operation: what any implementation needs.

Legend: B clips, L tokens of a clip, N packed tokens of a network, n tokens of one sequence, D its width, H =
mlp_ratio D, P = 3 t h w numbers of a patch, c bytes of the products' dtype (2 in bfloat16, 4 in float32). Residuals,
norms' inputs, gradients of weights, moments and averages have 4 bytes.

    product [N, a] x [a, b]      2 N a b FLOP forward, twice that backward (of the input, of the weight)
    attention of one sequence    4 n^2 D FLOP forward, 10 n^2 D backward, and each way n^2 exponentials a head
    embedding                    2 P D FLOP a token that is kept, as much backward (of the weight alone)

Bytes are what has to be read and written once when each line below is one pass over memory: residual and norm
together, the GELU where the product before it ends, weights in the products' dtype kept by the optimizer. What is
computed a second time to save memory counts as bytes, not as FLOP. Model FLOP are those of products and attention;
model-FLOP utilisation (MFU) is

    MFU = model FLOP of a clip * clips / seconds of a step / what a large matrix product of that dtype reaches
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from vjepa import VJEPAConfig

from .steps import CONTEXT, LOSS, PREDICTOR, TARGET, UPDATE

PREDICTOR_MLP_RATIO = 4.0
WORD = 4  # bytes of a float32
FORWARD, BACKWARD = 4, 10  # FLOP of attention for each pair of tokens and feature
PRODUCT, ATTENTION, PASS = "product", "attention", "pass over memory"


@dataclass(frozen=True)
class Op:
    """One operation, of all blocks of a network together."""

    part: str
    name: str
    kind: str
    flop: int = 0
    moved: int = 0  # bytes
    exps: int = 0


@dataclass(frozen=True)
class Network:
    """A stack of blocks over packed tokens."""

    part: str
    tokens: int  # N
    pairs: int  # sum of n^2
    width: int  # D
    hidden: int  # H
    heads: int
    depth: int
    trained: bool
    low: int  # c

    @property
    def weights(self) -> int:
        """Numbers in the matrices of the blocks."""
        return self.depth * (4 * self.width**2 + 2 * self.width * self.hidden)

    def op(self, name: str, kind: str, flop: int = 0, moved: int = 0, exps: int = 0) -> Op:
        return Op(self.part, name, kind, self.depth * flop, self.depth * moved, self.depth * exps)

    def product(self, name: str, a: int, b: int, extra: int = 0, extra_backward: int = 0) -> Iterator[Op]:
        """Of each block; `extra` bytes are those of what is fused with it."""
        n, c = self.tokens, self.low
        yield self.op(f"{name}, forward", PRODUCT, 2 * n * a * b, c * (n * a + a * b + n * b) + extra)
        if self.trained:
            inputs, weights = c * (n * a + a * b + n * b), c * n * (a + b) + WORD * a * b
            yield self.op(f"{name}, backward", PRODUCT, 4 * n * a * b, inputs + weights + extra_backward)

    def ops(self) -> Iterator[Op]:
        n, d, h, c = self.tokens, self.width, self.hidden, self.low
        yield self.op("residual + norm, forward", PASS, moved=2 * n * d * 2 * (WORD + c))
        yield from self.product("qkv", d, 3 * d)
        exps = self.pairs * self.heads
        yield self.op("attention, forward", ATTENTION, FORWARD * self.pairs * d, c * 4 * n * d, exps)
        if self.trained:
            yield self.op("attention, backward", ATTENTION, BACKWARD * self.pairs * d, c * 8 * n * d, exps)
        yield from self.product("proj", d, d)
        # forward keeps what the GELU takes; backward reads it, and makes the GELU again for the gradient of fc2's weight
        yield from self.product("fc1 + GELU", d, h, extra=c * n * h * self.trained)
        yield from self.product("fc2", h, d, extra_backward=2 * c * n * h)
        if self.trained:
            yield self.op("residual + norm, backward", PASS, moved=2 * n * d * (3 * WORD + 2 * c))


def encoder(
    config: VJEPAConfig, part: str, lengths: Sequence[int], trained: bool, low: int
) -> tuple[Network, Iterator[Op]]:
    """The blocks, and what is before and after them."""
    tokens, width = sum(lengths), config.embed_dim
    hidden = int(width * config.mlp_ratio)
    pairs = sum(n**2 for n in lengths)
    blocks = Network(part, tokens, pairs, width, hidden, config.num_heads, config.depth, trained, low)
    patch = patch_size(config)

    def ends() -> Iterator[Op]:
        yield embedding(part, tokens, patch, width, low, "forward")
        if trained:
            yield embedding(part, tokens, patch, width, low, "backward")
        yield Op(part, "last norm", PASS, moved=tokens * width * 2 * WORD * (1 + 2 * trained))

    return blocks, ends()


def patch_size(config: VJEPAConfig) -> int:
    return config.in_channels * config.tubelet_size * config.patch_size**2


def embedding(part: str, tokens: int, patch: int, width: int, low: int, direction: str) -> Op:
    """Pixels are bytes; tokens and the gradient of the weight are float32."""
    matrix = (low if direction == "forward" else WORD) * patch * width
    moved = tokens * (patch + WORD * width) + matrix
    return Op(part, f"embedding, {direction}", PRODUCT, 2 * tokens * patch * width, moved)


def predictor(config: VJEPAConfig, context: Sequence[int], target: Sequence[int], low: int) -> Iterator[Op]:
    width, wide = config.predictor_embed_dim, config.embed_dim
    lengths = [c + t for c, t in zip(context, target, strict=True)]
    tokens, pairs, seen, hidden = sum(lengths), sum(n**2 for n in lengths), sum(context), sum(target)
    inner = int(width * PREDICTOR_MLP_RATIO)

    def stack(rows: int, depth: int) -> Network:
        heads = config.predictor_heads
        return Network(PREDICTOR, rows, pairs, width, inner, heads, depth, True, low)

    yield from stack(seen, 1).product("embedding of the context", wide, width)
    yield Op(PREDICTOR, "tokens of each set, forward and backward", PASS, moved=2 * tokens * width * (low + WORD))
    yield from stack(tokens, config.predictor_depth).ops()
    yield Op(PREDICTOR, "last norm, of the targets", PASS, moved=hidden * width * (4 * WORD + 2 * low))
    yield from stack(hidden, 1).product("features of the targets", width, wide)


def parameters(config: VJEPAConfig) -> tuple[int, int]:
    """Numbers trained in the encoder and in the predictor."""

    def block(width: int, hidden: int) -> int:
        return 4 * width**2 + 2 * width * hidden + 4 * width + hidden + width + 4 * width

    wide, narrow = config.embed_dim, config.predictor_embed_dim
    encoder = (patch_size(config) + 1) * wide + 2 * wide + config.depth * block(wide, int(wide * config.mlp_ratio))
    ends = (wide + 1) * narrow + (narrow + 1) * wide + (config.num_mask_tokens + 2) * narrow
    return encoder, ends + config.predictor_depth * block(narrow, int(narrow * PREDICTOR_MLP_RATIO))


def update(config: VJEPAConfig, low: int) -> Iterator[Op]:
    """Norms read the gradients; AdamW reads weight, gradient, two moments and average, and writes all but the gradient.

    Copies for the products, of weights and averages, are written in the same pass if these have another dtype.
    """
    encoder, predictor = parameters(config)
    copy = low if low != WORD else 0
    yield Op(UPDATE, "gradient norms", PASS, moved=WORD * (encoder + predictor))
    yield Op(
        UPDATE, "AdamW, average, copies", PASS, moved=encoder * (9 * WORD + 2 * copy) + predictor * (7 * WORD + copy)
    )


def loss(config: VJEPAConfig, target: Sequence[int], low: int) -> Iterator[Op]:
    """Of each target: its features and its prediction are read, and the gradient of the prediction is written."""
    moved = sum(target) * config.embed_dim * (WORD + low + low)
    yield Op(LOSS, "norm of features, gather, L1, forward and backward", PASS, moved=moved)


def step_ops(config: VJEPAConfig, clips: int, context: Sequence[int], target: Sequence[int], low: int = 2) -> list[Op]:
    """All operations of a step; context, target: tokens of each set; low: bytes of the products' dtype."""
    ops = []
    for part, lengths, trained in ((TARGET, [config.num_tokens] * clips, False), (CONTEXT, context, True)):
        blocks, ends = encoder(config, part, lengths, trained, low)
        ops += [*ends, *blocks.ops()]
    return [*ops, *predictor(config, context, target, low), *loss(config, target, low), *update(config, low)]


def model_flop(
    config: VJEPAConfig, clips: int, context: Sequence[int], target: Sequence[int], part: str | None = None
) -> int:
    """FLOP of products and attention of a step, or of one of its parts."""
    ops = step_ops(config, clips, context, target)
    return sum(op.flop for op in ops if part in (None, op.part))


def straight_flop(config: VJEPAConfig, clips: int, context: Sequence[int], target: Sequence[int]) -> int:
    """What straight PyTorch computes: the embedding of the whole grid for each mask kind, forward and backward.

    Its attention on a CPU keeps what it computed: two FLOP less for each pair in the backward pass.
    """
    kinds = len(context) // clips
    whole = clips * config.num_tokens * kinds
    embedded = 4 * (whole - sum(context)) * prod((patch_size(config), config.embed_dim))
    return model_flop(config, clips, context, target) + embedded
