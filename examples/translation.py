"""Train a German-English translation model, dense and 2:4 beside it.

An encoder-decoder transformer (flax linen) on Multi30k with a joint byte-pair
vocabulary. With 2:4, all attention projections and MLP layers keep two of every four
weights along their inputs; norms and the embedding, which is shared by source, target
and output, stay dense. The model knows nothing of sparsity: the loss applies it to
`nm.sparsify(params, plan)`, and the optimizer chain has the stage `nm.srste(plan)`.

Methods: ``dense``; ``one_shot``, the dense model pruned once by magnitude and not
trained again; ``ste``, 2:4 from the first step, straight-through gradients;
``srste``, the same with the decay of SR-STE on pruned weights.

Command::

    python examples/translation.py --data-dir DATA --method dense srste

where ``DATA/multi30k/`` (or ``DATA/``) has ``{train,val,test_2016_flickr}.{de,en}``,
one sentence a line. Without ``--data-dir`` the task is a made-up one, for trying the
script out: German to English dates.

Result on the made-up dates, one seed, with ``--method dense one_shot srste --vocabulary
300 --width 64 --layers 1 --epochs 8 --lr 3e-3``: all three translate the 200 test
sentences without an error (BLEU 100); the loss per byte pair of the validation
sentences is 0.06 dense, 0.13 pruned once and 0.06 with SR-STE. The task is too easy to
compare methods by; it shows that training and decoding work.

Time: a minute a run. Hardware: one core of an AMD EPYC that other work shared.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import common
import flax.linen as nn
import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import sacrebleu
import tokenizers
from multi30k import BOS, EOS, GRID, PAD, Batches, Task, pad, read_task

import nmjax as nm

# Model ------------------------------------------------------------------------------


def positions(length: int, width: int) -> jax.Array:
    """Return sinusoidal positions, float32 ``(length, width)``."""
    rate = jnp.exp(jnp.linspace(0.0, -jnp.log(10_000.0), width // 2))
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * rate
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class Layer(nn.Module):
    """Pre-norm transformer layer; with ``memory`` it also attends to the source."""

    heads: int
    dropout: float

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        train: bool,
        memory: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Map ``(batch, time, width)`` to the same shape."""
        width = x.shape[-1]
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = functools.partial(
            nn.MultiHeadDotProductAttention, num_heads=self.heads
        )
        y = nn.LayerNorm()(x)
        x = x + drop(attention(name="self_attention")(y, mask=mask))
        if memory is not None:
            y = nn.LayerNorm()(x)
            attend = attention(name="cross_attention")
            x = x + drop(attend(y, memory, mask=memory_mask))
        y = nn.relu(nn.Dense(4 * width, name="up")(nn.LayerNorm()(x)))
        return x + drop(nn.Dense(width, name="down")(drop(y)))


