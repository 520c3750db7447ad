"""AdaLoRA against LoRA at the same final budget on SST-2, over several seeds.

    python benchmarks/adalora_against_lora.py --source 'DATA/sst2_*.tsv'

Both adapt all weight matrices of attention and feed-forward parts, with the learning rate and the dropout of
`configs/adalora.yaml`; AdaLoRA ends with as many singular values as LoRA has ranks.
"""

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor

from strategies_on_sst2 import RESULTS, trained

LORA = {"model.strategy.rank": 8, "model.strategy.alpha": 16, "model.strategy.dropout": 0,
        "model.strategy.target_modules": "attention+mlp", "optimizer.lr": 8e-4}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    given = parser.parse_args()
    runs = [(name, seed) for seed in given.seeds for name in ("adalora", "lora")]
    with ThreadPoolExecutor(given.jobs) as pool:
        found = list(
            pool.map(lambda run: trained(*run, given.source, given.steps, **(LORA if run[0] == "lora" else {})), runs)
        )
    rows = [{"strategy": name, **result} for (name, _), result in zip(runs, found, strict=True)]
    (RESULTS / "adalora-against-lora.json").write_text(
        json.dumps({"steps": given.steps, "rows": rows}, indent=2) + "\n"
    )
    for name in ("adalora", "lora"):
        accuracies = [row["accuracy"] for row in rows if row["strategy"] == name]
        print(f"{name}: {', '.join(f'{value:.1%}' for value in accuracies)}; mean {statistics.mean(accuracies):.1%}")


if __name__ == "__main__":
    main()
