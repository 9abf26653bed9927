"""FID: our symmetric form against torch-fidelity's eigenvalues of S1 S2, side by side in one process, on one thread.

    python benchmarks/fid_maths.py            # D = 2048, about a minute
    python benchmarks/fid_maths.py --quick    # D = 512

Both sides get statistics made from the same float32 features, and the distance is timed; the first side is the
reference, whose root raysparse keeps in its cache (`cached`) or makes anew (`fresh`). `ratio` is
their CPU time over ours (min / median / max of the rounds); `difference` is relative, in FID.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy: CPU time then is what an idle core would take

import numpy as np
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from raysparse.metrics import fidelity


def features(count: int, width: int, seed: int) -> torch.Tensor:
    """float32 [count, width]: rectified, correlated, a spectrum over two decades, like a network's last layer."""
    draw = np.random.default_rng(seed)
    mix = draw.normal(size=(width, width)) * np.geomspace(1, 1e-2, width)
    values = np.maximum(0, draw.normal(size=(count, width)) @ mix / np.sqrt(width) + 0.02 * seed)
    return torch.from_numpy(values.astype(np.float32))


def timed(function: Callable[[], float]) -> tuple[float, float]:
    start = time.process_time()
    value = function()
    return value, time.process_time() - start


def distances(sides: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Callable[[], float]]:
    """Three ways to the FID of two feature sets, statistics given."""
    theirs = [fid_features_to_statistics(x) for x in sides]
    reference, made = (fidelity.statistics(x) for x in sides)
    kept = fidelity.Statistics(reference.mean, reference.count, root=reference.root)

    def fresh() -> float:
        again = (
            fidelity.statistics(sides[0])
            if reference.wide
            else fidelity.Statistics.from_covariance(reference.mean, reference.covariance, reference.count)
        )
        return fidelity.fid(again, made)

    return {
        "cached": lambda: fidelity.fid(kept, made),
        "fresh": fresh,
        "torch-fidelity": lambda: fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="D = 512")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    width = 512 if options.quick else 2048
    print(f"D = {width}, 1 thread, {options.rounds} rounds, CPU seconds")
    print("| images | ours | s | torch-fidelity s | ratio min / median / max | relative difference |")
    print("|---|---|---|---|---|---|")
    for count in (3 * width, width // 2):
        ways = distances((features(count, width, 1), features(count, width, 2)))
        results = {name: [timed(way) for _ in range(options.rounds)] for name, way in ways.items()}
        other, other_s = results["torch-fidelity"][0][0], [seconds for _, seconds in results["torch-fidelity"]]
        for name in ("cached", "fresh"):
            mine_s = [seconds for _, seconds in results[name]]
            ratios = sorted(slow / fast for slow, fast in zip(other_s, mine_s, strict=True))
            print(
                f"| {count} | {name} | {statistics.median(mine_s):.2f} | {statistics.median(other_s):.2f} "
                f"| {ratios[0]:.1f} / {statistics.median(ratios):.1f} / {ratios[-1]:.1f} "
                f"| {abs(results[name][0][0] / other - 1):.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