class Translator(nn.Module):
    """Encoder-decoder transformer with one embedding for source, target and output."""

    vocabulary: int
    width: int
    heads: int
    layers: int
    dropout: float

    def setup(self) -> None:
        """Make the submodules."""
        self.embedding = nn.Embed(self.vocabulary, self.width)
        self.drop = nn.Dropout(self.dropout)
        stack = range(self.layers)
        self.encoder = [Layer(self.heads, self.dropout) for _ in stack]
        self.decoder = [Layer(self.heads, self.dropout) for _ in stack]
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(), nn.LayerNorm()

    def _embed(self, tokens: jax.Array, train: bool) -> jax.Array:
        x = self.embedding(tokens) * self.width**0.5
        x = x + positions(tokens.shape[1], self.width)
        return self.drop(x, deterministic=not train)

    def encode(self, source: jax.Array, train: bool = False) -> jax.Array:
        """Read source tokens ``(batch, time)``; return ``(batch, time, width)``."""
        x = self._embed(source, train)
        mask = nn.make_attention_mask(source > PAD, source > PAD, dtype=jnp.bool_)
        for layer in self.encoder:
            x = layer(x, mask, train)
        return self.encoder_norm(x)

    def decode(
        self,
        memory: jax.Array,
        source: jax.Array,
        tokens: jax.Array,
        train: bool = False,
    ) -> jax.Array:
        """Return the hidden state after each token, ``(batch, time, width)``."""
        x = self._embed(tokens, train)
        memory_mask = nn.make_attention_mask(
            jnp.ones(tokens.shape, jnp.bool_), source > PAD, dtype=jnp.bool_
        )
        mask = nn.make_causal_mask(tokens, dtype=jnp.bool_)
        for layer in self.decoder:
            x = layer(x, mask, train, memory, memory_mask)
        return self.decoder_norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return scores of all pieces, ``(..., vocabulary)``."""
        return self.embedding.attend(hidden)

    def __call__(
        self, source: jax.Array, tokens: jax.Array, train: bool = False
    ) -> jax.Array:
        """Return the logits of the piece after each of ``tokens``."""
        hidden = self.decode(self.encode(source, train), source, tokens, train)
        return self.logits(hidden)


def apply(model: Translator, params: Any, *inputs: Any, **options: Any) -> jax.Array:
    """Run the model, or the method of it that ``options`` name, with these weights."""
    output = model.apply({"params": params}, *inputs, **options)
    return output  # pyright: ignore[reportReturnType]


SETTINGS = (  # what determines a run, besides its method and the data
    "vocabulary longest width heads layers dropout tokens epochs lr weight_decay "
    "smoothing log_every"
).split()


# Training ---------------------------------------------------------------------------


def token_losses(
    logits: jax.Array, target: jax.Array, smoothing: float
) -> tuple[jax.Array, jax.Array]:
    """Return the summed label-smoothed loss and the number of tokens, padding left out.

    Per token: ``-(1 - smoothing) log p(token) - smoothing * mean(log p)``.
    """
    log_p = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]
    losses = -(1 - smoothing) * chosen - smoothing * log_p.mean(-1)
    real = target > PAD
    return jnp.where(real, losses, 0.0).sum(), real.sum()


def shifted(target: jax.Array) -> jax.Array:
    """Return the decoder's input: `BOS`, then the target without its last token."""
    return jnp.pad(target[:, :-1], ((0, 0), (1, 0)), constant_values=BOS)


