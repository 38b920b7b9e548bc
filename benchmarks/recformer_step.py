"""A pretraining step of Recformer: `python -m benchmarks.recformer_step [--vocabulary V] [--json FILE]`.

Forward, loss, backward, clipping and AdamW on histories of 1,024 tokens and next items of 64, against the step of the
official code (AaronHeee/RecFormer) on transformers' own Longformer modules: four whole passes, logits of all positions.
Both start from the same weights, see the same masked words, and reach the same loss. Sections: `speed`, and `memory`
(peak of each in a process of its own).
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness import Case, Report, argument_parser, measure
from userrep.data.batch import UserBatch
from userrep.data.item_sequences import item_sequences
from userrep.data.key_values import KEY_FLAG
from userrep.data.vocabulary import Vocabulary
from userrep.data.word_masking import mask_words, sequence_keys
from userrep.models.recformer import NUM_TYPES, Recformer, RecformerConfig
from userrep.training.objective import Precision
from userrep.training.optim import OptimConfig, build_optimizer
from userrep.training.recformer_objective import RecformerLossConfig, RecformerObjective

MAX_TOKENS, ITEM_TOKENS, NUM_ITEMS = 1024, 63, 20  # an item is shown in 64 tokens with its [CLS]
LOSS = RecformerLossConfig()
# Memory first: a process inherits the peak of the one that starts it.
SECTIONS = ("memory", "speed")
PRECISIONS: tuple[Precision, Precision] = ("float32", "bfloat16")


class OfficialRecformer(nn.Module):
    """The official classes on transformers' Longformer, with the weights of one of ours."""

    def __init__(self, ours: Recformer) -> None:
        super().__init__()
        # Imported here: our step is measured in a process without transformers.
        from transformers import LongformerConfig
        from transformers.models.longformer.modeling_longformer import LongformerEncoder, LongformerLMHead

        shape, vocab_size = ours.config, len(ours.token_embedding.weight)
        config = LongformerConfig(
            vocab_size=vocab_size,
            hidden_size=shape.dim,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            intermediate_size=shape.mlp_dim,
            attention_window=[shape.window or 0] * shape.num_layers,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=shape.norm_eps,
        )
        self.temperature = shape.temperature
        self.words, self.positions = nn.Embedding(vocab_size, shape.dim), nn.Embedding(shape.max_tokens, shape.dim)
        self.types, self.items = nn.Embedding(NUM_TYPES, shape.dim), nn.Embedding(shape.max_items + 1, shape.dim)
        self.norm = nn.LayerNorm(shape.dim, shape.norm_eps)
        self.encoder, self.head = LongformerEncoder(config), LongformerLMHead(config)
        self.head.decoder.bias = self.head.bias  # one parameter, as the official code has it
        self.load_state_dict(official_state(ours), strict=False)

    def forward(self, tokens_NL: torch.Tensor, types_NL: torch.Tensor, items_NL: torch.Tensor) -> torch.Tensor:
        """Hidden vectors of all positions, (N, L, D); no sequence has padding."""
        place_L = torch.arange(tokens_NL.shape[1])
        x_NLD = self.words(tokens_NL) + self.positions(place_L) + self.types(types_NL) + self.items(items_NL)
        is_global_NL = torch.zeros(tokens_NL.shape)
        is_global_NL[:, 0] = 1.0  # transformers' form: 0 local, > 0 global, < 0 padding
        return self.encoder(self.norm(x_NLD), attention_mask=is_global_NL)[0]

    def loss(self, sides: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Of histories and next items."""
        pooled = [self(side["tokens"], side["types"], side["items"])[:, 0] for side in sides]
        logits_BB = F.cosine_similarity(pooled[0][:, None], pooled[1][None], dim=2) / self.temperature
        loss = F.cross_entropy(logits_BB, torch.arange(len(logits_BB)))
        for side in sides:
            logits_NLV = self.head(self(side["masked_tokens"], side["types"], side["items"]))
            loss = loss + LOSS.masked_lm_weight * F.cross_entropy(logits_NLV.flatten(0, 1), side["labels"].flatten())
        return loss


def official_state(ours: Recformer) -> dict[str, torch.Tensor]:
    """Our weights by the names of `OfficialRecformer`."""
    state = ours.state_dict()
    tables = {"words": "token", "positions": "position", "types": "type", "items": "item"}
    theirs = {f"{name}.weight": state[f"{mine}_embedding.weight"] for name, mine in tables.items()}
    layer = {
        "attention.output.dense": "attention_out",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "mlp_in",
        "output.dense": "mlp_out",
        "output.LayerNorm": "mlp_norm",
        **{f"attention.self.{name}_global": f"{name}_global" for name in ("query", "key", "value")},
    }
    for part in ("weight", "bias"):
        theirs[f"norm.{part}"] = state[f"embedding_norm.{part}"]
        theirs[f"head.dense.{part}"], theirs[f"head.layer_norm.{part}"] = (
            state[f"head.{name}.{part}"] for name in ("dense", "norm")
        )
        for number in range(ours.config.num_layers):
            for name, mine in layer.items():
                theirs[f"encoder.layer.{number}.{name}.{part}"] = state[f"layers.{number}.{mine}.{part}"]
            together = state[f"layers.{number}.query_key_value.{part}"].chunk(3)
            for name, value in zip(("query", "key", "value"), together, strict=True):
                theirs[f"encoder.layer.{number}.attention.self.{name}.{part}"] = value
    return theirs | {"head.decoder.weight": state["head.decoder"], "head.bias": state["head.bias"]}


def draw_batch(batch_size: int, vocabulary: Vocabulary) -> UserBatch:
    """Histories of as many tokens as are read, and next items."""
    rng = np.random.default_rng(0)
    num_events = -(-MAX_TOKENS // ITEM_TOKENS)
    tokens = rng.integers(5, vocabulary.size - 1, ITEM_TOKENS * NUM_ITEMS)
    tokens[rng.random(len(tokens)) < 0.1] |= KEY_FLAG
    lengths = np.repeat([num_events, 1], batch_size)
    return UserBatch(
        tokens=tokens.astype(np.int32),
        token_offsets=np.arange(NUM_ITEMS + 1, dtype=np.int32) * ITEM_TOKENS,
        history_items=rng.integers(0, NUM_ITEMS, lengths.sum()).astype(np.int32),
        history_offsets=np.concatenate([[0], lengths.cumsum()]).astype(np.int32),
        user_keys=np.arange(batch_size),
        service_pairs=np.zeros(batch_size, dtype=np.int64),
        item_keys=np.arange(NUM_ITEMS),
        step=0,
    )


def new_vocabulary(size: int) -> Vocabulary:
    """Ids as RoBERTa has them; half of its tokens begin a word."""
    is_special = np.isin(np.arange(size), [0, 1, 2, 3, size - 1])
    is_word_start = np.random.default_rng(0).random(size) < 0.5
    return Vocabulary(size, 0, size - 1, 3, is_special, is_word_start)


def new_model(arguments: argparse.Namespace) -> Recformer:
    """The encoder, the same at every call."""
    torch.manual_seed(0)
    dim = arguments.dim
    config = RecformerConfig(
        dim=dim, num_layers=arguments.layers, num_heads=dim // 64, mlp_dim=4 * dim, window=64, max_tokens=MAX_TOKENS
    )
    return Recformer(config, arguments.vocabulary)


def official_sides(batch: UserBatch, config: RecformerConfig, vocabulary: Vocabulary) -> list[dict[str, torch.Tensor]]:
    """Tensors (B, L) of histories and of next items, whole and with the words masked that our step masks."""
    sequences = item_sequences(batch, vocabulary.cls_id, config.max_items, config.max_tokens)
    masked = mask_words(sequences, sequence_keys(batch.user_keys, 0, batch.step), vocabulary, LOSS.masking)
    labels = np.full(len(sequences.tokens), -100)
    labels[masked.positions] = masked.labels
    columns = {
        "tokens": sequences.tokens,
        "types": sequences.types,
        "items": sequences.item_positions,
        "masked_tokens": masked.sequences.tokens,
        "labels": labels,
    }
    border = sequences.offsets[len(batch.user_keys)]
    return [
        {name: torch.from_numpy(values[span]).view(len(batch.user_keys), -1) for name, values in columns.items()}
        for span in (slice(0, border), slice(border, None))
    ]


def steps(arguments: argparse.Namespace, precision: Precision, who: str) -> Callable[[], float]:
    """A function that takes one step and returns the loss before it."""
    vocabulary, ours = new_vocabulary(arguments.vocabulary), new_model(arguments)
    batch = draw_batch(arguments.batch_size, vocabulary)
    objective = RecformerObjective(ours, vocabulary, LOSS, precision=precision)
    model = ours if who == "ours" else OfficialRecformer(ours)
    sides = official_sides(batch, ours.config, vocabulary)
    optimizer = build_optimizer(model, OptimConfig())
    if who == "official":  # the same rates and decays; the kernel is torch's default, as in the official code
        kept = ("params", "lr", "betas", "weight_decay")
        optimizer = torch.optim.AdamW([{name: group[name] for name in kept} for group in optimizer.param_groups])

    def loss() -> torch.Tensor:
        if isinstance(model, Recformer):
            return objective(batch)[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return model.loss(sides)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return value.item()

    return step


def compare_speed(report: Report, arguments: argparse.Namespace) -> None:
    """Ours and the official step in both precisions; first, that both compute the same."""
    cases = []
    for precision in PRECISIONS:
        both = {who: steps(arguments, precision, who) for who in ("official", "ours")}
        losses = {who: [step() for _ in range(2)] for who, step in both.items()}
        tolerance = 1e-4 if precision == "float32" else 2e-2
        if not np.allclose(losses["official"], losses["ours"], rtol=tolerance):
            raise AssertionError(f"{precision}: losses differ: {losses}")
        report.console.print(f"{precision}: losses of two steps {losses}")
        cases += [Case(f"{who} {precision}", step, arguments.batch_size) for who, step in both.items()]
    results = measure(cases, arguments.rounds)
    facts = {"vocabulary": arguments.vocabulary, "dim": arguments.dim, "layers": arguments.layers}
    report.results("pretraining step", results, "sequence", batch_size=arguments.batch_size, **facts)
    rival = results["official float32"]
    report.speed("sequences/s over the official step, float32", results["ours float32"], rival, arguments.bar_float32)
    report.speed("sequences/s in bfloat16 over it", results["ours bfloat16"], rival, arguments.bar_bfloat16)
    same = results["official bfloat16"]
    report.speed("sequences/s in bfloat16 over its bfloat16", results["ours bfloat16"], same, arguments.bar_float32)


def compare_memory(report: Report, arguments: argparse.Namespace) -> None:
    """Peak resident memory of a process that takes three steps, its libraries and weights included."""
    for precision in PRECISIONS:
        peaks = {who: _peak_mib(arguments, precision, who) for who in ("official", "ours")}
        report.console.print(f"peak MiB in {precision}: {peaks}")
        report.verdict(
            f"peak MiB of a process, {precision}",
            peaks["ours"],
            arguments.bar_memory_mib,
            "at most",
            official=peaks["official"],
        )


def _peak_mib(arguments: argparse.Namespace, precision: Precision, who: str) -> float:
    shape = {name: getattr(arguments, name) for name in ("vocabulary", "dim", "layers", "threads")}
    options = [f"--{name}={value}" for name, value in {**shape, "batch-size": arguments.batch_size}.items()]
    command = [sys.executable, "-m", "benchmarks.recformer_step", f"--peak-of={who} {precision}", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def print_peak(arguments: argparse.Namespace) -> None:
    """Prints the peak of this process after three steps, in MiB."""
    who, precision = arguments.peak_of.split()
    step = steps(arguments, precision, who)
    for _ in range(3):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--vocabulary", type=int, default=50_265)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--bar-float32", type=float, default=2.5)
    parser.add_argument("--bar-bfloat16", type=float, default=4.0)
    parser.add_argument("--bar-memory-mib", type=float, default=1_430.0, help="1.5 GB")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs the measurements and prints them."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        print_peak(arguments)
        return
    report = Report("recformer_step", arguments.json, ("transformers",))
    compare = {"speed": compare_speed, "memory": compare_memory}
    for section in arguments.sections:
        compare[section](report, arguments)


if __name__ == "__main__":
    main()
