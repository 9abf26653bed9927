"""FID in the loop: where an evaluation's time goes, its share of a trial, and whether bf16 sampling changes the FID.

    python benchmarks/fid.py                                # ChiroDiff of the paper's KanjiVG study, one thread
    python benchmarks/fid.py --kanjivg kanji.rdp100.npz     # on real sketches instead of doodles of their length
    python benchmarks/fid.py --cpu-time --seeds 0           # CPU seconds on a machine in use; times only, no FIDs
    python benchmarks/fid.py --device cuda                  # fp32 and bf16 on a GPU, under 8 minutes

Needs PyTorch, diffusers, safetensors, numpy, pydantic and pillow, and this checkout; no Ray, nothing installed.

One row per sparsity, runtime and precision, for each protocol (samples x DDIM steps). In each turn a training step is
timed, and an evaluation by raysparse's own Evaluator of fewer samples and steps; seconds are medians of the turns.
Sampling is scaled to the protocol by samples x steps, drawing and extraction by samples; on a GPU, which samples
thousands in about the time of hundreds, by steps alone: each protocol's own number is drawn. The validation loss, FID
and KID are of full counts. `share` is that of all evaluations in a trial of --trial-steps steps, of one turn
(min / median / max): the first protocol at each --every, or another one there (`evaluate.intermediate`, which has no
KID) and both at the last step. FLOPs are those of the weights that are computed with, as a ratio; peak memory is what a
row's model, optimizer and evaluators take, training and evaluating.

FIDs are of one dense model, trained here for --train-steps, at --fid-samples and --fid-ddim-steps: mean and standard
deviation over sampling seeds (the noise), and the difference to fp32 from the same noise and weights. On a CPU the GRU
computes in fp32 under autocast too; in `bf16, GRU too` weights, inputs and states of the GRU are bf16, as on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for the other file; a script has it already
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a machine without Ray has no `pip install raysparse`

from fid_trial import Bf16GRU, Data, Runner, data, evaluator, trial
from peak_memory import Peak

from raysparse import rng
from raysparse.errors import UsageError
from raysparse.metrics import fidelity
from raysparse.models import chirodiff
from raysparse.train.evaluate import Evaluation, Evaluator

UNMEASURED = "unmeasured"
GRU_TOO = "bf16, GRU too"


@dataclasses.dataclass(frozen=True)
class Turn:
    """Seconds of a training step, and evaluations of so many samples."""

    step_s: float
    found: dict[int, Evaluation]


def drawn(options: argparse.Namespace, generated: int) -> int:
    """Of so many samples, how many are measured."""
    return generated if options.device == "cuda" else int(options.samples)


def measure(options: argparse.Namespace, known: Data, sparsity: float, runtime: str, precision: str) -> list[Turn]:
    """UsageError where the runtime cannot run here."""
    sparse = {"method": "static", "sparsity": sparsity} if sparsity else {"method": "dense"}
    train = {"precision": precision, "runtime": runtime}

    def judge(samples: int, ddim_steps: int) -> Evaluator:
        evaluate = {"generated": samples, "ddim_steps": ddim_steps, "runtime": runtime}
        made = evaluator(trial(options, sparse=sparse, train=train, evaluate=evaluate), known, options.device)
        made.clock = options.clock
        return made

    runner = Runner(trial(options, sparse=sparse, train=train), known, options.device)
    runner.train(2)
    judges = {}
    for samples in {drawn(options, generated) for generated, _ in options.protocols}:
        judge(samples, 1).evaluate(runner.average)  # warms up
        judges[samples] = judge(samples, options.ddim_steps)
    turns = []
    for _ in range(options.turns):
        step_s = runner.step_s(options.clock)
        found = {samples: of.evaluate(runner.average) for samples, of in judges.items()}
        turns.append(Turn(step_s, {samples: one for samples, one in found.items() if one is not None}))
    return turns


def maths(options: argparse.Namespace, known: Data, generated: int) -> tuple[float, float]:
    """Seconds of FID and KID for so many samples."""
    rows = rng.numpy_generator(0, "fid benchmark rows").integers(0, len(known.reference.features), generated)
    features = known.reference.features[rows]
    size = min(trial(options).evaluate.kid_subset_size, generated, len(known.reference.features))
    start = options.clock()
    fidelity.fid(fidelity.statistics(features), known.reference.statistics)
    middle = options.clock()
    device = torch.device(options.device)
    fidelity.kid(features, known.reference.features, subsets=options.kid_subsets, subset_size=size, device=device)
    return middle - start, options.clock() - middle


def parts_of(
    options: argparse.Namespace, turns: Sequence[Turn], protocol: tuple[int, int], known: Data
) -> list[list[float]]:
    """Of each turn the seconds of validation loss, sampling, drawing and extraction, FID, KID under a protocol."""
    generated, steps = protocol
    fid_s, kid_s = maths(options, known, generated)
    samples = drawn(options, generated)
    scale = generated / samples
    return [
        [
            seconds.validation,
            seconds.sampling * scale * steps / options.ddim_steps,
            seconds.extraction * scale,
            fid_s,
            kid_s if protocol == options.protocols[0] else 0.0,
        ]
        for seconds in (turn.found[samples].seconds for turn in turns)
    ]


def share(options: argparse.Namespace, step_s: float, full: list[float], early: list[float] | None) -> float:
    """Of all evaluations in a trial's time. full, early: the parts of each; early None: each is a full one."""
    count = -(-options.trial_steps // options.every)
    evaluations = count * sum(full) if early is None else count * sum(early) + sum(full[1:])  # one validation loss each
    return evaluations / (evaluations + options.trial_steps * step_s)


def fids(options: argparse.Namespace, known: Data) -> dict[str, list[float]]:
    """precision -> FID of the same trained weights, a value per sampling seed."""
    quick = "sparse" if options.device == "cpu" and _kernels() else "dense"  # how it is trained is no matter here
    runner = Runner(trial(options, sparse={"method": "dense"}, train={"runtime": quick}), known, options.device)
    say(f"training {options.train_steps} steps for the FIDs")
    runner.train(options.train_steps)
    ways = {"fp32": runner.average, "bf16": runner.average}
    if options.device == "cpu":
        ways[GRU_TOO] = copy.deepcopy(runner.average)
        ways[GRU_TOO].gru = Bf16GRU(runner.average.gru)  # type: ignore[assignment]
    found: dict[str, list[float]] = {precision: [] for precision in ways}
    for seed in range(options.seeds):
        for precision, model in ways.items():
            say(f"FID in {precision}, sampling seed {seed}")
            of = trial(
                options,
                seed=seed,
                train={"precision": precision[:4]},
                evaluate={"generated": options.fid_samples, "ddim_steps": options.fid_ddim_steps},
            )
            evaluation = evaluator(of, known, options.device).evaluate(model)
            assert evaluation is not None
            assert evaluation.wrong is None, evaluation.wrong
            found[precision].append(evaluation.fid)
    return found


def fid_cells(found: dict[str, list[float]], precision: str) -> list[str]:
    if precision not in found:
        return [UNMEASURED, UNMEASURED]
    values, base = found[precision], found["fp32"]
    gaps = [one - other for one, other in zip(values, base, strict=True)]
    return [spread(values), "–" if precision == "fp32" else spread(gaps, sign="+")]


def spread(values: Sequence[float], sign: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{deviation}"


HEADS = (
    "S", "runtime", "precision", "protocol", "validation s", "sampling s", "drawing + extraction s", "FID s", "KID s",
    "evaluation s", "training step ms", "share of a trial", "FLOPs", "peak MiB", "FID", "minus fp32, same noise",
)  # fmt: skip


def rows(options: argparse.Namespace, known: Data, found: dict[str, list[float]]) -> list[list[str]]:
    """The table; what cannot run here is said to be unmeasured."""
    table: list[list[str]] = []
    maths(options, known, options.protocols[0][0])  # what libraries take once is no row's memory
    kinds = [(0.0, "dense", "fp32"), (0.0, "auto", "fp32"), (0.0, "dense", "bf16")]
    kinds += [(sparsity, runtime, "fp32") for sparsity in options.sparsity for runtime in ("dense", "sparse")]
    for sparsity, runtime, precision in kinds:
        say(f"S {sparsity:g}, {runtime} runtime, {precision}")
        head = [f"{sparsity:g}", runtime, precision]
        quality = fid_cells(found, precision) if not sparsity else ["–", "–"]
        peak = Peak(options.device)
        try:
            turns = measure(options, known, sparsity, runtime, precision)
        except UsageError as error:
            why = f"{UNMEASURED}: {str(error).splitlines()[0]}"
            table.append([*head, why, *[UNMEASURED] * 10, *quality])
            continue
        size = [f"{1 - sparsity if runtime == 'sparse' else 1:g}", peak.mib()]
        full: list[list[float]] = []
        for number, protocol in enumerate(options.protocols):
            each = parts_of(options, turns, protocol, known)
            full = full or each
            parts = [statistics.median(part) for part in zip(*each, strict=True)]
            shares = sorted(
                share(options, turn.step_s, own, early if number else None)
                for turn, own, early in zip(turns, full, each, strict=True)
            )
            table.append([
                *head,
                f"{protocol[0]} x {protocol[1]}",
                *(f"{part:.3f}" for part in parts),
                f"{sum(parts):.2f}",
                f"{statistics.median(turn.step_s for turn in turns) * 1e3:.2f}",
                f"{shares[0]:.1%} / {statistics.median(shares):.1%} / {shares[-1]:.1%}",
                *size,
                *(quality if number == 0 else ["–", "–"]),
            ])  # fmt: skip
    if GRU_TOO in found:
        table.append(["0", "dense", GRU_TOO, "–", *["–"] * 10, *fid_cells(found, GRU_TOO)])
    return table


def _kernels() -> bool:
    try:
        chirodiff.sparse_runtime(chirodiff.build(chirodiff.Config(**chirodiff.SMALL), seed=0))
    except UsageError:
        return False
    return True


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def protocol_of(text: str) -> tuple[int, int]:
    """`1000x20`: samples and DDIM steps."""
    generated, _, steps = text.partition("x")
    return int(generated), int(steps)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--kanjivg", type=Path, help="kanji.rdp100.npz: real sketches")
    parser.add_argument("--sketches", type=int, help="doodles in each split (default: as many as KanjiVG has)")
    parser.add_argument("--hidden", type=int, default=96, help="h (default 96)")
    parser.add_argument("--layers", type=int, default=3, help="layers of the GRU (default 3)")
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.5, 0.9], help="beside dense (default .5 .9)")
    parser.add_argument("--batch-size", type=int, default=128, help="sketches per training step (default 128)")
    parser.add_argument("--batch", type=int, default=256, help="samples drawn at a time (default 256)")
    parser.add_argument("--samples", type=int, default=256, help="measured on a CPU; time is scaled (default 256)")
    parser.add_argument("--ddim-steps", type=int, default=5, help="measured DDIM steps; time is scaled (default 5)")
    parser.add_argument("--turns", type=int, default=5, help="measured turns (default 5)")
    parser.add_argument(
        "--protocols",
        type=protocol_of,
        nargs="+",
        default=[(10_000, 50), (1000, 20), (1000, 10), (500, 10)],
        metavar="SAMPLESxSTEPS",
        help="the first is a trial's own (default 10000x50 1000x20 1000x10 500x10)",
    )
    parser.add_argument("--trial-steps", type=int, default=40_800, help="of a trial (default 40800)")
    parser.add_argument("--every", type=int, default=2040, help="steps between evaluations (default 2040)")
    parser.add_argument("--kid-subsets", type=int, default=100)
    parser.add_argument("--train-steps", type=int, default=300, help="before the FIDs (default 300)")
    parser.add_argument("--fid-samples", type=int, default=1000, help="of each FID (default 1000)")
    parser.add_argument("--fid-ddim-steps", type=int, default=20, help="of each FID (default 20)")
    parser.add_argument("--seeds", type=int, default=3, help="sampling seeds of the FIDs (default 3; 0: no FIDs)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds: for one thread on a machine in use")
    parser.add_argument("--quick", action="store_true", help="one small model, a few samples: does it run?")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    if options.cpu_time and (options.device == "cuda" or options.threads > 1):
        parser.error("--cpu-time counts the seconds of one CPU thread")
    options.clock = time.process_time if options.cpu_time else time.perf_counter
    if options.quick:
        options.hidden, options.layers, options.sparsity, options.sketches = 8, 1, [0.5], 400
        options.samples, options.ddim_steps, options.turns, options.batch_size = 16, 2, 3, 16
        options.protocols, options.kid_subsets = [(400, 4), (384, 2)], 2
        options.train_steps, options.fid_samples, options.fid_ddim_steps, options.seeds = 2, 384, 2, 2
    torch.set_num_threads(options.threads)
    known = data(options)
    found = fids(options, known) if options.seeds else {}
    table = rows(options, known, found)
    place = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    print(
        f"torch {torch.__version__}, {place}; ChiroDiff h={options.hidden} l={options.layers}, "
        f"{'KanjiVG' if options.kanjivg else 'doodles'} of {known.training.lengths.mean():.1f} points, batch "
        f"{options.batch_size}; trial of {options.trial_steps:,} steps, evaluated every {options.every:,}; "
        f"{options.turns} turns of {options.samples if options.device == 'cpu' else 'all'} samples and "
        f"{options.ddim_steps} DDIM steps, "
        f"{'CPU' if options.cpu_time else 'wall'} time\nFID (glyph_cnn) after {options.train_steps} steps: "
        f"{options.fid_samples} samples of {options.fid_ddim_steps} DDIM steps, {options.seeds} sampling seeds"
    )
    if options.device == "cpu":
        print(f"on a GPU: {UNMEASURED} in this run (--device cuda)")
    print(f"\n| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|")
    for row in table:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