def make_optimizer(
    method: str, plan: nm.Plan, steps: int, options: argparse.Namespace
) -> optax.GradientTransformation:
    """Return AdamW with warm-up and cosine schedule, and SR-STE's stage in it."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.lr, steps // 10, steps)
    clip = optax.clip_by_global_norm(1.0)
    adamw = optax.adamw(schedule, b2=0.98, weight_decay=options.weight_decay)
    if method != "srste":
        return optax.chain(clip, adamw)
    if options.mode == "coupled":  # as published: before the preconditioner
        return optax.chain(clip, nm.srste(plan, options.decay), adamw)
    pull = nm.srste(plan, options.decay, mode="decoupled", learning_rate=schedule)
    return optax.chain(clip, adamw, pull)


def make_step(
    method: str,
    model: Translator,
    plan: nm.Plan,
    tx: optax.GradientTransformation,
    smoothing: float,
) -> Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]:
    """Return the jitted training step: ``(state, batch) -> (state, metrics)``."""
    tracker = nm.tracker(plan)

    def loss_fn(params: Any, source: jax.Array, target: jax.Array, key: jax.Array):
        logits = apply(
            model,
            methods.used_params(method, params, plan),
            source,
            shifted(target),
            train=True,
            rngs={"dropout": key},
        )
        total, count = token_losses(logits, target, smoothing)
        return total / count

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        loss, grads = jax.value_and_grad(loss_fn)(state["params"], *batch)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics, tracked = tracker.update(params, state["tracker"])
        if method == "dense":  # the masks are not used: only how they would flip
            metrics = {"flip_rate": metrics["flip_rate"]}
        metrics = {"loss": loss, **metrics}
        return {"params": params, "opt": opt, "tracker": tracked}, metrics

    return step


# Decoding ---------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("model", "length", "beams"))
def search(
    model: Translator,
    params: Any,
    source: jax.Array,
    *,
    length: int,
    beams: int = 1,
    length_penalty: float = 1.0,
) -> jax.Array:
    """Translate by beam search; one beam is greedy decoding.

    Every step runs the decoder over all ``length`` places instead of keeping keys and
    values: at a width that a CPU trains, this is fast, and beams move as tokens alone.

    Args:
      model: The model.
      params: The weights it computes with.
      source: Tokens, int32 ``(batch, time)``.
      length: Most tokens of a translation, `EOS` counted.
      beams: Hypotheses kept per sentence.
      length_penalty: A hypothesis scores ``log p / tokens ** length_penalty``.

    Returns:
      The best hypotheses, int32 ``(batch, length)``, `PAD` after `EOS`.
    """
    batch = source.shape[0]
    memory = jnp.repeat(apply(model, params, source, method="encode"), beams, 0)
    source = jnp.repeat(source, beams, 0)
    # Beams start alike, so only the first may be continued in the first step.
    scores = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)
    scores = jnp.broadcast_to(scores, (batch, beams))
    tokens = jnp.full((batch, beams, length + 1), PAD, jnp.int32).at[:, :, 0].set(BOS)
    done = jnp.zeros((batch, beams), jnp.bool_)

    def unfinished(carry: Any) -> jax.Array:
        place, _, _, done = carry
        return (place < length) & ~done.all()

    def extend(carry: Any) -> Any:
        place, tokens, scores, done = carry
        hidden = apply(
            model,
            params,
            memory,
            source,
            tokens[..., :-1].reshape(batch * beams, length),
            method="decode",
        )
        logits = apply(model, params, hidden[:, place], method="logits")
        log_p = jax.nn.log_softmax(logits).reshape(batch, beams, -1)
        only_pad = jnp.where(jnp.arange(log_p.shape[-1]) == PAD, 0.0, -jnp.inf)
        log_p = log_p.at[..., PAD].set(-jnp.inf)
        log_p = jnp.where(done[..., None], only_pad, log_p)
        total = (scores[..., None] + log_p).reshape(batch, -1)
        scores, best = jax.lax.top_k(total, beams)
        beam, token = jnp.divmod(best, log_p.shape[-1])
        tokens = jnp.take_along_axis(tokens, beam[..., None], axis=1)
        tokens = tokens.at[:, :, place + 1].set(token)
        done = jnp.take_along_axis(done, beam, axis=1) | (token == EOS)
        return place + 1, tokens, scores, done

    _, tokens, scores, _ = jax.lax.while_loop(
        unfinished, extend, (0, tokens, scores, done)
    )
    tokens = tokens[..., 1:]
    counts = (tokens > PAD).sum(-1).astype(jnp.float32)
    best = jnp.argmax(scores / counts**length_penalty, axis=1)
    return jnp.take_along_axis(tokens, best[:, None, None], axis=1)[:, 0]


def translate(
    model: Translator,
    params: Any,
    vocabulary: tokenizers.Tokenizer,
    source: Sequence[Sequence[int]],
    *,
    beams: int = 1,
    batch: int = 50,
) -> list[str]:
    """Translate encoded sentences, those of like length together."""
    order = sorted(range(len(source)), key=lambda i: len(source[i]))
    translations = [""] * len(source)
    for first in range(0, len(order), batch):
        members = order[first : first + batch]
        width = -(-len(source[members[-1]]) // GRID) * GRID
        tokens = search(
            model,
            params,
            pad([source[i] for i in members], batch, width),
            length=width + GRID,
            beams=beams,
        )
        for i, row in zip(members, np.asarray(tokens).tolist(), strict=False):
            translations[i] = vocabulary.decode(row)  # leaves special tokens out
    return translations


# The script -------------------------------------------------------------------------


class Trainer:
    """Trains methods on one task; compiles each once for all seeds."""

    def __init__(self, task: Task, options: argparse.Namespace):
        """Make the model and the plan."""
        self.task, self.options = task, options
        names = ("width", "heads", "layers", "dropout")
        self.model = Translator(
            task.vocabulary.get_vocab_size(),
            **{name: getattr(options, name) for name in names},
        )
        params = jax.eval_shape(self.init_params, jnp.uint32(0))
        self.plan = nm.plan(params, nm.NM(2, 4))
        per_epoch = Batches(task.train, options.tokens, seed=0).per_epoch
        self.steps = options.epochs * per_epoch
        self.start = functools.cache(self.make_start)
        self.step = functools.cache(self.make_step)

    def init_params(self, seed: jax.Array) -> Any:
        """Return fresh parameters."""
        blank = jnp.ones((1, GRID), jnp.int32)
        return self.model.init(common.key_for(seed, 0), blank, blank)["params"]

    def optimizer(self, method: str) -> optax.GradientTransformation:
        """Return the optimizer of a method."""
        return make_optimizer(method, self.plan, self.steps, self.options)

    def make_start(self, method: str) -> Callable[[jax.Array], Any]:
        """Return what makes the state before the first step, from the seed."""
        tx = self.optimizer(method)

        @jax.jit
        def start(seed: jax.Array) -> Any:
            params = self.init_params(seed)
            tracked = nm.tracker(self.plan).init(params)
            return {"params": params, "opt": tx.init(params), "tracker": tracked}

        return start

    def make_step(self, method: str) -> common.Step:
        """Return the training step of a method."""
        tx = self.optimizer(method)
        return make_step(method, self.model, self.plan, tx, self.options.smoothing)

    def __call__(self, method: str, seed: int) -> methods.Trained:
        """Train one model, or finish training it."""
        options = self.options
        batches = Batches(self.task.train, options.tokens, seed)
        state, history = common.train(
            self.step(method),
            self.start(method)(jnp.uint32(seed)),
            lambda step: (*batches(step), common.key_for(seed, 1, step)),
            steps=self.steps,
            run_dir=options.out / f"{method}-seed{seed}",
            config=methods.run_config(method, seed, options, SETTINGS),
            save_every=options.save_every,
            log_every=options.log_every,
            resume=options.resume,
            label=f"{method} seed {seed}",
        )
        return methods.Trained(self.model, state["params"], self.plan, history)


@functools.partial(jax.jit, static_argnames="model")
def plain_losses(
    model: Translator, params: Any, source: jax.Array, target: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the summed ``-log p`` of a batch without smoothing, and its tokens."""
    logits = apply(model, params, source, shifted(target))
    return token_losses(logits, target, 0.0)


def validation_loss(model: Translator, params: Any, task: Task, tokens: int) -> float:
    """Return ``-log p`` per byte pair of the validation targets, in nats."""
    batches = Batches(task.val, tokens, seed=0)
    sums = [
        plain_losses(model, params, *batches(step)) for step in range(batches.per_epoch)
    ]
    total, count = np.sum(jax.device_get(sums), axis=0)
    return float(total / count)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = common.parser(
        "German-English translation, dense and 2:4.", out="runs/translation"
    )
    methods.add_options(parser)
    add = parser.add_argument
    add("--epochs", type=int, default=5)
    add("--vocabulary", type=int, default=4000, help="byte pairs of both languages")
    add("--longest", type=int, default=48, help="byte pairs of a sentence at most")
    add("--width", type=int, default=128)
    add("--heads", type=int, default=4)
    add("--layers", type=int, default=2, help="of the encoder, and of the decoder")
    add("--dropout", type=float, default=0.1)
    add("--tokens", type=int, default=1024, help="of each side in a batch")
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--weight-decay", type=float, default=1e-4)
    add("--smoothing", type=float, default=0.1, help="of labels")
    add("--beams", type=int, default=1, help="beams of the search; 1 is greedy")
    options = parser.parse_args(arguments)
    if options.smoke:
        small = {"vocabulary": 100, "width": 16, "heads": 2, "layers": 1, "epochs": 4}
        vars(options).update(small, longest=16, tokens=320, log_every=2, save_every=4)
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Train every method with every seed; return one row of results for each."""
    options = parse(arguments)
    most = 40 if options.smoke else None
    task = read_task(options.data_dir, options.vocabulary, options.longest, most)
    test = task.test

    def evaluate(run: methods.Trained, weights: Any, seed: int) -> methods.Outcome:
        outputs = translate(
            run.model, weights, task.vocabulary, test.source_ids, beams=options.beams
        )
        scores = {
            "BLEU": sacrebleu.corpus_bleu(outputs, [test.target]).score,
            "validation nll": validation_loss(run.model, weights, task, options.tokens),
        }
        shown = zip(test.source[:3], test.target[:3], outputs[:3], strict=True)
        text = "\n\n".join("\n".join(lines) for lines in shown)
        return methods.Outcome(scores, text)

    data = "made-up dates" if options.data_dir is None else "Multi30k test_2016_flickr"
    decoding = "greedy" if options.beams == 1 else f"{options.beams} beams"
    return methods.compare(
        options,
        Trainer(task, options),
        evaluate,
        digits=2,
        note=f"{data}, {len(test.source)} sentences, {decoding}, sacrebleu 13a cased",
    )


if __name__ == "__main__":
    main()
